"""Who may ask: checks on request headers alone, before a byte of the body is read. Deny by default."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
import secrets
from collections.abc import Iterable

from multimodal_gen.config import ServerConfig
from multimodal_gen.errors import (
    AdminRequired,
    AuthenticationFailed,
    BodyTooLarge,
    HostNotAllowed,
    InvalidValue,
    OriginNotAllowed,
    UnsupportedMediaType,
)
from multimodal_gen.text import MAX_ROUTING_KEY

Headers = Iterable[tuple[bytes, bytes]]

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
UPLOAD_PATH = "/v1/loras"
TENSORS_PATH = "/v1/load_lora_adapter_from_tensors"
ADMIN_PATHS = frozenset(
    {"/v1/set_lora", "/v1/merge_lora_weights", "/v1/unmerge_lora_weights", "/v1/sleep", "/v1/wake"}
    | {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", TENSORS_PATH}
)
VIDEOS_PATH = "/v1/videos"
FORM_TYPE = "multipart/form-data"
UPLOAD_TYPE = "application/octet-stream"  # a page of another site cannot send it without asking, as it can text/plain

_ROUTING_KEY = re.compile(rf"[A-Za-z0-9._:/@+=~-]{{1,{MAX_ROUTING_KEY}}}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<authority>.+)")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def get(headers: Headers, name: bytes) -> bytes | None:
    """The first header of that name (lower case), as raw bytes."""
    return next((value for key, value in headers if key == name), None)


def request_id(headers: Headers) -> str:
    """The client's X-Request-Id if it is harmless in logs and headers, else a new one."""
    given = get(headers, b"x-request-id")
    if given is not None and len(given) <= 128 and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return "req_" + secrets.token_hex(16)


def routing_key(headers: Headers) -> str | None:
    """The client's X-Routing-Key: requests with the same one go well together. Raises: InvalidValue."""
    given = [value for key, value in headers if key == b"x-routing-key"]
    if not given:
        return None
    text = given[0].decode("latin-1")
    if len(given) > 1 or len(text) > MAX_ROUTING_KEY or not _ROUTING_KEY.fullmatch(text):
        raise InvalidValue(
            f"Send one header X-Routing-Key of 1 to {MAX_ROUTING_KEY} letters, digits and ._:/@+=~- without spaces.",
            param="x-routing-key",
        )
    return text


def check_host(headers: Headers, config: ServerConfig) -> str:
    """The request's Host, lower case.

    A name must be known: a web page whose own name was rebound to this machine would send that name. An address
    cannot be rebound and is accepted.
    Raises: InvalidValue for text that is no host; HostNotAllowed for an unknown name.
    """
    text = (get(headers, b"host") or b"").decode("latin-1")
    match = _HOST.fullmatch(text)
    if match is None:
        raise InvalidValue("The Host header is missing or is not a host name.", param="Host")
    name = match["name"].lower().rstrip(".")
    known = {"localhost", config.host.lower(), *(host.lower() for host in config.allowed_hosts)}
    if "*" not in known and name not in known and text.lower() not in known and not _is_address(name):
        raise HostNotAllowed(
            f"This server does not answer for the host name {name[:100]!r}. Start it with --allowed-hosts {name[:100]} "
            "if it should."
        )
    return text.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def check_origin(headers: Headers, host: str, config: ServerConfig) -> str | None:
    """The foreign origin that may read the answer, or None for same-origin requests and programs.

    Raises: OriginNotAllowed.
    """
    origins = [value for key, value in headers if key == b"origin"]
    if not origins:
        return None
    text = origins[0].decode("latin-1")
    if len(origins) == 1 and _same_origin(text, host):
        return None
    if len(origins) == 1 and text != "null" and ("*" in config.allowed_origins or text in config.allowed_origins):
        return text
    raise OriginNotAllowed(
        "Web pages of that origin may not call this server. Start it with --allowed-origins if they should."
    )


def _same_origin(origin: str, host: str) -> bool:
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return False
    default = _DEFAULT_PORTS[match["scheme"]]
    return match["authority"].removesuffix(f":{default}") == host.removesuffix(f":{default}")


def check_key(headers: Headers, path: str, config: ServerConfig) -> str:
    """Every path but the health checks needs the key, if there is one; what changes the server for everybody needs the
    admin key, if there is one. The admin key opens everything. `path` is the raw ASGI path, never a URL rebuilt from
    headers. Returns the key of ours that was given, or "".

    Raises: AuthenticationFailed; AdminRequired for a valid key that is not the admin's.
    """
    admin = needs_admin(path)
    given = [value for key, value in headers if key == b"authorization"]
    scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
    # Both are compared, in full, whatever the first comparison says: the time tells nothing.
    is_user, is_admin = (_same(key, known) for known in (config.api_key, config.admin_api_key))
    if scheme.lower() != b"bearer":
        is_user = is_admin = False
    owner = (config.api_key if is_user else config.admin_api_key if is_admin else None) or ""
    if path in OPEN_PATHS or (config.api_key is None and not (admin and config.admin_api_key)):
        return owner
    if not (is_user or is_admin):
        raise AuthenticationFailed(
            "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            if given
            else "This server needs an API key here; send it as 'Authorization: Bearer KEY'."
        )
    if admin and config.admin_api_key is not None and not is_admin:
        raise AdminRequired(
            "What changes the model for everybody needs the admin key (--admin-api-key) of this server."
        )
    return owner


def needs_admin(path: str) -> bool:
    """Whether requests to a path change the server for everybody."""
    return path in ADMIN_PATHS or path == UPLOAD_PATH or path.startswith(UPLOAD_PATH + "/")


def _same(given: bytes, known: str | None) -> bool:
    # Equal-length digests: the comparison's time tells neither the key nor its length.
    return hmac.compare_digest(_digest(given.strip()), _digest((known or "").encode())) and known is not None


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def has_body(headers: Headers) -> bool:
    """Whether the client announced a body."""
    length = get(headers, b"content-length")
    return get(headers, b"transfer-encoding") is not None or (length is not None and length.strip() != b"0")


def check_body_headers(method: str, path: str, headers: Headers, limit: int) -> None:
    """Type and announced length (bytes) of a body.

    A page of another site can post forms and plain text anywhere without asking; JSON it cannot. Where forms are read,
    `check_origin` has refused such pages: browsers name the origin of every POST.
    Raises: UnsupportedMediaType, BodyTooLarge.
    """
    if method in ("POST", "PUT", "PATCH"):
        kind = (get(headers, b"content-type") or b"").decode("latin-1").partition(";")[0].strip().lower()
        wanted = _TYPES.get(path, ("application/json",))
        if kind not in wanted:
            what = {UPLOAD_PATH: "the bytes of a safetensors file", TENSORS_PATH: "a form"}.get(path, "JSON")
            shown = " or ".join(f"'Content-Type: {name}'" for name in wanted)
            raise UnsupportedMediaType(f"Send the body as {what}, with the header {shown}.")
        if (get(headers, b"content-encoding") or b"identity").lower() != b"identity":
            raise UnsupportedMediaType("Compressed request bodies are not read; send the JSON as it is.")
    length = get(headers, b"content-length")
    if length is not None and length.isdigit() and int(length[:32]) > limit:
        raise body_too_large(limit)


_TYPES = {UPLOAD_PATH: (UPLOAD_TYPE,), TENSORS_PATH: (FORM_TYPE,), VIDEOS_PATH: ("application/json", FORM_TYPE)}


def body_limit(path: str, config: ServerConfig) -> int:
    """Bytes that a body may have."""
    size = {
        UPLOAD_PATH: config.max_upload_mb,
        TENSORS_PATH: config.max_upload_mb,
        VIDEOS_PATH: config.max_body_mb + 4 / 3 * config.max_picture_mb,  # in JSON, three bytes are four letters
    }
    return int(size.get(path, config.max_body_mb) * 2**20)


def bytes_per_second(path: str) -> float:
    """How fast a body must come at least to be given more time than --body-timeout-s; infinite: it is given none."""
    return 65_536.0 if path in (UPLOAD_PATH, TENSORS_PATH, VIDEOS_PATH) else math.inf


def body_too_large(limit: int) -> BodyTooLarge:
    """The error for a body of more than `limit` bytes."""
    return BodyTooLarge(
        f"The body is larger than {limit / 2**20:g} MiB, the limit of this server (--max-body-mb, --max-picture-mb and "
        "--max-upload-mb)."
    )
