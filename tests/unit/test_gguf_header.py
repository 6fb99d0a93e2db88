"""The header of a GGUF file: what is damaged is said, by the file's name, and nothing is read beyond its end."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights.gguf_header import read_gguf
from tests.support.gguf_files import entry, header, pair, text

pytestmark = [pytest.mark.unit]

U32, TEXT, ARRAY, U64 = 4, 8, 9, 10
ARCHITECTURE = pair("general.architecture", TEXT, text("llama"))
HUGE = struct.pack("<Q", 1 << 62)


def padded(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


SOUND = padded(header(2, 1) + ARCHITECTURE + entry("a", (2, 32)) + entry("b", (4,), 0, 256)) + bytes(272)

DAMAGED = {
    "empty": (b"", "GGUF"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "version 1": (header(0, 0, version=1) + bytes(32), "version 1"),
    "bytes swapped": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "version"),
    "count of tensors": (header(1 << 62, 0) + bytes(64), "announces"),
    "count of keys": (header(0, 1 << 60) + bytes(64), "announces"),
    "length of a key": (header(0, 1) + HUGE + bytes(64), "text of"),
    "length of a text": (header(0, 1) + pair("k", TEXT, HUGE) + bytes(64), "text of|does not fit"),
    "length of an array": (header(0, 1) + pair("k", ARRAY, struct.pack("<I", U64) + HUGE) + bytes(64), "announces"),
    "array of texts": (header(0, 1) + pair("k", ARRAY, struct.pack("<I", TEXT) + HUGE) + bytes(64), "announces"),
    "array of too many": (
        header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", 0, 5_000_000) + bytes(5_000_000)) + bytes(64),
        "5,000,000 values",
    ),
    "arrays too deep": (
        header(0, 1) + pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 3 + bytes(64)) + bytes(64),
        "too deep",
    ),
    "type of a value": (header(0, 1) + pair("k", 13, bytes(8)) + bytes(64), "unknown type 13"),
    "doubled key": (header(0, 2) + ARCHITECTURE * 2 + bytes(64), "doubled"),
    "doubled tensor": (padded(header(2, 0) + entry("a", (2,)) * 2) + bytes(64), "doubled"),
    "dimensions": (padded(header(1, 0) + entry("a", (1, 1, 1, 1, 1))) + bytes(64), "5 dimensions"),
    "shape beyond all numbers": (padded(header(1, 0) + entry("a", (1 << 40, 1 << 40))) + bytes(64), "cannot be"),
    "shape of nothing": (padded(header(1, 0) + entry("a", (0, 4))) + bytes(64), "cannot be"),
    "row of half a block": (padded(header(1, 0) + entry("a", (2, 33), 8)) + bytes(96), "cannot be Q8_0"),
    "type of a tensor": (padded(header(1, 0) + entry("a", (2,), 99)) + bytes(64), "type 99"),
    "offset beyond the end": (padded(header(1, 0) + entry("a", (2,), 0, 1 << 50)) + bytes(64), "truncated"),
    "tensor cut": (padded(header(1, 0) + entry("a", (64,))) + bytes(255), "truncated"),
    "overlap": (padded(header(2, 0) + entry("a", (8,)) + entry("b", (8,), 0, 16)) + bytes(96), "overlap"),
    "alignment": (header(0, 1) + pair("general.alignment", U32, struct.pack("<I", 7)) + bytes(64), "alignment"),
}


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND)
    found = read_gguf(path, "model.gguf")
    assert found.metadata == {"general.architecture": "llama"}
    assert {name: info.shape for name, info in found.tensors.items()} == {"a": (2, 32), "b": (4,)}
    assert (found.data_start, found.tensors["b"].begin, found.tensors["b"].end) == (len(SOUND) - 272, 256, 272)


def test_the_header_is_that_of_the_gguf_package(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "Ġb", "<|end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_chat_template("{{ messages }}")
    writer.add_rope_freq_base(1e6)
    writer.add_add_bos_token(False)
    for name, kind in (("a.weight", "Q4_1"), ("b.weight", "Q8_0"), ("c.weight", "F32")):
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(np.ones((6, 64), np.float32), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(path, path.name), gguf.GGUFReader(path)
    assert ours.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert len(theirs.tensors) == 3
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.dtype, info.shape) == (tensor.tensor_type.name, tuple(map(int, tensor.shape[::-1])))
        assert ours.data_start + info.begin == tensor.data_offset
        assert info.end - info.begin == tensor.n_bytes


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_named_and_costs_no_memory(what: str, tmp_path: Path) -> None:
    raw, message = DAMAGED[what]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptModel, match=rf"(?s)damaged\.gguf.*({message})"):
            read_gguf(path, "damaged.gguf")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_every_cut_of_a_file_and_every_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    path, generator = tmp_path / "changed.gguf", random.Random(0)
    head = len(SOUND) - 272
    changed = [SOUND[:length] for length in range(len(SOUND))]
    for at in range(head):
        for _ in range(4):
            changed.append(SOUND[:at] + bytes([generator.randrange(256)]) + SOUND[at + 1 :])
    refused = 0
    for raw in changed:
        path.write_bytes(raw)
        try:
            found = read_gguf(path, path.name)
        except CorruptModel:
            refused += 1
        else:
            assert all(found.data_start + info.end <= len(raw) for info in found.tensors.values())
    assert refused > len(SOUND)
