"""What torch holds of a GPU beyond the tensors that are there."""

from __future__ import annotations

import torch


def release_device_memory() -> None:
    """Give it back, after something large was let go of; nothing where no GPU is in use."""
    if not torch.cuda.is_initialized():
        return
    torch._C._cuda_clearCublasWorkspaces()  # 32 MB for each stream that has multiplied
    torch.cuda.empty_cache()
