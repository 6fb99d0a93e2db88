"""GPUs by name, for plans made on another machine. No torch here.

Speeds are what long bf16 products and copies from page-locked memory reach in practice, about six tenths of the data
sheet's dense figure: good for saying whether copies hide behind compute, not for comparing cards.
"""

from __future__ import annotations

from dataclasses import dataclass

from multimodal_gen.errors import ConfigError, did_you_mean
from multimodal_gen.memory.estimate import Rates
from multimodal_gen.units import parse_size

GB = 10**9
FILE_RATE = 3e9  # bytes per second


@dataclass(frozen=True)
class Gpu:
    """One row of the table."""

    memory: int  # bytes
    flops: float  # per second
    copies: float  # bytes per second from page-locked memory

    @property
    def rates(self) -> Rates:
        """With a machine around it as is usual: copies from other memory at half the speed, an NVMe disk."""
        return Rates(self.flops, self.copies, self.copies / 2, FILE_RATE)


_PCIE3, _PCIE4, _PCIE5 = 12e9, 25e9, 50e9

GPUS = {
    "t4": Gpu(16 * GB, 25e12, _PCIE3),
    "l4": Gpu(24 * GB, 60e12, _PCIE4),
    "l40s": Gpu(48 * GB, 200e12, _PCIE4),
    "a10": Gpu(24 * GB, 70e12, _PCIE4),
    "a40": Gpu(48 * GB, 90e12, _PCIE4),
    "a100-40gb": Gpu(40 * GB, 200e12, _PCIE4),
    "a100-80gb": Gpu(80 * GB, 200e12, _PCIE4),
    "h100": Gpu(80 * GB, 550e12, _PCIE5),
    "h200": Gpu(141 * GB, 550e12, _PCIE5),
    "b200": Gpu(180 * GB, 1200e12, _PCIE5),
    "rtx-3060": Gpu(12 * GB, 16e12, _PCIE4),
    "rtx-3090": Gpu(24 * GB, 42e12, _PCIE4),
    "rtx-4060-ti-16gb": Gpu(16 * GB, 27e12, _PCIE4 / 2),
    "rtx-4070": Gpu(12 * GB, 36e12, _PCIE4),
    "rtx-4080": Gpu(16 * GB, 60e12, _PCIE4),
    "rtx-4090": Gpu(24 * GB, 105e12, _PCIE4),
    "rtx-5070-ti": Gpu(16 * GB, 55e12, _PCIE5),
    "rtx-5080": Gpu(16 * GB, 70e12, _PCIE5),
    "rtx-5090": Gpu(32 * GB, 130e12, _PCIE5),
    "rtx-a6000": Gpu(48 * GB, 90e12, _PCIE4),
    "rtx-6000-ada": Gpu(48 * GB, 200e12, _PCIE4),
    "rtx-pro-6000": Gpu(96 * GB, 250e12, _PCIE5),
}


def find_gpu(text: str) -> tuple[str, Gpu | None, int]:
    """(name to show, its row if it has one, bytes) of a name in the table, or of a size. Raises: ConfigError."""
    name = "-".join(text.lower().replace("_", " ").split())
    if name in GPUS:
        return name, GPUS[name], GPUS[name].memory
    if text[:1].isdigit():
        try:
            return f"a GPU of {text}", None, parse_size(text)
        except ValueError as error:
            raise ConfigError(f"--gpu cannot be {text[:40]!r}: {error}.", param="gpu") from None
    raise ConfigError(
        f"--gpu {text[:40]!r} is not in the table.{did_you_mean(name, GPUS)} Say how much memory it has, as in 24GB, "
        f"or one of {', '.join(GPUS)}.",
        param="gpu",
    )
