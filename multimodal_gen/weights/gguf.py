"""Tensors of a GGUF file, dequantised block by block, under the names and in the order of rows of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from multimodal_gen.errors import CorruptModel
from multimodal_gen.weights.dequantize import dequantize
from multimodal_gen.weights.gguf_header import read_gguf
from multimodal_gen.weights.reader import BLOCK_BYTES, DTYPES, Layout, TensorFile


class GgufFile(TensorFile):
    """One file; any thread may read."""

    def __init__(self, path: Path, names: Callable[[str], str | None], paired: Mapping[str, int]) -> None:
        """
        Args:
            names: the file's name of a tensor → the name that it has here; None: it is left out.
            paired: names (here) of tensors whose rows are heads of this many rows, where rows 2i and 2i + 1 of a head
                are to become rows i and i + half. llama.cpp stores them so for its rotary positions.

        Raises: CorruptModel.
        """
        header = read_gguf(path, str(path))
        tensors = {key: info for name, info in header.tensors.items() if (key := names(name)) is not None}
        for key, head in paired.items():
            if key in tensors and tensors[key].shape[0] % head:
                raise CorruptModel(f"{path}: tensor {key!r} has {tensors[key].shape[0]} rows, in heads of {head}.")
        self._paired = dict(paired)
        super().__init__(path, Layout(tensors, header.data_start))

    def rows_of_a_block(self, key: str) -> int:
        """Of all blocks of a tensor but the last: of a size that stays in the cache as float32, and whole heads."""
        info = self.tensors[key]
        row = info.elements // info.shape[0]
        rows = max(1, BLOCK_BYTES // (4 * row))
        head = self._paired.get(key, 1)
        return max(1, rows // head) * head

    def tensor(self, key: str) -> Tensor:
        """All of it, in memory of its own. Raises: CorruptModel naming the file."""
        info = self.tensors[key]
        made = torch.empty(info.shape, dtype=DTYPES.get(info.dtype, torch.float32))
        for at, block in self.blocks(key):
            made[at].copy_(block)
        return made

    def same_dtype(self, key: str, dtype: torch.dtype) -> bool:
        """Whether a tensor's bytes are those of this dtype."""
        return key not in self._paired and super().same_dtype(key, dtype)

    def _decoded(self, key: str, data: memoryview, shape: tuple[int, ...]) -> Tensor:
        if self.tensors[key].dtype in DTYPES:
            block = super()._decoded(key, data, shape)
        else:
            block = dequantize(self.tensors[key].dtype, data, shape)
        head = self._paired.get(key)
        if head is None:
            return block
        assert shape[0] % head == 0, f"{key}: {shape[0]} rows are no whole heads"
        return block.view(-1, head // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
