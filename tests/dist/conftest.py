from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes, started once: importing the libraries takes longer than any case here."""
    with Ranks(4) as made:
        yield made


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """References are computed as the ranks compute, beside them on the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
