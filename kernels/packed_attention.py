"""Softmax attention over packed sequences of different lengths: softmax(q kᵀ / √D) v inside each segment.

FlashAttention (Dao et al., 2022): a block of keys at a time under a running maximum, so scores are never in memory.
Segments may have keys of their own (cross-attention), fewer heads of keys than of queries (GQA), a last key that counts
several times (a text's padding: softmax over m equal keys is softmax over one of them with log m added to its score),
and a causal mask. With the log-sum-exp, results over blocks of keys can be joined (`ring_merge`).

Bytes: q, k, v and the output once; 4 · T · K · H · D flops. On processors: AVX-512, bf16 with AVX512-BF16.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal_gen.kernels import native


class _Call(ctypes.Structure):
    """The arguments, as `Call` of cpu/packed_attention.cpp has them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "segments")),
        *((name, ctypes.c_int64) for name in ("count", "heads", "kv_heads", "dim")),
        *((f"{name}_{stride}", ctypes.c_int64) for name in ("q", "k", "v", "out") for stride in ("token", "head")),
        ("scale", ctypes.c_double),  # times log2(e)
        ("causal", ctypes.c_int64),
        ("status", ctypes.c_int64),  # filled by the function
    ]


_DONE, _NO_MEMORY = 0, 1
_packed_attention = native.Function("packed_attention", "p")


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    causal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Segment i of q attends to segment i of k and v.

    Args:
        q: [T, H, D]; tokens and heads may lie anywhere, the numbers of a head side by side.
        k, v: [K, G, D], where G divides H: head h looks at the keys of h // (H / G).
        lengths: tokens of each segment, T in all.
        key_lengths: keys of each segment, K in all; zeros come out where there are none.
        counts: how often the last key of each segment counts; None: once.
        causal: the last query of a segment sees all keys, the one before it all but the last, and so on.
        out: [T, H, D] to write to, laid out as q may be.

    Returns: [T, H, D] in the dtype of q, rounded once; what a query gives depends on its segment alone.
    """
    return _compute(q, k, v, lengths, key_lengths, counts, causal, out, None)


def packed_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The same and the float32 natural log-sum-exp of the scaled scores, [T, H]; -inf where there are no keys."""
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return _compute(q, k, v, lengths, key_lengths, None, causal, None, lse), lse


def unavailable(dtype: torch.dtype) -> str:
    """Why the processor's kernel cannot be had for this dtype, or an empty string."""
    if native.switched_off():
        return "it is switched off (--kernels torch)"
    if reason := native.unavailable():
        return reason
    if _packed_attention.of(torch.empty(0, dtype=dtype, device="cpu")) is None:
        return f"it has no variant for {dtype}"
    return "" if _has_instructions(dtype) else f"this processor lacks the AVX-512 instructions for {dtype}"


def takes(q: Tensor) -> bool:
    """Whether the processor's kernel computes on tensors like q."""
    return _packed_attention.of(q) is not None and _has_instructions(q.dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    compute, nothing = _packed_attention.of(torch.empty(0, dtype=dtype, device="cpu")), _Call()
    assert compute is not None
    compute(ctypes.byref(nothing))
    return nothing.status == _DONE


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    counts: Sequence[int] | None,
    causal: bool,
    out: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    counts = counts or (1,) * len(lengths)
    _check(q, k, v, lengths, key_lengths, counts, causal, out)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not all(key_lengths):
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    if native.by_triton(q):
        from multimodal_gen.kernels.gpu import packed_attention as gpu

        gpu.packed_attention(q, k, v, lengths, key_lengths, counts, causal, out, lse)
    elif takes(q):
        _on_processor(q, k, v, _table(tuple(lengths), tuple(key_lengths), tuple(counts)), causal, out, lse)
    else:
        found, sums = reference(q, k, v, lengths, key_lengths, counts, causal)
        out.copy_(found)
        if lse is not None:
            lse.copy_(sums)
    return out


def _on_processor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: ctypes.Array[ctypes.c_int64],
    causal: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
    pointers = [x.data_ptr() for x in (q, k, v, out)]
    call = _Call(
        *pointers,
        None if lse is None else lse.data_ptr(),
        ctypes.addressof(segments),
        len(segments) // 3,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        *strides,
        q.shape[2] ** -0.5 * math.log2(math.e),
        causal,
    )
    compute = _packed_attention.of(q)
    assert compute is not None
    compute(ctypes.byref(call))
    native.hold(segments)
    native.check(functools.partial(_check_done, call, max(segments[1::3], default=0)))


def _check_done(call: _Call, longest: int) -> None:
    if call.status != _DONE:
        status, call.status = call.status, _DONE
        assert status == _NO_MEMORY, status
        raise MemoryError(f"attention over {longest} keys: no memory for the keys and values of a head")


@functools.lru_cache(maxsize=256)  # of all layers and steps the same
def _table(
    lengths: tuple[int, ...], key_lengths: tuple[int, ...], counts: tuple[int, ...]
) -> ctypes.Array[ctypes.c_int64]:
    rows = [number for row in zip(lengths, key_lengths, counts, strict=True) for number in row]
    return (ctypes.c_int64 * len(rows))(*rows)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    counts: Sequence[int],
    causal: bool,
    out: Tensor | None,
) -> None:
    assert q.dim() == k.dim() == v.dim() == 3, (q.shape, k.shape, v.shape)
    assert k.shape == v.shape, (k.shape, v.shape)
    assert q.shape[2] == k.shape[2], (q.shape, k.shape)
    assert q.shape[1] % k.shape[1] == 0, f"{k.shape[1]} heads of keys do not divide {q.shape[1]}"
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert q.device == k.device == v.device, (q.device, k.device, v.device)
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "the numbers of a head lie side by side"
    assert sum(lengths) == len(q), f"segments of {sum(lengths)} tokens for {len(q)}"
    assert sum(key_lengths) == len(k), f"segments of {sum(key_lengths)} keys for {len(k)}"
    assert len(lengths) == len(key_lengths) == len(counts), (lengths, key_lengths, counts)
    if causal:
        assert all(a <= b for a, b in zip(lengths, key_lengths, strict=True)), f"{lengths} queries, {key_lengths} keys"
    if out is not None:
        assert out.shape == q.shape, (out.shape, q.shape)
        assert out.dtype == q.dtype, (out.dtype, q.dtype)
        assert out.stride(2) == 1, "the numbers of a head lie side by side"


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    counts: Sequence[int] | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Written out in float32, rounded once: [T, H, D] and the log-sum-exp, float32 [T, H]."""
    group = q.shape[1] // k.shape[1]
    outputs, sums = [q[:0]], [q.new_empty((0, q.shape[1]), dtype=torch.float32)]
    parts = zip(q.split(list(lengths)), k.split(list(key_lengths)), v.split(list(key_lengths)), strict=True)
    for (q_s, k_s, v_s), times in zip(parts, counts or (1,) * len(lengths), strict=True):
        wide_k, wide_v = (x.float().repeat_interleave(group, 1) for x in (k_s, v_s))
        scores = torch.einsum("qhd,khd->hqk", q_s.float(), wide_k) * q.shape[-1] ** -0.5
        scores[..., -1:] += math.log(times)
        if causal:
            unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k_s) - len(q_s) + 1)
            scores = scores.masked_fill(unseen, -math.inf)
        lse = scores.logsumexp(-1)  # -inf without keys
        outputs.append(torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), wide_v).to(q.dtype))
        sums.append(lse.T)
    return torch.cat(outputs), torch.cat(sums)
