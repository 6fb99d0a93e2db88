"""Arrays on the wire: exact round trips, and lies about shape or type refused."""

from __future__ import annotations

import numpy as np
import pytest

from multimodal_gen import messages
from multimodal_gen.errors import GenerationFailed
from multimodal_gen.media.arrays import from_numpy, to_numpy
from multimodal_gen.messages import Array

pytestmark = [pytest.mark.unit]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.zeros((0, 3), np.float32),
        np.float16([[1.5]]),
    ],
    ids=["image", "latents", "strided", "empty", "half"],
)
def test_round_trip_over_the_wire(values):
    sent = messages.Preview(request_id="a", index=0, number=0, image=from_numpy(values))
    received = messages.decode_from_worker(messages.encode(sent))
    assert isinstance(received, messages.Preview)
    back = to_numpy(received.image)
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)


def test_no_copy_in_either_direction():
    values = np.zeros((2, 2, 3), np.uint8)
    array = from_numpy(values)
    values[0, 0, 0] = 9
    assert to_numpy(array)[0, 0, 0] == 9


@pytest.mark.parametrize(
    "array",
    [
        Array(shape=(2, 2, 3), dtype="uint8", data=b"\0" * 11),
        Array(shape=(2, 2, 3), dtype="uint8", data=b"\0" * 13),
        Array(shape=(-1, -12), dtype="uint8", data=b"\0" * 12),
        Array(shape=(2**62, 4), dtype="uint8", data=b""),
        Array(shape=(1,), dtype="object", data=b"\0" * 8),
        Array(shape=(1,), dtype="O" * 1000, data=b"\0" * 8),
    ],
)
def test_wrong_sizes_and_types_are_refused(array):
    with pytest.raises(GenerationFailed) as caught:
        to_numpy(array)
    assert len(caught.value.message) < 200


def test_types_that_do_not_travel():
    with pytest.raises(ValueError, match="complex"):
        from_numpy(np.zeros(3, np.complex128))
