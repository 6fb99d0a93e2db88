"""The recipe of an image: all that makes the same image again, kept in the metadata of its file.

A recipe travels as ASCII JSON (every other character escaped), so that no prompt can break the file around it:

    PNG             text chunk `mmgen`
    JPEG, WebP      EXIF UserComment; in a JPEG whose EXIF block would pass 64 KiB, the comment segments
    MP4, WebM, GIF  the comment

It names no time and no folder: replaying a recipe gives a byte-identical file.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from multimodal_gen.adapters import Pin
from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import InvalidValue, NotFound
from multimodal_gen.request import MAX_PROMPT_CHARS, AnyRequest, ImageRequest, ModelCard, VideoRequest
from multimodal_gen.step_cache import write
from multimodal_gen.version import __version__

SCHEMA = 1
PNG_KEY = "mmgen"
EXIF_IFD = 0x8769
USER_COMMENT = 0x9286
USER_COMMENT_ASCII = b"ASCII\0\0\0"

_COMMIT = re.compile("[0-9a-f]{40}")

ImageFormat = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4", "webm", "gif"]
VIDEO_MAGIC = (("mp4", 4, b"ftyp"), ("webm", 0, b"\x1a\x45\xdf\xa3"), ("gif", 0, b"GIF8"))
"""format, and the bytes at a place of its files"""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One output of one request and the engine's settings that shape its pixels. Fields as in `ImageRequest` and
    `VideoRequest`.
    """

    schema: int = SCHEMA
    """raised when the meaning of a field changes"""
    version: str
    """of this package"""
    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    """of the whole request: images of one request share forwards"""
    index: int
    """which of the seeds made this image"""
    cfg_normalization: float = 0.0
    cfg_truncation: float | None = None
    num_frames: int | None = None
    """None for images"""
    fps: int | None = None
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    image_sha256: str | None = None
    """of the picture that the video starts from, as `VideoRequest.image` holds it"""
    max_sequence_length: int
    step_cache: str | None = None
    """which steps may have been extrapolated, every value spelled out; None: all were computed"""
    dtype: str
    device: str
    deterministic: bool
    attention_backend: str
    quantize: str = "none"
    """as set, as the next three"""
    kernels: str = "auto"
    compiled: bool = False
    vae_tiling: bool = False
    repository: str | None = None
    """hub repository id; None for bundled models and local folders, whose paths are nobody's business"""
    revision: str | None = None
    """of the repository"""
    max_batch_tokens: int | None = None
    """as set; None = the device's default"""
    threads: int | None = None
    """CPU threads in use: sums over other portions round differently"""
    loras: tuple[Pin, ...] = ()
    """adapters in order, per module tree, by name and by the digest of their file"""
    merged: tuple[str, ...] = ()
    """module trees whose adapters were merged into the weights"""
    output_format: ImageFormat | VideoFormat = "png"
    """filled by `encode_image` and `write_video`"""
    output_compression: int = 100
    """filled by `encode_image`"""

    @classmethod
    def of(
        cls,
        request: AnyRequest,
        index: int,
        *,
        dtype: str,
        device: str,
        attention_backend: str,
        deterministic: bool,
        quantize: str = "none",
        kernels: str = "auto",
        compiled: bool = False,
        vae_tiling: bool = False,
        repository: str | None = None,
        revision: str | None = None,
        max_batch_tokens: int | None = None,
        threads: int | None = None,
        merged: tuple[str, ...] = (),
    ) -> Recipe:
        """The recipe of image `index` of `request`, run by an engine with these settings (`Ready`, `PipelineInfo`).

        `repository` and `revision` are what `origin` returns.
        """
        return cls(
            version=__version__,
            model=request.model,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seeds=request.seeds,
            index=index,
            max_sequence_length=request.max_sequence_length,
            step_cache=None if request.step_cache is None else write(request.step_cache),
            dtype=dtype,
            device=device,
            deterministic=deterministic,
            attention_backend=attention_backend,
            quantize=quantize,
            kernels=kernels,
            compiled=compiled,
            vae_tiling=vae_tiling,
            repository=repository,
            revision=revision,
            max_batch_tokens=max_batch_tokens,
            threads=threads,
            loras=request.loras,
            merged=merged,
            **_own(request),
        )

    @property
    def seed(self) -> int:
        """The seed of this image."""
        return self.seeds[self.index]

    def to_json(self) -> str:
        """ASCII only; any string, lone surrogates included, survives the way there and back."""
        return json.dumps(msgspec.to_builtins(self), ensure_ascii=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Raises: InvalidValue when the text is not a recipe that this version understands."""
        try:
            recipe = msgspec.convert(json.loads(text), cls)
        except (ValueError, RecursionError) as error:
            raise InvalidValue(f"The recipe is damaged: {_short(error)}.") from None
        if recipe.schema > SCHEMA:
            raise InvalidValue(
                f"The recipe was made by multimodal_gen {recipe.version[:40]}, whose recipes this version "
                f"({__version__}) does not understand; update multimodal_gen."
            )
        if not 0 <= recipe.index < len(recipe.seeds):
            raise InvalidValue(f"The recipe is damaged: image {recipe.index} of {len(recipe.seeds)}.")
        return recipe

    def parameters_text(self) -> str:
        """The settings in the layout that A1111-style tools read from the PNG chunk `parameters`."""
        pairs = {
            "Steps": self.num_inference_steps,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            "Version": f"multimodal_gen {self.version}",
        }
        if self.step_cache is not None:
            pairs["Step cache"] = self.step_cache
        if self.loras:
            pairs["Lora hashes"] = ", ".join(f"{pin.nickname}: {pin.sha256[:12]}" for pin in self.loras)
        tags = dict.fromkeys(f" <lora:{pin.nickname}:{pin.strength:g}>" for pin in self.loras)
        lines = [printable(self.prompt) + "".join(tags)]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {printable(self.negative_prompt)}")
        lines.append(", ".join(f"{key}: {_quoted(printable(str(value)))}" for key, value in pairs.items()))
        return "\n".join(lines)


def _own(request: AnyRequest) -> dict[str, Any]:
    """What only images, or only videos have."""
    if isinstance(request, ImageRequest):
        return {"cfg_normalization": request.cfg_normalization, "cfg_truncation": request.cfg_truncation}
    assert isinstance(request, VideoRequest)
    return {
        "num_frames": request.num_frames,
        "fps": request.fps,
        "guidance_scale_2": request.guidance_scale_2,
        "flow_shift": request.flow_shift,
        "image_sha256": None if request.image is None else hashlib.sha256(request.image).hexdigest(),
    }


def origin(config: EngineConfig, card: ModelCard) -> tuple[str | None, str | None]:
    """The hub repository that a described model came from and its revision, as exactly as known; else (None, None)."""
    name = config.model_path
    # Bundled models have no slash in their name, and a local folder is where its name says.
    if "/" not in name or Path(card.path) == Path(name).expanduser():
        return None, None
    # The hub's cache keeps a snapshot in a folder named by its commit; a branch may move on.
    snapshot = Path(card.path).name
    return name, snapshot if _COMMIT.fullmatch(snapshot) else config.revision


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates replaced: NUL would end a text chunk early."""
    return "".join(c if _plain(c) else "\N{REPLACEMENT CHARACTER}" for c in text[: 2 * MAX_PROMPT_CHARS])


def read_recipe(path: str | Path) -> Recipe:
    """The recipe kept in a file that this package wrote.

    Raises: NotFound when there is no such file; InvalidValue when it is no image or video of a kind that this package
    writes, or holds no recipe.
    """
    from PIL import Image, UnidentifiedImageError

    text: str | bytes | None
    try:
        if _is_video(path):
            from multimodal_gen.media.video import read_comment

            text = read_comment(str(path))
        else:
            with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
                text = _stored_text(image)
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}.") from None
    except UnidentifiedImageError:
        raise InvalidValue(f"{path} is not a PNG, JPEG or WebP image, nor an MP4, WebM or GIF video.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidValue(f"Cannot read {path}: {_short(error)}.") from None
    if text is None:
        raise InvalidValue(
            f"{path} holds no recipe: multimodal_gen did not write it, it was written with --no-metadata, or a program "
            "that edited it dropped the metadata."
        )
    return Recipe.from_json(text)


def _is_video(path: str | Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(16)
    return any(head[at : at + len(magic)] == magic for _, at, magic in VIDEO_MAGIC)


def _stored_text(image: object) -> str | bytes | None:
    from PIL import JpegImagePlugin, PngImagePlugin
    from PIL.Image import Image

    assert isinstance(image, Image)
    if isinstance(image, PngImagePlugin.PngImageFile):
        text = image.info.get(PNG_KEY)
        return text if isinstance(text, str) else None
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(USER_COMMENT_ASCII + b"{"):
        return comment.removeprefix(USER_COMMENT_ASCII)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        segments = b"".join(data for marker, data in image.applist if marker == "COM")
        return segments if segments.startswith(b"{") else None
    return None


def _plain(char: str) -> bool:
    code = ord(char)
    return char in "\n\t" or not (code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code <= 0xDFFF)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:"\n') else text


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
