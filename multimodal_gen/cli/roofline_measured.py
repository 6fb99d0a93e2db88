"""What this machine makes of the calls of a step; imports torch.

Each call is made alone, with tensors of its own, in bfloat16. A GPU's caches keep small tensors between calls, so
shares of its bandwidth may come out above one there; in a step other calls lie between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal_gen.attention import registry
from multimodal_gen.attention.cross import Keys, cross_attend
from multimodal_gen.attention.segments import Segments
from multimodal_gen.cli.hardware import cpu
from multimodal_gen.cli.roofline import Device
from multimodal_gen.kernels import packed_linear
from multimodal_gen.kernels.costs import Bound, Call
from multimodal_gen.kernels.gated_product import gated_product, gelu_tanh_
from multimodal_gen.kernels.gated_residual import gated_residual_, gated_residual_norm_
from multimodal_gen.kernels.norm_modulate import Norm, rms_norm_scale
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_

DTYPE = torch.bfloat16
EPS = 1e-6
SECONDS = 0.3  # that a call is repeated for
LIMIT_SECONDS = 1.0  # the same of what finds a limit
LEAST = 3  # times that it is made

Work = Callable[[], object]


def this_machine(known: Callable[[str], Device | None]) -> tuple[Device, bool]:
    """Its limits, and whether it is a GPU: from the data sheet where the GPU is known, else measured."""
    device = _device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = known(name)
        if found is not None:
            return found._replace(name=name), True
    else:
        name = f"{cpu()['model']}, {torch.get_num_threads()} threads"
    side = 8192 if device.type == "cuda" else 2048
    product = seconds(_linear(side, side, side), LIMIT_SECONDS)
    x = torch.zeros((256 << 20) // 2, dtype=DTYPE, device=device)
    y = torch.empty_like(x)
    copy = seconds(lambda: y.copy_(x), LIMIT_SECONDS)
    limits: dict[Bound, float] = {"product": 1.0, "attention": 1.0, "rows": 1.0}
    return Device(name, 2 * side**3 / product, 2 * x.nbytes / copy, limits), device.type == "cuda"


def measure(calls: Sequence[Call]) -> dict[int, float]:
    """Seconds of one of each."""
    with torch.inference_mode():
        return {index: seconds(MAKERS[call.op](**call.sizes), SECONDS) for index, call in enumerate(calls)}


def seconds(work: Work, least: float) -> float:
    """The shortest of several runs on a CPU; on a GPU the mean of a queue of them, as they are queued in a step."""
    device = _device()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        count = 20
        begin.record()
        for _ in range(count):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count
    taken: list[float] = []
    while len(taken) < LEAST or sum(taken) < least:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _numbers(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=_device()).to(dtype)


def _index(tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.int32, device=_device())


def _linear(tokens: int, inputs: int, outputs: int) -> Work:
    x, weight = _numbers(tokens, inputs), _numbers(outputs, inputs)
    if x.is_cuda or packed_linear.unavailable(DTYPE):
        return lambda: F.linear(x, weight)
    packed = packed_linear.pack(weight)
    return lambda: packed_linear.packed_linear(x, packed)


def _attention(segments: int, tokens: int, keys: int, heads: int, dim: int) -> Work:
    q = _numbers(segments * tokens, heads, dim)
    if keys != tokens:
        seen = [Keys(_numbers(keys, heads, dim), _numbers(keys, heads, dim)) for _ in range(segments)]
        return lambda: cross_attend(q, [tokens] * segments, seen)
    k, v, of = _numbers(*q.shape), _numbers(*q.shape), Segments.of([tokens] * segments)
    backend = registry.choose("auto", q.device)
    return lambda: backend(q, k, v, of)


def _norm_modulate(tokens: int, dim: int) -> Work:
    x, scale, index = _numbers(tokens, dim), _numbers(1, dim), _index(tokens)
    return lambda: rms_norm_scale(x, scale, index, EPS)


def _gated_residual(tokens: int, dim: int) -> Work:
    x, y, gate, index = _numbers(tokens, dim), _numbers(tokens, dim), _numbers(1, dim) * 0, _index(tokens)
    return lambda: gated_residual_(x, y, gate, index, EPS)


def _gated_residual_norm(tokens: int, dim: int) -> Work:
    x, y, gate, index = _numbers(tokens, dim), _numbers(tokens, dim), _numbers(1, dim) * 0, _index(tokens)
    norm = Norm("rms", _numbers(1, dim), None, index, EPS)
    return lambda: gated_residual_norm_(x, y, gate, index, EPS, norm)


def _qk_norm_rope(tokens: int, parts: int, heads: int, dim: int, turned: int) -> Work:
    x, weight = _numbers(tokens, parts, heads, dim), _numbers(parts, dim)
    turns = _numbers(tokens, 2, dim // 2, dtype=torch.float32) if turned else None
    return lambda: qk_norm_rope_(x, weight, turns, EPS)


def _gated_product(tokens: int, hidden: int) -> Work:
    gate, up = _numbers(tokens, 2 * hidden).chunk(2, -1)
    return lambda: gated_product(gate, up)


def _gelu_tanh(tokens: int, hidden: int) -> Work:
    x = _numbers(tokens, hidden)
    return lambda: gelu_tanh_(x)


MAKERS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "attention": _attention,
    "norm_modulate": _norm_modulate,
    "gated_residual": _gated_residual,
    "gated_residual_norm": _gated_residual_norm,
    "qk_norm_rope": _qk_norm_rope,
    "gated_product": _gated_product,
    "gelu_tanh": _gelu_tanh,
}
