from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen.errors import CorruptModel, RemoteCodeRefused
from multimodal_gen.weights.checkpoint import verify
from multimodal_gen.weights.hub import ASSETS
from tests.support.folders import with_header, write_json, write_model

pytestmark = [pytest.mark.unit]

SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_folder_is_counted(folder: Path) -> None:
    checkpoint = verify(folder)
    assert checkpoint.pipeline_class == "FluxPipeline"
    assert set(checkpoint.components) == {"scheduler", "tokenizer", "transformer", "vae"}
    assert checkpoint.settings == {"boundary_ratio": 0.875}
    transformer = checkpoint.components["transformer"]
    assert [file.name[24:29] for file in transformer.files] == ["00001", "00002"]
    assert transformer.parameters == 4 + 4 + 1
    assert transformer.dtypes == {"F32", "F16"}
    assert checkpoint.parameters == 9 + 6
    assert checkpoint.dtypes == {"F32", "F16", "BF16"}
    assert checkpoint.bytes == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_the_bundled_model_is_checked_quickly() -> None:
    started = time.perf_counter()
    checkpoint = verify(ASSETS / "emoji-image")
    assert time.perf_counter() - started < 1.0
    assert checkpoint.pipeline_class == "ZImagePipeline"
    assert all(checkpoint.components[name].parameters for name in ("transformer", "vae", "text_encoder"))


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "transformer/config.json",
        "vae/config.json",
        SHARD,
        VAE,
    ],
)
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CorruptModel) as caught:
        verify(folder)
    if missing == "tokenizer/vocab.json":
        assert "tokenizer/ holds no vocabulary" in caught.value.message
    else:
        assert missing in caught.value.message
    assert str(folder) not in caught.value.message


def test_a_missing_component_folder_is_named(folder: Path) -> None:
    edit(folder / "model_index.json", lambda index: index.update(unet=["diffusers", "UNet2DConditionModel"]))
    with pytest.raises(CorruptModel, match="unet/ is missing"):
        verify(folder)


@pytest.mark.parametrize("file", [SHARD, VAE])
@pytest.mark.parametrize("keep", [0, 5, 8, 40, -5, -1])
def test_truncation_is_found_in_every_region(folder: Path, file: str, keep: int) -> None:
    """0: empty; 5: inside the length; 8: no header; 40: inside the header; negative: inside the tensors."""
    raw = (folder / file).read_bytes()
    (folder / file).write_bytes(raw[:keep])
    with pytest.raises(CorruptModel, match=file):
        verify(folder)


@pytest.mark.parametrize("relative", ["model_index.json", INDEX, "transformer/config.json", "tokenizer/vocab.json"])
def test_truncated_json_is_named(folder: Path, relative: str) -> None:
    path = folder / relative
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptModel, match=relative):
        verify(folder)


def test_flipped_header_bytes_are_found_or_harmless(folder: Path) -> None:
    """Any flipped byte of length and header either raises CorruptModel or leaves layout and dtypes intact."""
    path = folder / VAE
    raw = path.read_bytes()
    messages = []
    for position in range(len(raw) - 12):
        damaged = bytearray(raw)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        try:
            part = verify(folder).components["vae"]
        except CorruptModel as error:
            messages.append(error.message)
        else:
            assert (part.parameters, part.dtypes) == (6, {"BF16"})
    assert all(VAE in message for message in messages)
    assert len(messages) > (len(raw) - 12) // 2


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "not a JSON object"),
        ({"w": 3}, "must have dtype"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "must have dtype"),
        ({"w": entry(dtype="F31")}, "unknown dtype"),
        ({"w": entry(shape=[-2])}, "whole numbers"),
        ({"w": entry(shape=["2"])}, "whole numbers"),
        ({"w": entry(shape=[True, 2])}, "whole numbers"),
        ({"w": entry(begin=-8, end=0)}, "whole numbers"),
        ({"w": entry(begin=8, end=0)}, "needs 8 bytes"),
        ({"w": entry(shape=[2**62, 2**62])}, "needs"),
        ({"w": entry(shape=[3])}, "needs 12 bytes"),
        ({"w": entry(begin=4, end=12)}, "leave a gap"),
        ({"v": entry(), "w": entry()}, "overlap"),
        ({"w": entry(shape=[4], end=16)}, "truncated"),
        ({"w": entry(shape=[1], end=4)}, "longer than"),
    ],
)
def test_impossible_headers_are_refused(folder: Path, header: Any, says: str) -> None:
    (folder / VAE).write_bytes(with_header(header, bytes(8)))
    with pytest.raises(CorruptModel, match=says) as caught:
        verify(folder)
    assert VAE in caught.value.message


@pytest.mark.parametrize("length", [2**63, 100_000_001, 2**64 - 1])
def test_a_huge_header_length_reads_nothing(folder: Path, length: int) -> None:
    (folder / VAE).write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptModel, match="announces a header"):
        verify(folder)


def test_deeply_nested_json_is_no_crash(folder: Path) -> None:
    nested = b"[" * 200_000
    (folder / VAE).write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(CorruptModel, match="not valid JSON"):
        verify(folder)


def test_the_index_may_only_name_shards_beside_it(folder: Path) -> None:
    write_json(folder / INDEX, {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}})
    with pytest.raises(CorruptModel, match="not the name of a safetensors file beside it"):
        verify(folder)


def test_a_tensor_missing_from_its_shard_is_named(folder: Path) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].update(lost=SHARD.split("/")[1]))
    with pytest.raises(CorruptModel, match="lacks the tensor 'lost'"):
        verify(folder)


def test_pickle_weights_are_refused(folder: Path) -> None:
    (folder / VAE).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CorruptModel, match="only pickle weights"):
        verify(folder)


@pytest.mark.parametrize(
    ("relative", "content"),
    [
        ("model_index.json", {"_class_name": ["pipeline", "Evil"]}),
        ("model_index.json", {"vae": ["evil", "AutoencoderKL"]}),
        ("model_index.json", {"vae": ["os.path", "join"]}),
        ("transformer/config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.Evil", None]}}),
    ],
)
def test_models_that_bring_code_are_refused(folder: Path, relative: str, content: dict[str, Any]) -> None:
    edit(folder / relative, lambda old: old.update(content))
    with pytest.raises(RemoteCodeRefused, match=relative):
        verify(folder)


@pytest.mark.parametrize("relative", ["pipeline.py", "vae/diffusers.py"])
def test_code_files_that_a_loader_would_run_are_refused(folder: Path, relative: str) -> None:
    marker = folder / "executed"
    (folder / relative).write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(RemoteCodeRefused, match=relative):
        verify(folder)
    assert not marker.exists()


@pytest.mark.parametrize("value", [None, 3, "", "no class", "../x"])
def test_a_pipeline_class_must_be_a_name(folder: Path, value: Any) -> None:
    edit(folder / "model_index.json", lambda index: index.update(_class_name=value))
    with pytest.raises(CorruptModel, match="_class_name"):
        verify(folder)
