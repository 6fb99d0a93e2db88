"""From a model's name to a folder: bundled models, local folders, hub repositories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from multimodal_gen.errors import ModelNotFound, did_you_mean
from multimodal_gen.weights.checkpoint import INDEX_FILE, read_index

ASSETS = Path(str(files("multimodal_gen"))) / "assets"

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Fetched from each component's folder. Weights at a repository's root are other formats of the same model.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model")
UNWANTED = ("*.fp16.*", "*.bf16.*", "*.non_ema.*", "*/flax_*", "*/openvino_*", "*/onnx*")


def bundled() -> list[str]:
    """Names of the models that ship inside the package."""
    return sorted(index.parent.name for index in ASSETS.glob(f"*/{INDEX_FILE}"))


def resolve(model_path: str, *, revision: str | None, local_files_only: bool) -> Path:
    """The folder of a bundled name, a local folder or a hub repository id, downloaded if need be.

    Only JSON, text and safetensors files of the folders that `model_index.json` lists are downloaded: no pickles, no
    code. Raises: ModelNotFound saying what was tried; CorruptModel and RemoteCodeRefused from the repository's index,
    before any weight is downloaded.
    """
    if model_path in bundled():
        return ASSETS / model_path
    local = find_local(model_path)
    if local is not None and local.is_dir():
        return local
    if local is not None:
        raise ModelNotFound(
            f"{model_path!r} is a file; a model is a folder with {INDEX_FILE} in it.", param="model_path"
        )
    if not REPOSITORY.fullmatch(model_path):
        raise ModelNotFound(
            f"No model {model_path!r}: not a bundled model ({', '.join(bundled())}), no folder of that name here, and "
            "not a hub repository id (owner/name)." + did_you_mean(model_path, bundled()),
            param="model_path",
        )
    return _from_hub(model_path, revision, local_files_only)


def find_local(model_path: str) -> Path | None:
    """The file or folder of that name, if there is one."""
    try:
        path = Path(model_path).expanduser()
        return path if model_path and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user's home, a NUL: names of nothing
        return None


def _from_hub(repository: str, revision: str | None, local_files_only: bool) -> Path:
    first = snapshot(repository, revision, local_files_only, [INDEX_FILE])
    if not (first / INDEX_FILE).exists():
        raise ModelNotFound(
            f"{repository!r} has no {INDEX_FILE}: it is not a pipeline in diffusers format.", param="model_path"
        )
    return snapshot(repository, revision, local_files_only, wanted_files(read_index(first).components))


def wanted_files(parts: Iterable[str]) -> list[str]:
    """Patterns of the files to download for a pipeline of these components."""
    return [INDEX_FILE, *(f"{part}/{kind}" for part in parts for kind in WANTED)]


def snapshot(
    repository: str,
    revision: str | None,
    local_files_only: bool,
    wanted: Sequence[str],
    unwanted: Sequence[str] = UNWANTED,
    param: str = "model_path",
) -> Path:
    """The folder of a repository's files that match `wanted` and not `unwanted`, downloaded if need be.

    `param` is the setting that named it. Raises: ModelNotFound.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
            )
        )
    except hub.GatedRepoError:
        reason = "its owner asks for consent: accept the licence on the model's page and set HF_TOKEN to your token"
    except hub.RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private and HF_TOKEN is not set to a token that may read it"
    except hub.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except hub.LocalEntryNotFoundError:
        if local_files_only:
            reason = "it has not been downloaded before, and downloads are off (--local-files-only)"
        else:
            reason = "it has not been downloaded before, and the hub cannot be reached; check the network"
    except hub.HFValidationError as error:
        reason = f"that is not a repository id ({error})"
    except (hub.HTTPError, OSError) as error:
        reason = f"the download failed ({type(error).__name__}); check the network and the free disk space, then retry"
    raise ModelNotFound(
        f"No model {repository!r}{at}: no bundled model or local folder of that name, and {reason}."
        + did_you_mean(repository, bundled()),
        param=param,
    )
