"""The files of jobs: latent checkpoints while one runs, videos and stills once it is completed.

    FOLDER/lock                                  held by the one server that uses the folder
    FOLDER/jobs.sqlite
    FOLDER/videos/JOB/row-0-step-5.safetensors   the last two of every row
    FOLDER/videos/JOB/0.mp4  0.webp  0.jpg       video, thumbnail and sprite sheet of output 0

Names are made of our own ids and numbers only. A file has its name once it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Literal

from multimodal_gen.errors import ConfigError, StorageFull
from multimodal_gen.media.arrays import from_numpy, to_numpy
from multimodal_gen.media.orders import WriteVideo
from multimodal_gen.media.recipe import Recipe, VideoFormat
from multimodal_gen.messages import Array, RowState
from multimodal_gen.request import VideoRequest

KEPT = 2
Variant = Literal["video", "thumbnail", "spritesheet"]
VARIANTS: dict[Variant, str] = {"video": "", "thumbnail": "webp", "spritesheet": "jpg"}
"""what a completed output can be asked for, and the suffix of its file; that of a video is its format"""

_CHECKPOINT = re.compile(r"row-(\d+)-step-(\d+)\.safetensors")
# What must be free for a job to be accepted: its files are far smaller than its pixels.
SPARE_BYTES = 4 << 20
PIXELS_PER_BYTE = 8

log = logging.getLogger(__name__)


class JobFiles:
    """The folder of one server. All methods belong to one thread."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder and locks it. Raises: ConfigError."""
        self.folder = folder
        self._videos = folder / "videos"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts and pictures are their owners' business
            self._videos.mkdir(exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"The data folder {folder} cannot be used: {error.strerror}. Name another with --data-dir.",
                param="data_dir",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"Another server keeps its jobs in {folder}. Stop it, or give this one its own --data-dir.",
                param="data_dir",
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._lock)

    def begin(self, job_id: str) -> None:
        """Make the job's folder, or clear it of what the run before this one half wrote. Raises: StorageFull."""
        try:
            self._of(job_id).mkdir(exist_ok=True)
            self._discard_parts(job_id)
            _sync(self._videos)
        except OSError as error:
            raise storage_error(error) from None

    def check_room(self, request: VideoRequest) -> None:
        """Raises: StorageFull when the disk is too full for the job to end well."""
        pixels = 3 * request.n * request.num_frames * request.width * request.height
        if shutil.disk_usage(self.folder).free < SPARE_BYTES + pixels // PIXELS_PER_BYTE:
            raise storage_error(OSError(errno.ENOSPC, ""))

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, job_id: str, state: RowState) -> None:
        """Write a checkpoint, then forget the oldest ones of its row. Raises: OSError."""
        from safetensors.numpy import save

        where = {"index": str(state.index), "step": str(state.step), "tensors": json.dumps(list(state.tensors))}
        data = save({name: to_numpy(array) for name, array in state.tensors.items()}, metadata=where)
        folder = self._of(job_id)
        path = folder / f"row-{state.index}-step-{state.step}.safetensors"
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(folder)
        steps = sorted((step for index, step in self._checkpoints(job_id) if index == state.index), reverse=True)
        for step in steps[KEPT:]:
            (folder / f"row-{state.index}-step-{step}.safetensors").unlink(missing_ok=True)

    def resume(self, job_id: str) -> list[RowState]:
        """The newest checkpoint of every row that can be read."""
        states: dict[int, RowState] = {}
        for index, step in sorted(self._checkpoints(job_id), reverse=True):
            if index not in states:
                state = self._load(self._of(job_id) / f"row-{index}-step-{step}.safetensors", index, step)
                if state is not None:
                    states[index] = state
        return [states[index] for index in sorted(states)]

    def discard_checkpoints(self, job_id: str) -> None:
        """Remove the checkpoints of a job that has ended, and what it half wrote."""
        self._discard_parts(job_id)
        for index, step in self._checkpoints(job_id):
            (self._of(job_id) / f"row-{index}-step-{step}.safetensors").unlink(missing_ok=True)

    def _discard_parts(self, job_id: str) -> None:
        """The job's own helpers have ended: nobody will give these files their names."""
        for part in self._of(job_id).glob("*.part"):
            part.unlink(missing_ok=True)

    def _checkpoints(self, job_id: str) -> list[tuple[int, int]]:
        try:
            names = os.listdir(self._of(job_id))
        except FileNotFoundError:
            return []
        found = (_CHECKPOINT.fullmatch(name) for name in names)
        return [(int(match[1]), int(match[2])) for match in found if match]

    def _load(self, path: Path, index: int, step: int) -> RowState | None:
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Array] = {}
        try:
            with safe_open(path, framework="numpy") as file:
                if file.metadata()["index"] != str(index) or file.metadata()["step"] != str(step):
                    raise ValueError("it belongs to another row or step")
                for name in json.loads(file.metadata()["tensors"]):
                    tensors[name] = from_numpy(file.get_tensor(name))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.error("a checkpoint is skipped, %s: %s", path.name, error)
            return None
        return RowState(index, step, tensors)

    # --- outputs --------------------------------------------------------------------------------------------------

    def path(self, job_id: str, index: int, variant: Variant, output_format: VideoFormat) -> Path:
        """Where an output is, or will be."""
        return self._of(job_id) / f"{index}.{VARIANTS[variant] or output_format}"

    def order(self, job_id: str, request: VideoRequest, recipe: Recipe, output_format: VideoFormat) -> WriteVideo:
        """What a helper must do to make the files of output `recipe.index`."""
        video, thumbnail, sheet = (
            str(self.path(job_id, recipe.index, variant, output_format))
            for variant in ("video", "thumbnail", "spritesheet")
        )
        return WriteVideo(
            video=video,
            thumbnail=thumbnail,
            spritesheet=sheet,
            shape=(request.num_frames, request.height, request.width, 3),
            fps=request.fps,
            output_format=output_format,
            recipe=recipe.to_json(),
        )

    def discard(self, job_id: str) -> None:
        """Remove everything of a job."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._of(job_id))

    def sweep(self, known: dict[str, bool]) -> None:
        """After a start: remove what belongs to no job, and what jobs that ended (True) left of their work."""
        for folder in list(self._videos.iterdir()):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if known[folder.name]:
                self.discard_checkpoints(folder.name)
            else:
                self._discard_parts(folder.name)

    def _of(self, job_id: str) -> Path:
        assert "/" not in job_id, job_id
        return self._videos / job_id


def storage_error(error: OSError) -> StorageFull:
    """What a client is told when files cannot be written; the log has the rest."""
    log.error("files of a job cannot be written: %s", error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StorageFull(f"The video's files cannot be stored: {'the disk is full' if full else error.strerror}.")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
