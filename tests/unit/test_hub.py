from __future__ import annotations

from pathlib import Path

import pytest

from multimodal_gen.errors import ModelNotFound, RemoteCodeRefused
from multimodal_gen.weights.checkpoint import verify
from multimodal_gen.weights.hub import UNWANTED, bundled, resolve, wanted_files
from tests.support.folders import write_json, write_model

pytestmark = [pytest.mark.unit]


def find(model_path: str, *, revision: str | None = None) -> Path:
    return resolve(model_path, revision=revision, local_files_only=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def in_cache(cache: Path, repository: str, revision: str = "main") -> Path:
    """Where the hub library keeps a repository that it has downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / revision).write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / commit


def test_bundled_models_are_whole() -> None:
    assert "emoji-image" in bundled()
    for name in bundled():
        assert verify(find(name)).parameters > 0


def test_a_local_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "mine")
    assert find(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert find("mine").samefile(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/mine") == tmp_path / "mine"


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(ModelNotFound, match="Did you mean 'emoji-image'") as caught:
        find("emoji_image")
    assert "no folder of that name" in caught.value.message
    assert caught.value.param == "model_path"


@pytest.mark.parametrize(
    "name",
    ["../x", "./nope", "/no/such/folder", "a/b/c", "", " ", "a\nb", "a\0b", "~nobody-here/x", "x" * 5000],
)
def test_names_that_are_nothing_are_refused_without_a_download(name: str, cache: Path) -> None:
    with pytest.raises(ModelNotFound):
        resolve(name, revision=None, local_files_only=False)
    assert not cache.exists()


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelNotFound, match="is a file"):
        find(str(file))


def test_a_repository_that_was_never_downloaded(cache: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"'owner/name' at revision 'v2'.*not been downloaded.*--local-files-only"):
        find("owner/name", revision="v2")


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_downloaded_repository_is_found(cache: Path, revision: str | None) -> None:
    snapshot = write_model(in_cache(cache, "owner/name", revision or "main"))
    assert find("owner/name", revision=revision) == snapshot
    assert verify(find("owner/name", revision=revision)).pipeline_class == "FluxPipeline"


def test_a_hostile_repository_is_refused_by_its_index(cache: Path) -> None:
    write_json(in_cache(cache, "owner/name") / "model_index.json", {"_class_name": ["pipeline", "Evil"]})
    with pytest.raises(RemoteCodeRefused):
        find("owner/name")


def test_a_repository_in_another_format(cache: Path) -> None:
    write_json(in_cache(cache, "owner/name") / "config.json", {})
    with pytest.raises(ModelNotFound, match=r"has no model_index\.json"):
        find("owner/name")


def test_only_the_pipelines_own_safetensors_and_text_files_are_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    taken = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/spiece.model",
        "tokenizer/chat_template.jinja",
    ]
    left = [
        "README.md",
        "pipeline.py",
        "whole-model.safetensors",
        "extra/diffusion_pytorch_model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/openvino_model.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.pt",
        "text_encoder/modeling.py",
    ]
    patterns = wanted_files(["scheduler", "text_encoder", "tokenizer"])
    assert list(filter_repo_objects(taken + left, allow_patterns=patterns, ignore_patterns=list(UNWANTED))) == taken
