"""Tokens of Z-Image and of Wan2.2 A14B in both formats; sums of a feed-forward layer."""

from __future__ import annotations

import torch

from multimodal_gen.kernels.gpu.quantize_rows import finish, quantize_rows
from tests.kernels.ahead import Cases, Empty


def sums(empty: Empty) -> None:
    wide = torch.float32
    y = empty(4160, 20480)
    finish(empty(4160, 20480, dtype=torch.int32), empty(4160, dtype=wide), empty(20480, dtype=wide), y[0], y)


CASES: Cases = {
    "int8, 3840 wide": lambda empty: quantize_rows(empty(4160, 3840), torch.int8, 127.0),
    "e4m3, 3840 wide": lambda empty: quantize_rows(empty(4160, 3840), torch.float8_e4m3fn, 448.0),
    "e4m3, 13824 wide": lambda empty: quantize_rows(empty(4160, 13824), torch.float8_e4m3fn, 448.0),
    "sums": sums,
}
