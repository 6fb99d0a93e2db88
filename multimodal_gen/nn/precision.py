"""Which device and which dtype, decided once.

A CPU without bf16 instructions emulates bf16 matrix products at about a tenth of its float32 speed, so `auto` asks the
processor, not the taste of the checkpoint.
"""

from __future__ import annotations

import functools

import torch

from multimodal_gen.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises ConfigError for one that is absent."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N.", param="device")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"--device {name!r} was asked for and {count} CUDA devices are visible.", param="device")
        return torch.device("cuda", device.index or 0)
    return device


@functools.cache
def native_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix instructions (AMX or AVX512-BF16 on x86)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device computes it natively, else float32: float16 overflows in many of these models."""
    if name == "auto":
        return torch.bfloat16 if native_bf16(device) else torch.float32
    return DTYPES[name]


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to multiply tensors stored as `dtype`: float32 where half precision is only emulated."""
    if device.type == "cpu" and dtype != torch.float32 and not (dtype == torch.bfloat16 and native_bf16(device)):
        return torch.float32
    return dtype
