"""Tensors of GGUF files against what the gguf package makes of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights.gguf import GgufFile
from multimodal_gen.weights.gguf_header import BY_NAME
from tests.support.gguf_files import in_pairs

pytestmark = [pytest.mark.unit]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROWS, WIDTH, HEAD = 6016, 256, 64  # more than one block of reading


def write(path: Path, kind: str, rows: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("output_norm.weight", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_rows(kind: str, rows: int = ROWS) -> np.ndarray:
    """Bytes of any numbers: scales are kept small and finite."""
    generator, stored = np.random.default_rng(0), BY_NAME[kind]
    if kind in ("F32", "F16"):
        return generator.standard_normal((rows, WIDTH)).astype({"F32": np.float32, "F16": np.float16}[kind])
    if kind == "BF16":
        exact = generator.standard_normal((rows, WIDTH)).astype(np.float32)
        return gguf.quants.quantize(exact, gguf.GGMLQuantizationType.BF16)
    raw = generator.integers(0, 256, (rows, WIDTH // stored.block * stored.bytes), dtype=np.uint8)
    return raw & 0x3B  # as halves: at most 0.9, whatever the two bytes


def opened(path: Path, head: int | None = None) -> GgufFile:
    return GgufFile(path, {"blk.0.attn_q.weight": "q"}.get, {} if head is None else {"q": head})


def expected(kind: str, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]).reshape(-1, WIDTH))


@pytest.mark.parametrize("kind", BY_NAME)
def test_every_type_is_read_as_the_gguf_package_reads_it(kind: str, tmp_path: Path) -> None:
    rows = random_rows(kind)
    file, wanted = opened(write(tmp_path / "model.gguf", kind, rows)), expected(kind, rows)
    assert torch.isfinite(wanted).all()
    assert set(file.tensors) == {"q"}  # what nobody asks for is left out
    assert torch.equal(file.tensor("q").float(), wanted)
    found = {part.start: block.float().clone() for part, block in file.blocks("q", slice(64, 6000))}
    assert len(found) > 1
    assert torch.equal(torch.cat([found[start] for start in sorted(found)]), wanted[64:6000])


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_rows_in_pairs_come_in_halves_of_their_head(kind: str, tmp_path: Path) -> None:
    """The file has them as llama.cpp turns them, the model as transformers does."""
    rows = random_rows(kind)
    wanted = expected(kind, rows)
    paired = in_pairs(rows, ROWS // HEAD)
    file = opened(write(tmp_path / "model.gguf", kind, np.ascontiguousarray(paired)), HEAD)
    assert torch.equal(file.tensor("q").float(), wanted)
    parts = [block.float().clone() for _, block in file.blocks("q", slice(HEAD, 5 * HEAD))]
    assert torch.equal(torch.cat(parts), wanted[HEAD : 5 * HEAD])
    assert not file.same_dtype("q", torch.float32)  # it must not be copied as it is


def test_numbers_that_need_no_change_are_known_to_be_so(tmp_path: Path) -> None:
    file = opened(write(tmp_path / "model.gguf", "F32", random_rows("F32", 64)))
    assert file.same_dtype("q", torch.float32)
    assert not file.same_dtype("q", torch.bfloat16)


def test_heads_that_rows_do_not_fill_are_an_error_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "F32", random_rows("F32", 65))
    with pytest.raises(CorruptModel, match=r"model\.gguf: tensor 'q' has 65 rows, in heads of 64"):
        opened(path, HEAD)


def test_a_file_that_is_cut_while_it_is_used_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "Q8_0", random_rows("Q8_0"))
    file = opened(path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CorruptModel, match=r"model\.gguf was changed"):
        file.tensor("q")
