"""How a process computes: its threads and its kernels, settled before a model is loaded."""

from __future__ import annotations

import threading

import torch

from multimodal_gen.config import EngineConfig
from multimodal_gen.environment import default_threads
from multimodal_gen.kernels import native


def settle(config: EngineConfig) -> None:
    """Set threads and kernels; the kernels' library is made, if it must be, while the model is read."""
    threads = default_threads() if config.threads is None else config.threads
    if threads is not None:
        torch.set_num_threads(threads)
    native.choose(config.kernels)
    if config.kernels == "auto":
        threading.Thread(target=native.library, name="kernels", daemon=True).start()
