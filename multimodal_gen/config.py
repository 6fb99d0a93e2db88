"""Settings: one schema becomes the CLI flags, the MMGEN_* variables, the --config file and `from_pretrained` keywords.

A field `max_batch_tokens` is the flag `--max-batch-tokens`, the variable `MMGEN_MAX_BATCH_TOKENS`, the YAML key and
the keyword `max_batch_tokens`. Order of precedence: flag > variable > file > default. This module is the only reader
of the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_type_hints

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
    revision: Annotated[Union[str, None], Meta(description="hub revision (branch, tag or commit)")] = None
    local_files_only: Annotated[bool, Meta(description="never download a model")] = False
    device: Annotated[str, Meta(description="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="weights and activations; auto = the fastest that the device computes natively"),
    ] = "auto"
    num_gpus: Annotated[int, Meta(ge=1, description="worker ranks; only 1 is built so far")] = 1
    threads: Annotated[Union[AtLeastOne, None], Meta(description="CPU threads of the worker; default: all cores")] = None
    attention_backend: Annotated[str, Meta(description="auto or a name from `mmgen doctor`")] = "auto"
    deterministic: Annotated[
        bool, Meta(description="bit-equal results whoever shares the batch: every image gets its own forward")
    ] = False
    max_batch_tokens: Annotated[
        Union[AtLeastOne, None], Meta(description="transformer tokens per denoising step; default: by device")
    ] = None
    max_request_cost: Annotated[
        int, Meta(ge=1, description="largest request, in token-steps (tokens x steps x images)")
    ] = 5_000_000
    max_queue_cost: Annotated[
        int, Meta(ge=1, description="token-steps that may wait or run at once; more is answered 429")
    ] = 20_000_000
    condition_cache_mb: Annotated[int, Meta(ge=0, description="memory for encoded prompts; 0 turns the cache off")] = 256
    max_consecutive_errors: Annotated[
        int, Meta(ge=1, description="failures in a row after which the worker is declared sick and restarted")
    ] = 3
    fault: Annotated[
        Union[str, None], Meta(description="tests only: STAGE:ACTION:COUNT, injects a failure into the worker")
    ] = None


class ServerConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`mmgen serve`: the engine's settings and those of the HTTP front."""

    host: Annotated[str, Meta(description="address to bind; anything but loopback needs an API key")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to bind; 0 takes a free one")] = 30000
    api_key: Annotated[
        Union[str, None], Meta(description="clients must send it as a bearer token; prefer the variable")
    ] = None
    served_model_name: Annotated[Union[str, None], Meta(description="id in /v1/models; default: the model's name")] = (
        None
    )
    allowed_hosts: Annotated[
        list[str], Meta(description="Host headers accepted besides loopback names and the bound address")
    ] = []
    allowed_origins: Annotated[list[str], Meta(description="browser origins allowed to call (CORS)")] = []
    max_body_mb: Annotated[float, Positive, Meta(description="largest request body")] = 4.0
    body_timeout_s: Annotated[float, Positive, Meta(description="time for a client to send its request")] = 30.0
    unknown_fields: Annotated[
        Literal["error", "warn"], Meta(description="unknown JSON fields: 400, or 200 with an x-mmgen-warning header")
    ] = "error"
    max_connections: Annotated[int, Meta(ge=1, description="open connections; more are answered 503")] = 1000
    step_timeout_s: Annotated[
        float, Positive, Meta(description="a worker silent for this long while it has work is killed and restarted")
    ] = 600.0
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
        return self.type == list[str]

    @property
    def choices(self) -> tuple[str, ...] | None:
        """Allowed words, where the type is a Literal."""
        return self.type.__args__ if str(self.type).startswith("typing.Literal") else None


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

    Raises: ConfigError naming the option, where its value came from, and what is allowed.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    known = {option.name: option for option in options(schema)}
    for source, found in (
        (str(file), _read_file(file) if file else {}),
        ("environment", _read_environment(known, os.environ if environ is None else environ)),
        ("arguments", {k: v for k, v in given.items() if v is not None}),
    ):
        for name, value in found.items():
            if name not in known:
                raise ConfigError(
                    f"Unknown setting {name!r} in {source}." + did_you_mean(name, known), param=name
                )
            values[name], origin[name] = value, source
    for name, value in values.items():
        values[name] = _convert(known[name], value, schema, origin[name])
    return schema(**values)


def _convert(option: Option, value: Any, schema: type[msgspec.Struct], source: str) -> Any:
    hint = get_type_hints(schema, include_extras=True)[option.name]
    if option.is_list and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{option.flag} = {value!r} (from {source}) is not valid: {error}. It is: {option.help}.", param=option.name
        ) from None


def _read_environment(known: Mapping[str, Option], environ: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name in known:
            found[name] = value
        elif name not in _all_names():
            raise ConfigError(f"Unknown environment variable {variable}." + did_you_mean(name, known), param=name)
    return found


def _all_names() -> set[str]:
    return {option.name for schema in (EngineConfig, ServerConfig) for option in options(schema)}


def _read_file(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read the configuration file {path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of setting names to values.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
