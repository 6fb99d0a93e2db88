"""3x3 convolutions over frames in channels-last order, one frame or several that follow one another: for VAEs.

On a CPU by Winograd's minimal filtering F(4x4, 3x3) (Winograd, 1980; Lavin and Gray, 2016): a quarter of the products,
in float32, whatever the pixels are kept in. On Zen 5 that is 2 to 4 times as fast as oneDNN's direct convolutions in
float32, and 1.1 to 1.2 times as fast as those in bfloat16. Rounding: some eight times that of a direct float32 sum,
a few parts in a million.

The filters in the other basis are four times as large as the weight. `filters` makes them for whoever uses them more
than once; else they are made on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.kernels import native

ROWS = (
    128  # tiles of all frames that a thread has in hand: below it filters are read too often, above it caches overflow
)
BF16_CHANNELS, CHANNELS = 64, 32  # with fewer the way to the basis and back costs more than it saves
POINTS, WIDTH, SLACK = 36, 16, 12  # as in cpu/conv3x3.cpp

_conv3x3 = native.Function("conv3x3", "ppppppiiiiiiiiii")
_filters = native.Function("conv3x3_filters", "ppiii")


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    history: int = 0,
    residual: Tensor | None = None,
    double: bool = False,
    filters: Tensor | None = None,
) -> Tensor:
    """Frames → frames, with zeros around every frame and before the first one.

    Args:
        x: [history + F, H, W, in]; the first `history` frames are those before, of which nothing is made.
        weight: [out, in, taps, 3, 3]; frame f is made of frames f - taps + 1 … f.
        bias: [out].
        residual: [F, H', W', out], added.
        double: every pixel of x counts as 2 x 2: a nearest-neighbour upsampling comes first.
        filters: what `make_filters` makes of the weight; None: they are made where they are worth it.

    Returns: [F, H', W', out].
    """
    _check(x, weight, bias, history)
    compute = None if _direct_wins(weight) else _conv3x3.of(x)
    if compute is None:
        return reference(x, weight, bias, history=history, residual=residual, double=double)
    frames, height, width, channels = len(x) - history, x.shape[1] << double, x.shape[2] << double, x.shape[3]
    out, _, taps, _, _ = weight.shape
    tiles, threads = -(-height // 4) * -(-width // 4), torch.get_num_threads()
    if filters is None:
        if tiles * frames < _least_tiles(weight):
            return reference(x, weight, bias, history=history, residual=residual, double=double)
        filters = make_filters(weight)
    assert filters is not None, "filters are made where convolutions are"
    x, bias = x.contiguous(), bias.float().contiguous()
    y = x.new_empty(frames, height, width, out)
    if residual is not None:
        assert residual.shape == y.shape, (residual.shape, y.shape)
        assert residual.dtype == x.dtype, (residual.dtype, x.dtype)
        residual = residual.contiguous()
    block, copies = _blocks(tiles, frames, threads)
    rows = ((history + frames) * block + SLACK) * _wide(channels) + (frames * block + SLACK) * _wide(out)
    scratch = torch.empty(copies * POINTS * (rows + 2 * WIDTH), dtype=torch.float32, device=x.device)
    compute(
        x.data_ptr(), filters.data_ptr(), bias.data_ptr(), 0 if residual is None else residual.data_ptr(),
        y.data_ptr(), scratch.data_ptr(), frames, history, taps, height, width, channels, out, double, block, threads,
    )  # fmt: skip
    return y


def make_filters(weight: Tensor) -> Tensor | None:
    """The weight [out, in, taps, 3, 3] in the basis of the products; None where convolutions are direct."""
    make = None if _direct_wins(weight) else _filters.of(weight)
    if make is None:
        return None
    out, channels, taps, _, _ = weight.shape
    filters = torch.empty(filters_bytes(weight) // 4, dtype=torch.float32, device=weight.device)
    make(weight.contiguous().data_ptr(), filters.data_ptr(), out, channels, taps)
    return filters


def filters_bytes(weight: Tensor) -> int:
    """What `make_filters` would take."""
    out, channels, taps, _, _ = weight.shape
    return 4 * POINTS * _wide(out) * _wide(channels) * taps


def _direct_wins(weight: Tensor) -> bool:
    """Where torch's convolution was measured to be faster, or would be: there is no processor with AMX here."""
    out, channels, taps, _, _ = weight.shape
    if weight.dtype is torch.bfloat16:
        return min(out, channels) < BF16_CHANNELS or torch.cpu._is_amx_tile_supported()
    return taps == 1 and channels < CHANNELS


def _least_tiles(weight: Tensor) -> int:
    """For which filters that are used once are worth making. Measured from 128 to 512 channels on a Zen 5."""
    return weight.shape[1] if weight.dtype is torch.bfloat16 else 48


def _blocks(tiles: int, frames: int, threads: int) -> tuple[int, int]:
    """Tiles in a block, and how many blocks are worked on at once."""
    block = -(-ROWS // frames)
    if tiles < 2 * threads * block and tiles * frames <= 4 * ROWS:
        return tiles, 1  # little to do: all threads share it
    blocks = -(-tiles // block)
    blocks = -(-blocks // threads) * threads
    return -(-tiles // blocks), threads


def _wide(channels: int) -> int:
    return -(-channels // WIDTH) * WIDTH


def _check(x: Tensor, weight: Tensor, bias: Tensor, history: int) -> None:
    assert x.dim() == 4, x.shape
    assert weight.dim() == 5, weight.shape
    assert weight.shape[3:] == (3, 3), weight.shape
    assert x.shape[3] == weight.shape[1], (x.shape, weight.shape)
    assert bias.shape == weight.shape[:1], (bias.shape, weight.shape)
    assert 0 <= history < min(len(x), weight.shape[2]), (history, x.shape, weight.shape)
    assert x.dtype == weight.dtype == bias.dtype, (x.dtype, weight.dtype, bias.dtype)
    assert x.device == weight.device == bias.device, (x.device, weight.device, bias.device)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    history: int = 0,
    residual: Tensor | None = None,
    double: bool = False,
) -> Tensor:
    """The same by torch's convolution."""
    taps, pixels = weight.shape[2], x.permute(0, 3, 1, 2)
    if double:
        pixels = F.interpolate(pixels, scale_factor=2.0, mode="nearest")
    if taps == 1:
        y = F.conv2d(pixels, weight[:, :, 0], bias, padding=1)
    else:
        pixels = F.pad(pixels.transpose(0, 1), (0, 0, 0, 0, taps - 1 - history, 0))
        y = F.conv3d(pixels[None], weight, bias, padding=(0, 1, 1))[0].transpose(0, 1)
    y = y.permute(0, 2, 3, 1).contiguous()
    return y if residual is None else y.add_(residual)
