"""`messages.Array` to numpy and back, checked on the way in: the bytes come from another process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from multimodal_gen.errors import GenerationFailed
from multimodal_gen.messages import Array

DTYPES = frozenset({"uint8", "int32", "int64", "float16", "float32", "float64"})


def to_numpy(array: Array) -> npt.NDArray[Any]:
    """A read-only view of the message's data in its shape (no copy).

    Raises: GenerationFailed when dtype, shape and number of bytes do not agree.
    """
    if array.dtype not in DTYPES:
        raise GenerationFailed(f"The worker sent an array of unknown type {array.dtype[:40]!r}.")
    dtype = np.dtype(array.dtype)
    size = memoryview(array.data).nbytes
    if any(side < 0 for side in array.shape) or math.prod(array.shape) * dtype.itemsize != size:
        raise GenerationFailed(f"The worker sent {size} bytes for a {array.dtype} array of shape {array.shape}.")
    view: npt.NDArray[Any] = np.frombuffer(array.data, dtype).reshape(array.shape)
    return view


def from_numpy(values: npt.NDArray[Any]) -> Array:
    """The message for `values`; shares its memory where it is C-contiguous.

    Raises: ValueError for a dtype that messages do not carry (a mistake of the caller).
    """
    if values.dtype.name not in DTYPES:
        raise ValueError(f"Arrays of {values.dtype.name} do not travel; use one of {', '.join(sorted(DTYPES))}.")
    packed = np.ascontiguousarray(values)
    # A zero-size memoryview cannot be cast to bytes.
    data = packed.data.cast("B") if packed.size else memoryview(b"")
    return Array(shape=tuple(values.shape), dtype=values.dtype.name, data=data)
