"""Settings: one schema becomes the CLI flags, the MMGEN_* variables, the --config file and `from_pretrained` keywords.

A field `max_batch_tokens` is the flag `--max-batch-tokens`, the variable `MMGEN_MAX_BATCH_TOKENS`, the YAML key and
the keyword `max_batch_tokens`. Order of precedence: flag > variable > file > default. Nothing else reads our variables.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from multimodal_gen.errors import ConfigError, did_you_mean

ENV_PREFIX = "MMGEN_"
DEFAULT_MODEL = "emoji-image"

Positive = Meta(gt=0)
# A bound belongs to the number, not to the union with None around it: msgspec refuses it there.
AtLeastOne = Annotated[int, Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to load one model and run it; the same for the server, the CLI and `DiffGenerator`."""

    model_path: Annotated[str, Meta(description="bundled model name, local folder, or hub repository id")] = (
        DEFAULT_MODEL
    )
    revision: Annotated[str | None, Meta(description="hub revision (branch, tag or commit)")] = None
    local_files_only: Annotated[bool, Meta(description="never download a model")] = False
    device: Annotated[str, Meta(description="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="weights and activations; auto = the fastest that the device computes natively"),
    ] = "auto"
    num_gpus: Annotated[
        AtLeastOne | None, Meta(description="worker ranks of all replicas; default: the product of the sizes below")
    ] = None
    tp_size: Annotated[int, Meta(ge=1, description="ranks that share every layer's weights (tensor parallel)")] = 1
    ulysses_degree: Annotated[
        AtLeastOne | None,
        Meta(description="ranks that share a sequence and swap it for heads; default: what --num-gpus leaves"),
    ] = None
    ring_degree: Annotated[
        AtLeastOne | None,
        Meta(description="ranks that share a sequence and pass keys around; default: what heads leave of --num-gpus"),
    ] = None
    enable_cfg_parallel: Annotated[
        bool, Meta(description="two groups of ranks, one for the prompt and one for the negative prompt")
    ] = False
    dp_size: Annotated[int, Meta(ge=1, description="replicas of the model, each with its own ranks")] = 1
    executor: Annotated[
        Literal["process", "ray"],
        Meta(description="where ranks run: processes of this machine, or actors on the machines of a Ray cluster"),
    ] = "process"
    threads: Annotated[
        AtLeastOne | None, Meta(description="CPU threads of each worker; default: all cores, shared out")
    ] = None
    attention_backend: Annotated[str, Meta(description="auto or a name from `mmgen doctor`")] = "auto"
    deterministic: Annotated[
        bool, Meta(description="bit-equal results whoever shares the batch: every output gets its own forward")
    ] = False
    max_batch_tokens: Annotated[
        AtLeastOne | None, Meta(description="transformer tokens per denoising step; default: by device")
    ] = None
    max_request_cost: Annotated[
        int, Meta(ge=1, description="largest request, in token-steps (tokens x steps x outputs)")
    ] = 10_000_000
    max_queue_cost: Annotated[
        int, Meta(ge=1, description="token-steps that may wait or run at once; more is answered 429")
    ] = 40_000_000
    condition_cache_mb: Annotated[int, Meta(ge=0, description="memory for encoded prompts; 0 turns the cache off")] = (
        256
    )
    text_kv_cache: Annotated[
        bool,
        Meta(description="keep what cross-attention makes of a request's text between steps; off saves its memory"),
    ] = True
    vae_tiling: Annotated[
        bool, Meta(description="decode large pictures by overlapping tiles, which ranks share; slightly approximate")
    ] = False
    max_consecutive_errors: Annotated[
        int, Meta(ge=1, description="failures in a row after which the worker is declared sick and restarted")
    ] = 3
    step_timeout_s: Annotated[
        float, Positive, Meta(description="a worker silent for this long while it has work is killed and restarted")
    ] = 600.0
    load_timeout_s: Annotated[
        float, Positive, Meta(description="a worker that has not loaded the model by then is killed and restarted")
    ] = 1800.0
    lora_root: Annotated[
        list[str],
        Meta(description="folders that adapters may be loaded from; default of the server: loras/ where it started"),
    ] = []
    lora: Annotated[
        list[str],
        Meta(description="adapters to use from the start: NAME=PATH[:STRENGTH[:TARGET]][:alpha=ALPHA][:partial]"),
    ] = []
    lora_merge_mode: Annotated[
        Literal["auto", "merge", "dynamic"], Meta(description="how adapters are applied where a change does not say")
    ] = "auto"
    max_loras: Annotated[int, Meta(ge=0, description="adapters loaded at once; 0 refuses all")] = 64
    max_lora_mb: Annotated[int, Meta(ge=1, description="memory for the tensors of all loaded adapters")] = 4096
    max_lora_rank: Annotated[int, Meta(ge=1, description="largest rank of an adapter's modules")] = 1024
    fault: Annotated[
        str | None, Meta(description="tests only: STAGE:ACTION:COUNT[@RANK], injects a failure into the workers")
    ] = None


class ServerConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`mmgen serve`: the engine's settings and those of the HTTP front."""

    host: Annotated[str, Meta(description="address to bind; anything but loopback needs an API key")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to bind; 0 takes a free one")] = 30000
    api_key: Annotated[str | None, Meta(description="clients must send it as a bearer token; prefer the variable")] = (
        None
    )
    admin_api_key: Annotated[
        str | None,
        Meta(description="loading and switching adapters asks for this key; default: the API key; prefer the variable"),
    ] = None
    served_model_name: Annotated[str | None, Meta(description="id in /v1/models; default: the model's name")] = None
    allowed_hosts: Annotated[
        list[str], Meta(description="Host headers accepted besides loopback names and the bound address")
    ] = []
    allowed_origins: Annotated[list[str], Meta(description="browser origins allowed to call (CORS)")] = []
    max_body_mb: Annotated[float, Positive, Meta(description="largest request body")] = 1.0
    max_upload_mb: Annotated[float, Positive, Meta(description="largest adapter that may be uploaded")] = 1024.0
    max_picture_mb: Annotated[float, Positive, Meta(description="largest picture that a request may carry")] = 50.0
    data_dir: Annotated[
        str | None,
        Meta(description="folder of video jobs and their files; default: mmgen/ in the user's folder for data"),
    ] = None
    max_jobs: Annotated[int, Meta(ge=1, description="videos that may wait or run; more is answered 429")] = 1000
    job_ttl_s: Annotated[float, Positive, Meta(description="time that a finished video stays downloadable")] = 86400.0
    checkpoint_every: Annotated[
        int, Meta(ge=0, description="denoising steps between the checkpoints of a video; 0 writes none")
    ] = 5
    body_timeout_s: Annotated[float, Positive, Meta(description="time for a client to send its request")] = 30.0
    max_priority: Annotated[
        int, Meta(ge=-100, le=100, description="highest priority that an HTTP request may ask for")
    ] = 0
    unknown_fields: Annotated[
        Literal["error", "warn"], Meta(description="unknown JSON fields: 400, or 200 with an x-mmgen-warning header")
    ] = "error"
    max_connections: Annotated[int, Meta(ge=1, description="open connections; more are answered 503")] = 1000
    drain_timeout_s: Annotated[float, Meta(ge=0, description="time for running requests to finish at SIGTERM")] = 25.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="log verbosity")] = "info"


Settings = TypeVar("Settings", bound=msgspec.Struct)


class Option(msgspec.Struct, frozen=True):
    """One settings field as a face of the program sees it."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The CLI flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.type is bool

    @property
    def is_list(self) -> bool:
        """Whether the flag may be repeated."""
        return get_origin(self.type) is list

    @property
    def choices(self) -> tuple[str, ...] | None:
        """Allowed words, where the type is a Literal."""
        return get_args(self.type) if get_origin(self.type) is Literal else None

    @property
    def is_secret(self) -> bool:
        """Whether the value must not be shown."""
        return self.name in ("api_key", "admin_api_key")


class Setting(msgspec.Struct, frozen=True):
    """One settled setting and where its value came from."""

    option: Option
    value: Any
    origin: str
    """`arguments`, the name of a variable, the path of the file, or `default`"""

    @property
    def shown(self) -> Any:
        """The value as it may be printed."""
        return "(hidden)" if self.option.is_secret and self.value is not None else self.value


def options(schema: type[msgspec.Struct]) -> list[Option]:
    """The fields of a settings class, in declaration order."""
    hints = get_type_hints(schema, include_extras=True)
    found = []
    for field in msgspec.structs.fields(schema):
        hint = hints[field.name]
        text = next(m.description for m in hint.__metadata__ if m.description)
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        found.append(Option(field.name, hint.__origin__, default, text))
    return found


def load(
    schema: type[Settings],
    given: Mapping[str, Any],
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Settle all settings of `schema` from keywords or flags, the environment, a YAML file and the defaults.

    A keyword that is None, an empty variable and an empty YAML value count as not given.
    Raises: ConfigError naming the option, where its value came from, and what is allowed.
    """
    return schema(**{s.option.name: s.value for s in settle(schema, given, file=file, environ=environ)})


def settle(
    schema: type[msgspec.Struct],
    given: Mapping[str, Any],
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Setting]:
    """What `load` settles, with the origin of every value, in declaration order. Raises as `load`."""
    known = {option.name: option for option in options(schema)}
    settled = {name: Setting(option, option.default, "default") for name, option in known.items()}
    for found in (
        _from_file(file, known) if file else [],
        _from_environment(os.environ if environ is None else environ, known),
        _from_arguments(given, known),
    ):
        for name, value, origin in found:
            settled[name] = Setting(known[name], _convert(known[name], value, schema, origin), origin)
    return list(settled.values())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`; names other than localhost are not trusted."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_bind(config: ServerConfig) -> None:
    """Refuse to serve other machines without a key. Raises: ConfigError."""
    for name, key in (("api_key", config.api_key), ("admin_api_key", config.admin_api_key)):
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} must be printable ASCII without spaces around it: it travels in an HTTP header.", param=name
            )
    if config.api_key is None and not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} lets other machines in, and no API key is set. Set MMGEN_API_KEY (or --api-key), "
            "or bind 127.0.0.1.",
            param="host",
        )


Found = Iterable[tuple[str, Any, str]]  # name, value, origin


def _from_arguments(given: Mapping[str, Any], known: Mapping[str, Option]) -> Found:
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"Unknown setting {name!r}." + did_you_mean(name, known), param=name)
        if value is not None:
            yield name, os.fspath(value) if isinstance(value, os.PathLike) else value, "arguments"


def _from_environment(environ: Mapping[str, str], known: Mapping[str, Option]) -> Found:
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name not in _all_names():
            raise ConfigError(
                f"Unknown environment variable {variable}."
                + did_you_mean(variable, [ENV_PREFIX + n.upper() for n in _all_names()]),
                param=name,
            )
        if name in known and value:
            yield name, value, variable


def _from_file(path: str | Path, known: Mapping[str, Option]) -> Found:
    for key, value in _read_file(path).items():
        name = str(key).replace("-", "_")
        # One file may serve `mmgen serve` and `mmgen generate`, which has no server settings.
        if name not in _all_names():
            raise ConfigError(f"Unknown setting {str(key)!r} in {path}." + did_you_mean(name, _all_names()), param=name)
        if name in known and value is not None:
            yield name, value, str(path)


def _all_names() -> list[str]:
    return [field.name for field in msgspec.structs.fields(ServerConfig)]


def _convert(option: Option, value: Any, schema: type[msgspec.Struct], origin: str) -> Any:
    hint = get_type_hints(schema, include_extras=True)[option.name]
    if option.is_list and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        converted = msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(option, value, origin, str(error)) from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise _invalid(option, value, origin, "Expected a finite number")
    return converted


def _invalid(option: Option, value: Any, origin: str, why: str) -> ConfigError:
    shown = "the given value" if option.is_secret else repr(value)[:80]
    source = "" if origin == "arguments" else f" (from {origin})"
    if option.choices:
        why = f"choose one of {', '.join(option.choices)}.{did_you_mean(str(value), option.choices)}"
    elif option.is_switch:
        why = "it is true or false."
    else:
        why = f"{why[0].lower()}{why[1:].replace('`', '')}. It is: {option.help}."
    return ConfigError(f"{option.flag} cannot be {shown}{source}: {why}", param=option.name)


def _read_file(path: str | Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"Cannot read the configuration file {path}: {reason}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"The configuration file {path} must hold a mapping of setting names to values.")
    return content


def data_folder(config: ServerConfig) -> Path:
    """Where this server keeps what must outlive it. Raises: ConfigError when nobody says and there is no home."""
    base = os.environ.get("XDG_DATA_HOME", "")
    try:
        if config.data_dir is not None:
            return Path(config.data_dir).expanduser()
        return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share") / "mmgen"
    except RuntimeError:
        raise ConfigError("This user has no home folder; say where with --data-dir.", param="data_dir") from None


def engine_part(config: EngineConfig) -> EngineConfig:
    """The engine's share of the settings: what a worker needs to know, and nothing of the front's secrets."""
    return EngineConfig(
        **{option.name: msgspec.structs.asdict(config)[option.name] for option in options(EngineConfig)}
    )
