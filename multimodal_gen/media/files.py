"""Names for new image files, and writing them so that no file is ever overwritten or left half written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import unicodedata
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from multimodal_gen.errors import InvalidValue

SLUG_CHARS = 40
# A prompt in a script of three-byte letters must still fit a file name (255 bytes on most file systems).
SLUG_BYTES = 120


def file_name(seed: int, prompt: str, extension: str, now: datetime) -> str:
    """`YYYYMMDD-HHMMSS_seed_slug.ext`; the slug holds only letters and digits of the prompt, joined by hyphens."""
    return f"{now:%Y%m%d-%H%M%S}_{seed}_{slug(prompt)}.{extension.lstrip('.')}"


def slug(text: str) -> str:
    """A short file-name part from any text: no separators, dots, controls or quotes; never empty."""
    normal = unicodedata.normalize("NFC", text[:1000]).lower()
    words = "".join(c if c.isalnum() else " " for c in normal).split()
    short = "-".join(words)[:SLUG_CHARS]
    short = short.encode("utf-8")[:SLUG_BYTES].decode("utf-8", "ignore").strip("-")
    return short or "image"


def write_new(folder: Path, name: str, data: bytes) -> Path:
    """Write `data` under a free name in `folder` (created if missing): `name`, else `name_1`, `name_2`, …

    The file appears complete or not at all. Raises: OSError as the file system reports it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = os.path.splitext(name)
    names = itertools.chain([name], (f"{stem}_{i}{suffix}" for i in itertools.count(1)))
    written = _publish(folder, data, (folder / free for free in names))
    assert written is not None, "names never end"
    return written


def write_exactly(path: Path, data: bytes) -> Path:
    """Write `data` to `path` (its folder is created if missing).

    Raises: InvalidValue when something is there already; OSError as the file system reports it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _publish(path.parent, data, [path]) is None:
        raise taken(path)
    return path


def taken(path: Path, param: str = "output") -> InvalidValue:
    """The error for an output that would overwrite something; `param` names the setting that holds the path."""
    return InvalidValue(f"{path} exists already and is never overwritten; choose another name.", param=param)


def _publish(folder: Path, data: bytes, candidates: Iterable[Path]) -> Path | None:
    """Write and fsync a hidden temporary file, then give it the first candidate name that is free."""
    hidden = folder / f".mmgen-{secrets.token_hex(8)}.tmp"
    try:
        with open(hidden, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        target = next((name for name in candidates if _claim(hidden, name)), None)
    finally:
        hidden.unlink(missing_ok=True)
    _sync_folder(folder)
    return target


def _claim(hidden: Path, target: Path) -> bool:
    """Give `hidden` the name `target` unless that is taken. A hard link fails on a taken name; a rename would not."""
    try:
        os.link(hidden, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _claim_without_links(hidden, target)
    return True


def _claim_without_links(hidden: Path, target: Path) -> bool:
    """For file systems without hard links: reserve the name with an empty file of our own, then rename over it."""
    try:
        open(target, "xb").close()
    except FileExistsError:
        return False
    os.replace(hidden, target)
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the file system can; Windows has no such call."""
    if os.name == "nt":
        return
    # FUSE and CIFS refuse to sync a folder, and a write-only folder cannot be opened. The file is published and its
    # bytes are synced by now: an error would deny a file that is there, and a retry would write it a second time.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
