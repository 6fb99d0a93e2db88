"""Where there is no GPU, Triton kernels run in Triton's interpreter, which is chosen when a kernel is defined."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch


def _multiply_bfloat16_as_numbers() -> None:
    """Triton's interpreter has bfloat16 as integers, and multiplies those in `tl.dot`."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.create_dot = create_dot


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        _multiply_bfloat16_as_numbers()
