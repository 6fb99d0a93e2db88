"""RMS norms of queries and keys, and their turn by position (Su et al., 2021), in place on the product that made them.

x [T, P, H, D] holds P parts of H heads, most often queries, keys and values; the first N of them are normalised and
turned, the others stay. Two layouts of what is turned together: neighbours (2i, 2i + 1), and halves (i, i + D/2).
Bytes: the N parts read and written once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from multimodal_gen.kernels import native
from multimodal_gen.kernels.norm_modulate import address, over_rms

Pairs = Literal["neighbours", "halves"]
MAX_DIM = 1024  # the largest D of the native function

_qk_norm_rope = native.Function("qk_norm_rope", "ppppiiiiiiif")


def qk_norm_rope_(
    x: Tensor,
    weight: Tensor,
    turns: Tensor | None,
    eps: float,
    *,
    pairs: Pairs = "neighbours",
    mean_square: Tensor | None = None,
) -> Tensor:
    """The first N parts of x become turn(x / rms(x) · weight), in float32, rounded once; returns x.

    Args:
        x: [T, P, H, D], tokens of any stride.
        weight: [N, D], norms of each head, or [N, H · D], norms over all heads of a part; N ≤ P. In the dtype of x.
        turns: float32 [T, 2, D / 2], cosines and sines of each token's angles; None: nothing is turned.
        eps: of the mean squares.
        pairs: which numbers are turned together.
        mean_square: float32 [T, N] over all heads, where other ranks hold some of them; None: made here.
    """
    _check(x, weight, turns, mean_square)
    if native.by_triton(x):
        from multimodal_gen.kernels.gpu import qk_norm_rope

        return qk_norm_rope.qk_norm_rope_(x, weight, turns, eps, pairs=pairs, mean_square=mean_square)
    compute = _qk_norm_rope.of(x)
    if compute is None or x.shape[3] > MAX_DIM:
        return reference_(x, weight, turns, eps, pairs=pairs, mean_square=mean_square)
    weight = weight.contiguous()
    turns = None if turns is None else turns.contiguous()
    mean_square = None if mean_square is None else mean_square.contiguous()
    tokens, _, heads, dim = x.shape
    across = mean_square is not None or weight.shape[1] != dim
    compute(
        x.data_ptr(),
        weight.data_ptr(),
        address(turns),
        address(mean_square),
        x.stride(0),
        tokens,
        len(weight),
        heads,
        dim,
        across,
        pairs == "halves",
        eps,
    )
    return x


def _check(x: Tensor, weight: Tensor, turns: Tensor | None, mean_square: Tensor | None) -> None:
    assert x.dim() == 4, x.shape
    tokens, parts, heads, dim = x.shape
    assert tokens == 0 or x[0].is_contiguous(), f"parts, heads and numbers lie side by side: {x.stride()}"
    assert weight.dim() == 2, weight.shape
    assert len(weight) <= parts, (weight.shape, x.shape)
    assert weight.shape[1] in (dim, heads * dim), (weight.shape, x.shape)
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    assert weight.device == x.device, (weight.device, x.device)
    if turns is not None:
        assert turns.shape == (tokens, 2, dim // 2), (turns.shape, x.shape)
        assert dim % 2 == 0, x.shape
        assert turns.dtype == torch.float32, turns.dtype
        assert turns.device == x.device, (turns.device, x.device)
    if mean_square is not None:
        assert weight.shape[1] == heads * dim, "norms of single heads have no mean square from outside"
        assert mean_square.shape == (tokens, len(weight)), (mean_square.shape, x.shape, weight.shape)
        assert mean_square.dtype == torch.float32, mean_square.dtype
        assert mean_square.device == x.device, (mean_square.device, x.device)


def reference_(
    x: Tensor,
    weight: Tensor,
    turns: Tensor | None,
    eps: float,
    *,
    pairs: Pairs = "neighbours",
    mean_square: Tensor | None = None,
) -> Tensor:
    """The same in float32 steps, rounded once."""
    own = x[:, : len(weight)]  # [T, N, H, D]
    if mean_square is None and weight.shape[1] == x.shape[3]:
        y = over_rms(own, eps).mul_(weight[:, None])
    elif mean_square is None:
        y = over_rms(own.flatten(2), eps).mul_(weight).view(own.shape)
    else:  # maybe of one head alone: others have other heads
        y = (own.flatten(2) * (mean_square + eps).rsqrt()[..., None]).mul_(weight).view(own.shape)
    own.copy_(y if turns is None else turn(y, turns, pairs))
    return x


def turn(x: Tensor, turns: Tensor, pairs: Pairs) -> Tensor:
    """x float32 [T, ..., D], turns [T, 2, D / 2] → turned."""
    cos, sin = (part.view(len(part), *(1,) * (x.dim() - 2), part.shape[1]) for part in turns.unbind(1))
    if pairs == "halves":
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    if torch.compiler.is_compiling():  # it makes no code for complex numbers
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)
