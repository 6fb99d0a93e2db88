"""The picture of a request: bytes from a form or a data URL, decoded in a process of its own. Nothing is fetched."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from multimodal_gen.errors import (
    CapacityError,
    InvalidImage,
    InvalidValue,
    TooManyImages,
    UnsupportedParameter,
    UrlNotAllowed,
)
from multimodal_gen.media.process import read_picture
from multimodal_gen.media.reference import too_many_bytes
from multimodal_gen.server.form_fields import PICTURE
from multimodal_gen.server.schemas import shown

_DATA = re.compile(r"data:[a-z0-9.+-]{0,64}/?[a-z0-9.+-]{0,64}(?:;[a-z0-9=._-]{1,64}){0,4};base64,", re.IGNORECASE)
# Decoders at work at once, whatever the number of clients: each may take a core and a gigabyte.
DECODERS = 2
ROOM_BYTES = 256 << 20
"""of all bodies with pictures at a time; one is let in whatever its size"""


class Pictures:
    """Receives and decodes the pictures of one server's requests."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._turn = asyncio.Semaphore(DECODERS)
        self._held = 0  # bytes of bodies that are being received or worked on

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Keep `size` bytes of memory for a body. Raises: CapacityError while other clients' bodies fill it."""
        if self._held and self._held + size > ROOM_BYTES:
            raise CapacityError("The server is busy receiving pictures; try again in a moment.", retry_after=2.0)
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    def bytes_of(self, value: Any) -> bytes | None:
        """The file that `input_reference` holds: a list of files of a form, or `{"image_url": "data:…"}`.

        Raises: TooManyImages, UrlNotAllowed, ImageTooLarge, InvalidImage, UnsupportedParameter, InvalidValue.
        """
        if value is None:
            return None
        if isinstance(value, list):
            if len(value) > 1:
                raise TooManyImages(
                    f"A video starts from one picture; {len(value)} are given in {PICTURE!r}.", param=PICTURE
                )
            if not value:
                return None
            value = value[0]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, dict) or not value.keys() <= {"image_url", "file_id"}:
            raise InvalidValue(
                f'{PICTURE!r} must be a file of a form, or {{"image_url": "data:image/png;base64,…"}} in JSON, got '
                f"{shown(value)}.",
                param=PICTURE,
            )
        if value.get("file_id") is not None:
            raise UnsupportedParameter("This server keeps no files: send the picture itself.", param=PICTURE)
        return self._from_url(value.get("image_url"))

    async def decode(self, data: bytes) -> bytes:
        """The PNG that a video starts from. Raises: the InvalidImage family."""
        try:
            async with self._turn:
                return await read_picture(data, self.max_bytes)
        except InvalidImage as error:
            error.param = PICTURE
            raise

    def _from_url(self, url: Any) -> bytes:
        if not isinstance(url, str):
            raise InvalidValue(f"'image_url' of {PICTURE!r} must be a string, got {shown(url)}.", param=PICTURE)
        head = _DATA.match(url)
        if head is None:
            raise UrlNotAllowed(
                "This server fetches nothing from other places: send the picture as a file of a form, or as a data URL "
                "(data:image/png;base64,…).",
                param=PICTURE,
            )
        if (len(url) - head.end()) * 3 // 4 > self.max_bytes + 2:
            error = too_many_bytes(self.max_bytes)
            error.param = PICTURE
            raise error
        try:
            return base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise InvalidImage("The data URL is not valid base64.", param=PICTURE) from None
