"""What operations cost at least: floating-point operations, and bytes that must be read and written. No torch here.

A multiply-add is two operations. Every operand is counted once: what a kernel reads again comes out as a smaller share
of the bandwidth. Elementwise operations count no flops: they are bound by bytes on every processor there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

ROW = 4  # bytes of a float32: of scales that are kept in it, tables of angles, indices

Bound = Literal["product", "attention", "rows"]


class Cost(NamedTuple):
    """Of one call."""

    flops: int
    bytes: int


class Call(NamedTuple):
    """An operation of a model's step."""

    op: str  # a key of OPS
    what: str  # which one it is in the model
    times: int  # per step
    sizes: dict[str, int]  # arguments of the op's cost

    def cost(self, size: int = 2) -> Cost:
        """Of one of the calls; `size`: bytes of a number of the model's dtype."""
        return OPS[self.op].cost(size, **self.sizes)


def _linear(size: int, tokens: int, inputs: int, outputs: int) -> Cost:
    return Cost(2 * tokens * inputs * outputs, size * (tokens * inputs + inputs * outputs + tokens * outputs))


def _attention(size: int, segments: int, tokens: int, keys: int, heads: int, dim: int) -> Cost:
    """`segments` times `tokens` queries with `keys` keys each; scores and the mix of values."""
    width = heads * dim
    return Cost(4 * segments * tokens * keys * width, size * segments * width * (2 * tokens + 2 * keys))


def _norm_modulate(size: int, tokens: int, dim: int) -> Cost:
    return Cost(0, 2 * size * tokens * dim + ROW * tokens)


def _gated_residual(size: int, tokens: int, dim: int) -> Cost:
    return Cost(0, 3 * size * tokens * dim + ROW * tokens)


def _gated_residual_norm(size: int, tokens: int, dim: int) -> Cost:
    return Cost(0, 4 * size * tokens * dim + ROW * tokens)


def _qk_norm_rope(size: int, tokens: int, parts: int, heads: int, dim: int, turned: int) -> Cost:
    """`parts` of queries and keys; `turned`: 1 where they are turned by their position, 0 where not."""
    return Cost(0, 2 * size * tokens * parts * heads * dim + turned * ROW * tokens * dim)


def _gated_product(size: int, tokens: int, hidden: int) -> Cost:
    return Cost(0, 3 * size * tokens * hidden)


def _gelu_tanh(size: int, tokens: int, hidden: int) -> Cost:
    return Cost(0, 2 * size * tokens * hidden)


class Op(NamedTuple):
    """What limits an operation, and its cost from the bytes of a number and its sizes."""

    bound: Bound
    cost: Callable[..., Cost]


OPS: dict[str, Op] = {
    "linear": Op("product", _linear),
    "attention": Op("attention", _attention),
    "norm_modulate": Op("rows", _norm_modulate),
    "gated_residual": Op("rows", _gated_residual),
    "gated_residual_norm": Op("rows", _gated_residual_norm),
    "qk_norm_rope": Op("rows", _qk_norm_rope),
    "gated_product": Op("rows", _gated_product),
    "gelu_tanh": Op("rows", _gelu_tanh),
}
