"""Facts about this machine for `mmgen doctor`; imports torch."""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from multimodal_gen.attention import registry as attention
from multimodal_gen.config import EngineConfig
from multimodal_gen.kernels import native
from multimodal_gen.memory.free import host_memory
from multimodal_gen.nn.precision import DTYPES, native_bf16, resolve_device, resolve_dtype
from multimodal_gen.version import __version__

# Weights and what surrounds them, for families that are not planned: activations, the decoder's peak, allocator slack.
HEADROOM = 1.2

REQUIRED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")
# Instruction sets that matrix products live on, on x86 and Arm.
_MATRIX = re.compile(r"amx|avx2|avx512|bf16|f16c|fma|vnni|sve|dot|i8mm|neon|asimd")


def versions() -> dict[str, str]:
    """This package, Python, and the packages it stands on."""
    found = {"multimodal_gen": __version__, "python": platform.python_version()}
    return {**found, **{name: _version(name) or "missing" for name in REQUIRED}}


def cpu() -> dict[str, Any]:
    """The processor, its instruction sets and the threads that torch will use."""
    return {
        "model": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False) or 1,
        "logical_cores": psutil.cpu_count() or 1,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": sorted(
            n for n, has in torch.cpu.get_capabilities().items() if has is True and _MATRIX.search(n)
        ),
        "torch_threads": torch.get_num_threads(),
    }


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device: native dtypes and memory in bytes (None: it is the machine's)."""
    found = [_device(torch.device("cpu"), _cpu_model(), None, None)]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(_device(torch.device("cuda", index), torch.cuda.get_device_name(index), free, total))
    return found


def memory() -> dict[str, int]:
    """RAM in bytes, as this process may use it: a container's limit counts."""
    found = host_memory()
    return {"total_bytes": found.total, "free_bytes": found.free}


def chosen(config: EngineConfig) -> dict[str, Any]:
    """What these settings come to on this machine. Raises: ConfigError for a device or backend that is absent."""
    device = resolve_device(config.device)
    backend = attention.choose(config.attention_backend, device)
    return {
        "device": str(device),
        "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        "dtype_auto": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "attention_backend": backend.name,
        "attention_backends": attention.available(device),
        "kernels": _kernels(config, device),
    }


def _kernels(config: EngineConfig, device: torch.device) -> str:
    """Who computes the fused operations, and why not ours."""
    if config.kernels == "torch":
        return "torch (--kernels torch)"
    if device.type == "cuda":
        return "Triton" if importlib.util.find_spec("triton") else "torch (triton is not installed)"
    why = native.unavailable()
    return f"torch ({why})" if why else "compiled for this processor"


def estimate(parameters: int, dtype: str) -> int:
    """Bytes that a model of so many parameters needs in `dtype`."""
    return int(parameters * DTYPES[dtype].itemsize * HEADROOM)


def _device(device: torch.device, name: str, free: int | None, total: int | None) -> dict[str, Any]:
    native = ["float32"]
    if device.type == "cuda":
        native.append("float16")
    if native_bf16(device):
        native.append("bfloat16")
    return {"device": str(device), "name": name, "native_dtypes": native, "free_bytes": free, "total_bytes": total}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
