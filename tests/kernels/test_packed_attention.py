"""Packed attention against the reference: compiled for this processor, and in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from multimodal_gen.attention.segments import Segments
from multimodal_gen.kernels import native
from multimodal_gen.kernels import packed_attention as op

pytestmark = [pytest.mark.kernels]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes minutes")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of values around 1


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    keys: tuple[int, ...] = ()  # of each segment; none: as many as queries
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    counts: tuple[int, ...] | None = None
    causal: bool = False

    @property
    def key_lengths(self) -> tuple[int, ...]:
        return self.keys or self.lengths

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Heads of queries and keys lie as in one buffer with others between them."""
        random = torch.Generator().manual_seed(sum(self.lengths) + self.dim)
        q = torch.randn(sum(self.lengths), self.heads + 1, self.dim, generator=random).to(dtype)[:, 1:]
        kv = torch.randn(sum(self.key_lengths), 2, self.kv_heads, self.dim + 2, generator=random).to(dtype)
        k, v = kv[..., : self.dim].unbind(1)
        return q.to(device), k.to(device), v.to(device)


SMALL = {
    "nothing": Case(()),
    "one token": Case((1,)),
    "one vector, one more": Case((16, 17)),
    "odd lengths": Case((5, 130, 40), dim=64),
    "keys of their own": Case((40, 7), (3, 65), dim=24),
    "no keys, no queries": Case((4, 0, 3), (0, 9, 20)),
    "shared keys": Case((33, 70), heads=6, kv_heads=2, dim=40),
    "last keys that count": Case((20, 30), (13, 1), counts=(452, 7), dim=32),
    "causal": Case((70, 3), dim=64, causal=True),
    "causal after a beginning": Case((20, 49), (150, 49), heads=4, kv_heads=1, causal=True),
    "odd width": Case((19,), (30,), dim=20),
}
HALF = ("one vector, one more", "keys of their own", "last keys that count", "causal after a beginning", "odd width")
LARGE = {
    "blocks of keys": Case((300, 513), dim=64),
    "wide heads": Case((200,), (129,), dim=256),
    "odd numbers": Case((100,), (257,), dim=7, heads=3, kv_heads=1),
    "more tiles than are seen together": Case((1000,), (40,), heads=1, kv_heads=1, dim=8),
    "causal over blocks": Case((260, 300), (400, 300), dim=72, causal=True),
}


def compare(case: Case, dtype: torch.dtype, out: Tensor, lse: Tensor) -> None:
    q, k, v = case.tensors(torch.float32)
    q, k, v = (x.to(dtype).float() for x in (q, k, v))
    wanted, sums = op.reference(q, k, v, case.lengths, case.key_lengths, case.counts, case.causal)
    torch.testing.assert_close(out.float().cpu(), wanted, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.cpu(), sums, rtol=1e-6, atol=5e-6)  # float32, whatever is multiplied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL | LARGE)
def test_the_processors_kernel_computes_its_reference(name: str, dtype: torch.dtype) -> None:
    case = (SMALL | LARGE)[name]
    q, k, v = case.tensors(dtype)
    if not op.takes(q):
        pytest.skip(op.unavailable(dtype))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    arguments = (q, k, v, case.lengths, case.key_lengths)
    found = op._compute(*arguments, case.counts, case.causal, out, lse)
    assert found is out
    compare(case, dtype, out, lse)
    assert torch.equal(op.packed_attention(*arguments, counts=case.counts, causal=case.causal), out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SMALL),
        *((name, t) for name in HALF for t in (torch.float16, torch.bfloat16)),
        *(pytest.param(name, t, marks=NEEDS_GPU) for name in LARGE for t in TOLERANCE),
    ],
)
def test_the_triton_kernel_computes_its_reference(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from multimodal_gen.kernels.gpu.packed_attention import MOST, packed_attention

    case = (SMALL | LARGE)[name]
    if case.dim > MOST[dtype]:
        pytest.skip("wider heads than the kernel has registers for")
    q, k, v = case.tensors(dtype, DEVICE)
    out = torch.zeros(q.shape, dtype=dtype, device=DEVICE)
    lse = torch.full(q.shape[:2], -torch.inf, device=DEVICE)
    counts = case.counts or (1,) * len(case.lengths)
    packed_attention(q, k, v, case.lengths, case.key_lengths, counts, case.causal, out, lse)
    compare(case, dtype, out, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_gives_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Whatever stands beside its segment, however segments are cut for the threads, and wherever it is in a tile."""
    q, k, v = Case((70, 500, 90), heads=3, kv_heads=3, dim=40).tensors(dtype)
    if not op.takes(q):
        pytest.skip(op.unavailable(dtype))
    together = op.packed_attention(q, k, v, (70, 500, 90), (70, 500, 90))
    own_k, own_v = k[70:570], v[70:570]
    alone = op.packed_attention(q[70:570], own_k, own_v, (500,), (500,))
    assert torch.equal(together[70:570], alone)
    shifted = op.packed_attention(q[75:570], own_k, own_v, (495,), (500,))
    assert torch.equal(shifted, alone[5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_far_apart_and_far_from_zero_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = Case((50,), (140,), dim=32).tensors(dtype)
    if not op.takes(q):
        pytest.skip(op.unavailable(dtype))
    q, k = q * 40, k - 30  # scores of some -5,000 to 5,000; of the block's eight zeroed keys 0
    out, lse = op.packed_attention_lse(q, k, v, (50,), (140,))
    wanted, sums = op.reference(q.float(), k.float(), v.float(), (50,), (140,))
    assert sums.abs().max() > 3000
    torch.testing.assert_close(lse, sums, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 4e-3)


def test_numbers_that_are_none_come_out_of_their_own_segment_only() -> None:
    q, k, v = Case((20, 30)).tensors(torch.float32)
    if not op.takes(q):
        pytest.skip(op.unavailable(torch.float32))
    k[25] = torch.nan
    out = op.packed_attention(q, k, v, (20, 30), (20, 30))
    assert out[:20].isfinite().all()
    assert out[20:].isnan().all()


def test_without_the_compiled_kernel_torch_computes_the_same() -> None:
    case = SMALL["causal after a beginning"]
    q, k, v = case.tensors(torch.bfloat16)
    with native.torch_only():
        assert op.unavailable(torch.bfloat16)
        out, lse = op.packed_attention_lse(q, k, v, case.lengths, case.key_lengths, causal=True)
    compare(case, torch.bfloat16, out, lse)


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = Case((8,)).tensors(torch.float32)
    with pytest.raises(AssertionError, match="segments of 7 tokens for 8"):
        op.packed_attention(q, k, v, (7,), (8,))
    with pytest.raises(AssertionError, match="2 heads of keys do not divide 1"):
        op.packed_attention(q[:, :1], k, v, (8,), (8,))
    with pytest.raises(AssertionError, match=r"float32, torch.bfloat16"):
        op.packed_attention(q, k.bfloat16(), v, (8,), (8,))
    with pytest.raises(AssertionError, match="side by side"):
        op.packed_attention(q[..., ::2], k[..., :8], v[..., :8], (8,), (8,))


def test_the_backend_of_gpus_gives_what_the_reference_does_and_the_sum() -> None:
    pytest.importorskip("triton")
    from multimodal_gen.attention.triton_packed import TritonAttention

    assert TritonAttention.unavailable(torch.device("cpu")) == "it is for CUDA"
    q, k, v = Case((9, 4), (5, 30), dim=300).tensors(torch.float16)  # wider than the kernel takes
    out, lse = TritonAttention().with_lse(q, k, v, Segments.of([9, 4]), Segments.of([5, 30]))
    wanted, sums = op.reference(q, k, v, (9, 4), (5, 30))
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse, sums, rtol=0, atol=1e-3)
