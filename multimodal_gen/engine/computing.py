"""How a process computes: its threads and its kernels, settled before a model is loaded."""

from __future__ import annotations

import threading

import torch

from multimodal_gen.config import EngineConfig
from multimodal_gen.environment import default_threads
from multimodal_gen.kernels import native


def settle(config: EngineConfig) -> None:
    """Set threads and kernels; the kernels' library is made, if it must be, while the model is read."""
    threads = config.threads or default_threads()
    # Without --threads never more than there are: whoever holds this engine in its own process may have chosen fewer.
    if threads is not None and (config.threads is not None or threads < torch.get_num_threads()):
        torch.set_num_threads(threads)
    native.choose(config.kernels)
    if config.kernels == "auto":
        threading.Thread(target=native.library, name="kernels", daemon=True).start()
