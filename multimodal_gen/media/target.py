"""The path that a user names for images or videos: one file or a folder, checked before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from multimodal_gen.errors import InvalidValue
from multimodal_gen.media.files import taken
from multimodal_gen.media.recipe import ImageFormat, VideoFormat
from multimodal_gen.request import Media

# Formats that are not written: such a name means a file, and making a folder of it would surprise.
FOREIGN_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jxl", ".ppm", ".svg", ".tga", ".tif"}
    | {".tiff", ".avi", ".mkv", ".mov", ".mpg", ".mpeg", ".ogv", ".flv", ".wmv", ".m4v"}
)


@dataclass(frozen=True)
class Target:
    """Where outputs go: `file`, else new names in `folder`."""

    folder: Path
    file: Path | None = None
    format: ImageFormat | VideoFormat | None = None  # by the suffix of `file`


def find_target(path: str | Path, outputs: int, setting: str, media: Media = "image") -> Target:
    """What `path`, the value of `setting`, means for so many outputs: a known suffix a file, else a folder.

    Makes nothing. Raises: InvalidValue when they cannot be written there.
    """
    path = Path(path)
    try:
        target = _read(path, media)
        reason = _obstacle(target, outputs, media)
    except (OSError, ValueError) as error:  # too long, a NUL, a folder that may not be searched
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if reason is not None:
        raise InvalidValue(f"{setting} {path} cannot be written: {reason}.", param=_param(setting))
    if target.file is not None and _there(target.file):
        raise taken(target.file, _param(setting))
    return target


def _read(path: Path, media: Media) -> Target:
    from multimodal_gen.media.formats import BY_SUFFIX

    suffix, known = path.suffix.lower(), BY_SUFFIX[media]
    if suffix in known and not (_there(path) and path.is_dir()):
        return Target(path.parent, path, known[suffix])
    return Target(path)


def _obstacle(target: Target, outputs: int, media: Media) -> str | None:
    """Why so many outputs cannot go there; None = nothing known."""
    from multimodal_gen.media.formats import BY_SUFFIX

    if target.file is not None and outputs > 1:
        return f"it is one file and {outputs} {media}s are asked for; name a folder"
    suffix = target.folder.suffix.lower()
    foreign = FOREIGN_SUFFIXES.union(*BY_SUFFIX.values()) - BY_SUFFIX[media].keys()
    if target.file is None and suffix in foreign and not _there(target.folder):
        return f"{suffix} is no format for {media}s; the suffixes of files are {', '.join(BY_SUFFIX[media])}"
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
