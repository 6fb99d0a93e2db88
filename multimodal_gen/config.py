"""Settings: one schema becomes the CLI flags, the MMGEN_* variables, the --config file and `from_pretrained` keywords.

`settings.py` settles their values; a field may name the function that reads what was written (`extra={"parse": …}`).
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from multimodal_gen.errors import ConfigError
from multimodal_gen.offload import parse_components, parse_pin, parse_prefetch
from multimodal_gen.step_cache import NONE, parse_step_cache
from multimodal_gen.units import parse_size

DEFAULT_MODEL = "emoji-image"
NO_MODEL = "none"

Positive = Meta(gt=0)
# A bound belongs to the number, not to the union with None around it: msgspec refuses it there.
AtLeastOne = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to load one model and run it; the same for the server, the CLI and `DiffGenerator`."""

    model_path: Annotated[
        str,
        Meta(
            description="bundled model name, local folder, or hub repository id; none: no pictures, the default "
            "where --llm-path is given"
        ),
    ] = DEFAULT_MODEL
    revision: Annotated[str | None, Meta(description="hub revision (branch, tag or commit)")] = None
    local_files_only: Annotated[bool, Meta(description="never download a model")] = False
    device: Annotated[str, Meta(description="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="weights and activations; auto = the fastest that the device computes natively"),
    ] = "auto"
    quantize: Annotated[
        Literal["none", "int8", "fp8", "int8-weights", "int4-weights"],
        Meta(
            description="the transformer's weights in fewer bits; int8 and fp8 (on GPUs) multiply in 8 bits, the "
            "others widen the weights; approximate"
        ),
    ] = "none"
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
        AtLeastOne | None,
        Meta(description="CPU threads of each worker; default: the cores that it may use, shared out"),
    ] = None
    attention_backend: Annotated[str, Meta(description="auto or a name from `mmgen doctor`")] = "auto"
    kernels: Annotated[
        Literal["auto", "torch"],
        Meta(description="fused operations: auto = ours where they can be had and win, torch = none of ours"),
    ] = "auto"
    compile: Annotated[
        bool,
        Meta(description="compile the repeated layers of picture and video models (torch.compile) at their first step"),
    ] = False
    cuda_graphs: Annotated[
        bool,
        Meta(description="record those layers once per batch shape and replay them, on CUDA; weights must stay there"),
    ] = False
    deterministic: Annotated[
        bool, Meta(description="bit-equal results whoever shares the batch: every output gets its own forward")
    ] = False
    step_cache: Annotated[
        str,
        Meta(
            description="denoising steps extrapolated instead of computed, where a request does not say: none, "
            "first-block or taylor, or METHOD:KEY=VALUE,… as in taylor:interval=3; approximate",
            extra={"parse": parse_step_cache},
        ),
    ] = NONE
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
        bool, Meta(description="decode large pictures and frames by tiles, which ranks share; approximate for pictures")
    ] = False
    offload: Annotated[
        Literal["auto", "none", "layerwise", "component"],
        Meta(description="what leaves the device while it is not needed; auto = nothing where all fits, else the best"),
    ] = "auto"
    offload_components: Annotated[
        list[str],
        Meta(
            description="what may leave the device: NAME, or NAME=resident, NAME=streamed, NAME=parked to say how",
            extra={"parse": parse_components},
        ),
    ] = []
    prefetch_layers: Annotated[
        str,
        Meta(
            description="layers that a stream fetches ahead of the one that computes: a number, or a size as in 1.5GB",
            extra={"parse": parse_prefetch},
        ),
    ] = "1"
    resident_layers: Annotated[
        NotNegative | None, Meta(description="layers of a streamed transformer that stay; default: as many as fit")
    ] = None
    device_memory_limit: Annotated[
        int | None,
        Meta(
            description="memory for weights and work on each device (12GB, 1.5GiB); default: what is free",
            extra={"parse": parse_size},
        ),
    ] = None
    host_memory_limit: Annotated[
        int | None,
        Meta(
            description="RAM for weights beyond the device, on a CPU for cached model files; default: what is free",
            extra={"parse": parse_size},
        ),
    ] = None
    pin_memory: Annotated[
        int | None,
        Meta(
            description="how much of that is page-locked for fast copies to a GPU; default auto: at most half of it",
            extra={"parse": parse_pin},
        ),
    ] = None
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
    llm_path: Annotated[
        str | None,
        Meta(description="language model: a folder, a GGUF file, a hub repository id, or smollm2; default: none"),
    ] = None
    llm_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(description="the language model's weights and activations; auto = the fastest that is computed natively"),
    ] = "auto"
    llm_quantize: Annotated[
        Literal["none", "int8", "int8-weights", "int4-weights"],
        Meta(
            description="the language model's weights in fewer bits, on a CPU: int8 multiplies in 8 bits, too, the "
            "others widen the weights; slightly approximate"
        ),
    ] = "none"
    max_context: Annotated[
        AtLeastOne | None,
        Meta(description="tokens of a prompt and its answer; default: what the language model allows"),
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        Meta(
            description="memory for keys and values of text (1GB, 512MiB); default: what requests may need, "
            "at most a fifth of what is free",
            extra={"parse": parse_size},
        ),
    ] = None
    kv_page_size: Annotated[int, Meta(ge=1, le=256, description="tokens per page of keys and values")] = 16
    prefix_cache: Annotated[
        bool, Meta(description="keep the keys and values of prompts for requests that begin alike")
    ] = True
    chunked_prefill_size: Annotated[
        AtLeastOne | None,
        Meta(description="tokens of one text step; longer prompts are read in pieces; default: by device"),
    ] = None
    max_running_requests: Annotated[int, Meta(ge=1, description="texts that are written at once, choices counted")] = 64
    max_queued_requests: Annotated[int, Meta(ge=1, description="text requests that may wait; more is answered 429")] = (
        512
    )
    schedule_policy: Annotated[
        Literal["fcfs", "lpm", "routing-key", "priority"],
        Meta(
            description="which waiting text request starts next: the first (fcfs), the longest cached prompt "
            "(lpm), the routing key that most running ones have, or the highest priority"
        ),
    ] = "fcfs"
    tpot_budget_ms: Annotated[
        float, Positive, Meta(description="time per token of text that pictures made beside it may stretch it to")
    ] = 150.0
    max_loras_per_batch: Annotated[
        int, Meta(ge=1, description="different adapters in one text step, the base model counted as one")
    ] = 8
    max_loaded_loras: Annotated[
        AtLeastOne | None, Meta(description="adapters of the language model in memory; default: as --max-loras")
    ] = None
    lora_paths: Annotated[
        list[str],
        Meta(description="adapters of the language model to load from the start: NAME=PATH, or NAME=PATH:pinned"),
    ] = []
    scheduler_status_target: Annotated[
        str | None,
        Meta(description="where the scheduler of each worker tells what runs and waits: stdout, or a folder"),
    ] = None
    scheduler_status_interval_s: Annotated[float, Positive, Meta(description="time between two of those lines")] = 60.0
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
    grammar_timeout_s: Annotated[float, Positive, Meta(description="time for compiling a schema, regex or grammar")] = (
        1.5
    )
    tool_call_parser: Annotated[
        str, Meta(description="how the model writes tool calls: auto, none, or a name from `mmgen models`")
    ] = "auto"
    reasoning_parser: Annotated[
        str, Meta(description="how the model marks its reasoning: auto, none, or a name from `mmgen models`")
    ] = "auto"
    enhance_timeout_s: Annotated[
        float, Positive, Meta(description="time for enhance_prompt; then the prompt is used as it was written")
    ] = 20.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="log verbosity")] = "info"


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
    values = msgspec.structs.asdict(config)
    return EngineConfig(**{field.name: values[field.name] for field in msgspec.structs.fields(EngineConfig)})
