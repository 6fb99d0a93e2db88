"""Tensors come out of files as they went in, whichever way they are read; whatever happens to a file is told."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights import reader
from multimodal_gen.weights.reader import DTYPES, TensorFile

pytestmark = [pytest.mark.unit]

WAYS = pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Odd sizes, so that nothing begins at a sector."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "wide": torch.randn(7, 1001, generator=generator),
        "tall": torch.randn(1013, 3, generator=generator).bfloat16(),
        "cube": torch.randn(5, 3, 11, generator=generator).half(),
        "vector": torch.randn(333, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "no rows": torch.empty(0, 5),
        "no columns": torch.empty(5, 0),
        "one byte": torch.tensor([7], dtype=torch.uint8),
    }


def same_bytes(found: Tensor, wanted: Tensor) -> bool:
    """Also where NaNs are inside."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    flat, want = found.contiguous().reshape(-1), wanted.contiguous().reshape(-1)
    return torch.equal(flat.view(torch.uint8), want.view(torch.uint8))


def joined(file: TensorFile, key: str, rows: slice | None = None, *, direct: bool) -> Tensor:
    """All blocks of a tensor end to end."""
    at, parts = 0, []
    for where, block in file.blocks(key, rows, direct=direct):
        assert where.start == at, "blocks come in order and leave nothing out"
        assert len(block) == where.stop - where.start
        at = where.stop
        parts.append(block.clone())
    return torch.cat(parts)


@pytest.fixture
def path(tmp_path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


# --- what is read ------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("block_bytes", [1, 100, 4096, 5000, 4 << 20])
def test_blocks_of_any_size_end_to_end_are_the_tensor(path, monkeypatch, direct, block_bytes):
    monkeypatch.setattr(reader, "BLOCK_BYTES", block_bytes)
    file = TensorFile(path)
    for key, wanted in load_file(path).items():
        if wanted.numel():
            whole = wanted if wanted.dim() else wanted[None]
            assert same_bytes(joined(file, key, direct=direct), whole), key
        else:
            assert list(file.blocks(key, direct=direct)) == []


@WAYS
@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 5), slice(3, 3), slice(4, None), slice(None, 2)])
def test_some_rows_are_those_rows(path, monkeypatch, direct, rows):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 5000)
    file = TensorFile(path)
    for key in ("wide", "tall", "cube", "vector"):
        wanted = load_file(path)[key][rows]
        target = torch.empty_like(wanted)
        file.read_into(key, rows, target)
        assert same_bytes(target, wanted), key
        if len(wanted):
            assert same_bytes(joined(file, key, rows, direct=direct), wanted), key
        else:
            assert list(file.blocks(key, rows, direct=direct)) == []


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_bit_for_bit(tmp_path, name):
    dtype = DTYPES[name]
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6, 40), dtype=torch.uint8)
    given = raw.view(dtype)
    save_file({"x": given}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.same_dtype("x", dtype)
    assert same_bytes(file.tensor("x"), given)
    assert same_bytes(joined(file, "x", direct=True), given)


def test_tensors_without_dimensions_or_elements_are_read_whole(path):
    file = TensorFile(path)
    for key in ("scalar", "no rows", "no columns", "one byte"):
        assert same_bytes(file.tensor(key), load_file(path)[key])


def test_a_dtype_that_torch_cannot_hold_is_named(tmp_path):
    head = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"abc")
    file = TensorFile(path)
    with pytest.raises(CorruptModel, match=r"odd\.safetensors: tensors of dtype F6_E2M3 cannot be read"):
        file.tensor("x")


def test_where_the_file_system_knows_no_direct_reading_the_same_is_read(path, monkeypatch):
    really, refused = os.open, []

    def opened(name, flags, *rest):
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(name, flags, *rest)

    monkeypatch.setattr(os, "open", opened)
    file = TensorFile(path)
    assert same_bytes(joined(file, "wide", direct=True), load_file(path)["wide"])
    assert refused == [path]


def test_many_threads_read_one_file_at_a_time_in_both_ways(path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3000)
    file, wanted = TensorFile(path), load_file(path)
    keys = ["wide", "tall", "cube", "vector"] * 60
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda i: joined(file, keys[i], direct=i % 3 == 0), range(len(keys))))
    assert all(same_bytes(tensor, wanted[key]) for key, tensor in zip(keys, found, strict=True))


# --- what happens to files ------------------------------------------------------------------------------------------


def everything(file: TensorFile, direct: bool) -> None:
    for key in ("wide", "tall"):
        joined(file, key, direct=direct)


@WAYS
def test_a_file_cut_in_place_is_named(path, direct):
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CorruptModel, match=r"model\.safetensors was changed while the model was in use"):
        everything(file, direct)
    with pytest.raises(CorruptModel, match="was changed"):
        file.check()


@WAYS
def test_a_file_that_is_cut_between_two_blocks_is_named_and_ends_nobody(path, monkeypatch, direct):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4004)  # a row
    file = TensorFile(path)
    blocks = file.blocks("wide", direct=direct)
    next(blocks)
    os.truncate(path, 5000)
    with pytest.raises(CorruptModel, match=r"model\.safetensors is truncated"):
        list(blocks)


@WAYS
def test_a_shorter_file_in_its_place_is_named(path, direct):
    file = TensorFile(path)
    save_file({"wide": tensors()["wide"]}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    with pytest.raises(CorruptModel, match="was changed"):
        everything(file, direct)


@WAYS
def test_another_models_file_of_the_same_shapes_is_noticed(path, direct):
    file = TensorFile(path)
    before = path.stat()
    save_file(tensors(seed=1), path.with_suffix(".new"))
    assert path.with_suffix(".new").stat().st_size == before.st_size
    os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_suffix(".new").replace(path)
    with pytest.raises(CorruptModel, match="was changed"):
        everything(file, direct)


@WAYS
def test_a_file_that_is_moved_away_is_named_and_read_again_when_it_is_back(path, direct):
    file = TensorFile(path)
    away = path.rename(path.with_suffix(".away"))
    with pytest.raises(CorruptModel, match=r"model\.safetensors cannot be read: No such file"):
        everything(file, direct)
    away.rename(path)
    everything(file, direct)


@WAYS
def test_a_copy_in_its_place_is_the_same_file(path, direct):
    file = TensorFile(path)
    shutil.copy(path, path.with_suffix(".copy"))
    os.utime(path.with_suffix(".copy"), ns=(0, 0))
    path.with_suffix(".copy").replace(path)
    everything(file, direct)
    file.check()


@WAYS
def test_a_disk_error_names_the_file_and_the_next_attempt_reads(path, monkeypatch, direct):
    file = TensorFile(path)
    really, left = os.preadv, [1]

    def failing(*args):
        if left.pop() if left else False:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CorruptModel, match=r"model\.safetensors cannot be read: Input/output error"):
        everything(file, direct)
    everything(file, direct)


@WAYS
def test_reads_that_bring_less_than_asked_are_continued(path, monkeypatch, direct):
    file, wanted = TensorFile(path), load_file(path)
    really, asked = os.preadv, []

    def short(descriptor, buffers, offset):
        asked.append(offset)
        piece = 4096 if direct else 777  # what is read directly comes in sectors
        return really(descriptor, [buffers[0][:piece]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert same_bytes(joined(file, "wide", direct=direct), wanted["wide"])
    assert len(asked) > 5


def test_no_descriptor_is_left_open(path):
    file = TensorFile(path)
    before = len(os.listdir("/proc/self/fd"))
    for direct in (False, True):
        everything(file, direct)
        next(file.blocks("wide", direct=direct))
    assert len(os.listdir("/proc/self/fd")) == before
