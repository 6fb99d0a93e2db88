"""The path that a user names for images: one file or a folder, checked before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from multimodal_gen.errors import InvalidValue
from multimodal_gen.media.files import taken
from multimodal_gen.media.recipe import ImageFormat

# Formats that are not written: such a name means a file, and making a folder of it would surprise.
FOREIGN_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jxl", ".ppm", ".svg", ".tga"}
    | {".tif", ".tiff"}
)


@dataclass(frozen=True)
class Target:
    """Where images go: `file`, else new names in `folder`."""

    folder: Path
    file: Path | None = None
    format: ImageFormat | None = None  # by the suffix of `file`


def find_target(path: str | Path, images: int, setting: str) -> Target:
    """What `path`, the value of `setting`, means for so many images: a known image suffix a file, else a folder.

    Makes nothing. Raises: InvalidValue when they cannot be written there.
    """
    path = Path(path)
    try:
        target = _read(path)
        reason = _obstacle(target, images)
    except (OSError, ValueError) as error:  # too long, a NUL, a folder that may not be searched
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if reason is not None:
        raise InvalidValue(f"{setting} {path} cannot be written: {reason}.", param=_param(setting))
    if target.file is not None and _there(target.file):
        raise taken(target.file, _param(setting))
    return target


def _read(path: Path) -> Target:
    from multimodal_gen.media.encode import EXTENSIONS

    suffix = path.suffix.lower()
    if suffix in EXTENSIONS and not (_there(path) and path.is_dir()):
        return Target(path.parent, path, EXTENSIONS[suffix])
    return Target(path)


def _obstacle(target: Target, images: int) -> str | None:
    """Why so many images cannot go there; None = nothing known."""
    from multimodal_gen.media.encode import EXTENSIONS

    if target.file is not None and images > 1:
        return f"it is one file and {images} images are asked for; name a folder"
    suffix = target.folder.suffix.lower()
    if target.file is None and suffix in FOREIGN_SUFFIXES and not _there(target.folder):
        return f"{suffix} is a format that is not written; the suffixes of files are {', '.join(EXTENSIONS)}"
    # A missing folder will be made in the nearest one that is there.
    nearest = next(place for place in (target.folder, *target.folder.parents) if _there(place))
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"there is no permission to write into {nearest}"


def _there(path: Path) -> bool:
    """Whether the name is taken, if only by a dangling link. Raises: OSError, ValueError for names that cannot be."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _param(setting: str) -> str:
    return setting.removeprefix("--")
