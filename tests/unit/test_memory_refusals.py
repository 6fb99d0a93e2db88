"""Wishes that cannot be honoured are errors that name them."""

from __future__ import annotations

import pytest

from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.plan import Sizes, Wishes, plan
from multimodal_gen.offload import Prefetch

pytestmark = [pytest.mark.unit]

GB = 10**9


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        (Wishes(offload="none", prefetch=Prefetch(8)), "prefetch_layers"),
        (Wishes(offload="component", prefetch=Prefetch(8)), "prefetch_layers"),
        (Wishes(offload="none", host_limit=GB), "host_memory_limit"),
        (Wishes(offload="none", pin=GB), "pin_memory"),
    ],
)
def test_wishes_without_an_effect_are_refused(wishes: Wishes, param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan([Sizes("transformer", "denoise", GB, (GB,) * 4)], wishes, {}, 100 * GB, "cuda")
    assert caught.value.param == param


def test_a_prefetch_that_nothing_would_use_is_not_to_blame() -> None:
    wishes = Wishes(
        offload="layerwise", components={"transformer": "resident"}, prefetch=Prefetch(1, "bytes"), device_limit=2 * GB
    )
    with pytest.raises(ConfigError, match="does not fit"):
        plan([Sizes("transformer", "denoise", GB, (GB,) * 4)], wishes, {}, 100 * GB, "cpu")
