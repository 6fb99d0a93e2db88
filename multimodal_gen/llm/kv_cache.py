"""Keys and values of all sequences, in pages (PagedAttention: Kwon et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Memory for `pages` pages of `page_size` tokens in every layer. Who has which page is told by `PagePool`.

    One page more belongs to nobody (`spare`): rows that fill a batch up write there.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pages, self.page_size = pages, page_size
        self.spare = pages
        shape = (2, pages + 1, kv_heads, page_size, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]  # keys, values

    @staticmethod
    def page_bytes(layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page, in all layers."""
        return 2 * layers * page_size * kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, kv: Tensor, at: tuple[Tensor, Tensor]) -> None:
        """Put keys and values [T, 2, Hkv, D] at pages and offsets within them, both [T] (`Batch.slots_at`)."""
        page, offset = at
        self.layers[layer][:, page, :, offset] = kv
