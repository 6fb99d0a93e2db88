"""Tensors of a safetensors file, read with `pread` in blocks of rows, straight to where they are wanted.

Files are not mapped: a file that is cut short while it is in use is an error that names it, where a mapping would end
the process (SIGBUS); and what is read and not kept is not counted as memory of this process.

Two ways of reading. Through the page cache a file that fits into free memory comes at the speed of memory, the second
time. Around it (O_DIRECT) a file that is larger than what is free comes at the speed of the disk each time, at a tenth
of the processor's time and without driving other files out (decision 019).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights.header import TensorInfo, read_header

BLOCK_BYTES = 4 << 20  # of a file that are read at a time: they stay in the cache while adapters are merged into them
SECTOR = 4096  # O_DIRECT wants offsets, lengths and addresses that are multiples of it
SAMPLE_BYTES = 64  # of every tensor, to know a file again

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a file are."""

    tensors: dict[str, TensorInfo]  # in file order
    start: int  # byte of the file that their offsets are counted from


@dataclass(frozen=True)
class Stamp:
    """What tells without reading whether a file is as it was."""

    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """Of an open file."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class _Buffers(threading.local):
    """Page-aligned memory of each reading thread."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, BLOCK_BYTES + 2 * SECTOR)

    def at_least(self, size: int) -> mmap.mmap:
        if len(self.memory) < size:
            self.memory = mmap.mmap(-1, size)
        return self.memory


_buffers = _Buffers()


class TensorFile:
    """One file; any thread may read."""

    def __init__(self, path: Path, layout: Layout | None = None) -> None:
        """`layout` is that of a file in another format than safetensors. Raises: CorruptModel."""
        self.path = path
        self.tensors: dict[str, TensorInfo] = read_header(path, str(path)) if layout is None else layout.tensors
        with self._opened(os.O_RDONLY) as file:
            found = os.fstat(file)
            end = max((info.end for info in self.tensors.values()), default=0)
            self._start = found.st_size - end if layout is None else layout.start
            self._stamp = Stamp.of(found)
            self._print = self._fingerprint(file)

    def check(self) -> None:
        """Raises: CorruptModel for a file that is gone, or is not the one that was opened first."""
        with self._opened(os.O_RDONLY) as file:
            self._recognise(file)

    def blocks(self, key: str, rows: slice | None = None, *, direct: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """A tensor, or these of its rows, in blocks of whole rows: (rows counted from the first one, the block).

        Blocks lie in memory that the next one overwrites. A tensor without dimensions is one row.

        Args:
            direct: around the page cache.

        Raises: CorruptModel naming the file.
        """
        info = self.tensors[key]
        shape = info.shape or (1,)
        first, last, _ = (rows or slice(None)).indices(shape[0])
        row_bytes = (info.end - info.begin) // max(1, shape[0])
        step = self.rows_of_a_block(key)
        if not info.elements:
            return
        with self._reading(direct) as file:
            for start in range(first, last, step):
                stop = min(start + step, last)
                begin = self._start + info.begin + start * row_bytes
                data = self._staged(file, begin, (stop - start) * row_bytes, direct)
                yield slice(start - first, stop - first), self._decoded(key, data, (stop - start, *shape[1:]))

    def _decoded(self, key: str, data: memoryview, shape: tuple[int, ...]) -> Tensor:
        """Whole rows as a tensor, which may lie in `data`."""
        return torch.frombuffer(data, dtype=_dtype(self.tensors[key], self.path)).view(shape)

    def rows_of_a_block(self, key: str) -> int:
        """Of all blocks of a tensor but the last."""
        info = self.tensors[key]
        row_bytes = (info.end - info.begin) // max(1, (info.shape or (1,))[0])
        return max(1, BLOCK_BYTES // max(1, row_bytes))

    def tensor(self, key: str) -> Tensor:
        """All of it, in memory of its own. Raises: CorruptModel naming the file."""
        info = self.tensors[key]
        made = torch.empty(info.shape, dtype=_dtype(info, self.path))
        self.read_into(key, None, made)
        return made

    def read_into(self, key: str, rows: slice | None, target: Tensor) -> None:
        """These rows of a tensor into contiguous host memory of its dtype, without a stop on the way."""
        info = self.tensors[key]
        shape = info.shape or (1,)
        first, last, _ = (rows or slice(None)).indices(shape[0])
        row_bytes = (info.end - info.begin) // max(1, shape[0])
        assert target.is_contiguous(), key
        assert target.nbytes == (last - first) * row_bytes, key
        if target.nbytes:
            with self._reading(direct=False) as file:
                self._pread(file, _bytes_of(target), self._start + info.begin + first * row_bytes)

    def same_dtype(self, key: str, dtype: torch.dtype) -> bool:
        """Whether a tensor is stored in this dtype."""
        return DTYPES.get(self.tensors[key].dtype) == dtype

    # --- the file -----------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        try:
            file = os.open(self.path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptModel(f"{self.path} cannot be read: {error.strerror}.") from None
        try:
            yield file
        finally:
            os.close(file)

    @contextmanager
    def _reading(self, direct: bool) -> Iterator[int]:
        """The file, known to be the one that was opened first."""
        if not direct:
            with self._opened(os.O_RDONLY) as file:
                self._recognise(file)
                yield file
            return
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except OSError:  # not every file system can; then its pages are dropped when they were read
            with self._opened(os.O_RDONLY) as file:
                self._recognise(file)
                yield file
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            return
        try:
            self._recognise(file)
            yield file
        finally:
            os.close(file)

    def _recognise(self, file: int) -> None:
        stamp = Stamp.of(os.fstat(file))
        if stamp == self._stamp:
            return
        changed = CorruptModel(f"{self.path} was changed while the model was in use; bring it back, or restart.")
        if stamp.size != self._stamp.size:
            raise changed
        with self._opened(os.O_RDONLY) as buffered:
            if self._fingerprint(buffered) != self._print:
                raise changed
        self._stamp = stamp  # moved away and back, or copied

    def _fingerprint(self, file: int) -> bytes:
        """Of the header and a sample of every tensor; another model of the same shapes differs in nearly all."""
        try:
            found = hashlib.sha256(os.pread(file, self._start, 0))
            for info in self.tensors.values():
                length = min(SAMPLE_BYTES, info.end - info.begin)
                found.update(os.pread(file, length, self._start + info.begin))
        except OSError as error:
            raise CorruptModel(f"{self.path} cannot be read: {error.strerror}.") from None
        return found.digest()

    def _staged(self, file: int, begin: int, length: int, direct: bool) -> memoryview:
        """`length` bytes from `begin` on, in this thread's buffer."""
        memory = memoryview(_buffers.at_least(length + 2 * SECTOR))
        if not direct:
            data = memory[:length]
            self._pread(file, data, begin)
            return data
        low = begin // SECTOR * SECTOR
        high = -(-(begin + length) // SECTOR) * SECTOR
        self._pread(file, memory[: high - low], low, needed=begin + length - low)
        return memory[begin - low : begin - low + length]

    def _pread(self, file: int, target: memoryview, begin: int, needed: int | None = None) -> None:
        """Fill `target`, or `needed` bytes of it, where the file ends in its last sector."""
        done, needed = 0, len(target) if needed is None else needed
        try:
            while done < needed:
                count = os.preadv(file, [target[done:]], begin + done)
                if count == 0:
                    raise CorruptModel(f"{self.path} is truncated: it was longer when the model was loaded.")
                done += count
        except OSError as error:
            raise CorruptModel(f"{self.path} cannot be read: {error.strerror}.") from None


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; `Tensor.numpy` would keep its storage from ever being freed (`resize_`)."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _dtype(info: TensorInfo, path: Path) -> torch.dtype:
    found = DTYPES.get(info.dtype)
    if found is None:
        raise CorruptModel(f"{path}: tensors of dtype {info.dtype} cannot be read.")
    return found
