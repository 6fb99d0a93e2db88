"""A multipart/form-data body, read as it arrives: every number that a client controls is bounded, and nobody looks at
names of files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from multimodal_gen.errors import ImageTooLarge, InvalidMultipart
from multimodal_gen.media.reference import too_many_bytes

MAX_PARTS = 200
MAX_TEXT_BYTES = 256 * 1024  # of all text together; a prompt has at most 32,000 characters of four bytes
MAX_NAME_BYTES = 256
MAX_HEADER_BYTES = 16 * 1024  # some clients send long names of files


@dataclass
class Form:
    """What was sent, in the order of arrival; names may repeat."""

    texts: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)


async def read_form(content_type: str, chunks: AsyncIterator[bytes], max_file_bytes: int) -> Form:
    """The parts of a body.

    Raises: InvalidMultipart for anything that is no complete form within bounds; ImageTooLarge; what `chunks` raises.
    """
    reader = _Reader(_boundary(content_type), max_file_bytes)
    async for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


class FileForm:
    """A form with one file, which is passed on as it arrives, whatever its size; bounds of the body are its bounds."""

    def __init__(self, content_type: str, field: str) -> None:
        """`field`: the file's. Raises: InvalidMultipart."""
        self.texts: list[tuple[str, str]] = []  # complete once the file has been read
        self._field = field
        self._reader = _Reader(_boundary(content_type), max_file_bytes=0)
        self._piece = bytearray()
        self._reader.on_file = self._take

    async def file(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The file's bytes, piece by piece; every part of the body is read.

        Raises: InvalidMultipart, also for a form without the file or with several; what `chunks` raises.
        """
        async for chunk in chunks:
            self._reader.feed(chunk)
            if self._piece:
                piece, self._piece = bytes(self._piece), bytearray()
                yield piece
        form = self._reader.finish()
        if len(form.files) != 1:
            raise InvalidMultipart(f"The form must have one file, in the field {self._field!r}.")
        self.texts = form.texts

    def _take(self, name: str, data: memoryview) -> None:
        if name != self._field:
            raise InvalidMultipart(f"The field {name[:64]!a} cannot be a file; the file is {self._field!r}.")
        self._piece += data


def _boundary(content_type: str) -> bytes:
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidMultipart("The header Content-Type names no boundary: multipart/form-data; boundary=….")
    return boundary


class _Reader:
    """Callbacks of the parser; they build one part at a time."""

    def __init__(self, boundary: bytes, max_file_bytes: int) -> None:
        self._form = Form()
        self._max_file_bytes = max_file_bytes
        self._parts = 0
        self._text_bytes = 0
        self._ended = False
        self.on_file: Callable[[str, memoryview], None] | None = None  # takes the bytes of files instead of the form
        self._header, self._value = bytearray(), bytearray()
        self._name, self._is_file = "", False
        self._data = bytearray()
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ended,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_ended,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks, max_header_size=MAX_HEADER_BYTES)
        except FormParserError:
            raise InvalidMultipart("The boundary of the form is too long.") from None

    def feed(self, chunk: bytes) -> None:
        """Raises: InvalidMultipart, ImageTooLarge."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise InvalidMultipart("The body is not a multipart form with the boundary of its Content-Type.") from None

    def finish(self) -> Form:
        """Raises: InvalidMultipart for a form without an end."""
        if not self._ended:
            raise InvalidMultipart("The form is cut off, or its boundary is not that of its Content-Type.")
        return self._form

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidMultipart(f"The form has more than {MAX_PARTS} parts.")
        self._name, self._is_file = "", False
        self._data = bytearray()

    def _header_ended(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            kind, options = parse_options_header(self._value.decode("latin-1"))
            name = options.get(b"name", b"")
            if kind != b"form-data" or not name or len(name) > MAX_NAME_BYTES:
                raise InvalidMultipart("Every part needs 'Content-Disposition: form-data; name=\"…\"'.")
            self._name, self._is_file = name.decode("utf-8", "replace"), b"filename" in options
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        if not self._name:
            raise InvalidMultipart("Every part needs 'Content-Disposition: form-data; name=\"…\"'.")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file and self.on_file is not None:
            self.on_file(self._name, memoryview(data)[start:end])
            return
        self._data += memoryview(data)[start:end]
        if self._is_file and len(self._data) > self._max_file_bytes:
            error: ImageTooLarge = too_many_bytes(self._max_file_bytes)
            raise error
        if not self._is_file and self._text_bytes + len(self._data) > MAX_TEXT_BYTES:
            raise InvalidMultipart(f"The text of a form may have at most {MAX_TEXT_BYTES // 1024} KiB.")

    def _part_ended(self) -> None:
        if self._is_file:
            self._form.files.append((self._name, bytes(self._data)))
            return
        self._text_bytes += len(self._data)
        try:
            self._form.texts.append((self._name, self._data.decode("utf-8")))
        except UnicodeDecodeError:
            raise InvalidMultipart(f"The text of {self._name[:64]!a} is not UTF-8.") from None

    def _end(self) -> None:
        self._ended = True
