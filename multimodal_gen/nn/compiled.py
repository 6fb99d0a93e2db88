"""Regional compilation: layers that a model repeats are compiled once, by torch.compile; what joins them is not.

Inside, our own kernels stand back (`native.Function.of`): the compiler fuses what they fuse. What it must not look into
is marked `@eager_break`. Forward hooks stay outside, so streamed layers wait for their weights as always.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import torch
from torch import nn

from multimodal_gen.environment import compiler_of_choice
from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import eager, native


def check(device: torch.device) -> None:
    """Raises: ConfigError where nothing can be compiled."""
    if device.type == "cuda" and not native.has_triton():
        raise ConfigError("--compile needs triton on a GPU: pip install 'multimodal-gen[gpu]'.", param="compile")
    chosen = compiler_of_choice()
    if device.type == "cpu" and not any(map(shutil.which, [chosen] if chosen else ["g++", "clang++", "c++"])):
        raise ConfigError("--compile needs a C++ compiler on a CPU, and none is on PATH.", param="compile")


def compile_layers(layers: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Each layer's forward is compiled at its first call by a backend of torch.compile; layers of a kind share code."""
    eager.tell_compiler()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
