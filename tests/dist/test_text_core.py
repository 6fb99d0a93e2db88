"""Ranks that share a language model say what one rank says, and decide alike."""

from __future__ import annotations

import pytest
import torch

from multimodal_gen.parallel.degrees import Degrees
from multimodal_gen.parallel.mesh import Mesh
from tests.dist import text_core_cases
from tests.support.ranks import Ranks
from tests.support.text_core import make_text_folder

pytestmark = [pytest.mark.dist]

TWO = Degrees(tp=2)
LITTLE = {"kv_cache_memory": 120_000}  # of one rank: some sequences are preempted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_text_folder("llama", tmp_path_factory.mktemp("llama")))


def test_two_ranks_say_what_one_says(ranks: Ranks, folder: str) -> None:
    # Greedy: a number that chooses at random may lie within rounding of the border between two tokens.
    found = ranks.run(TWO, "tests.dist.text_core_cases:answers", folder=folder, sampled=False, **LITTLE)
    alone = text_core_cases.answers(Mesh.solo(), folder, False, kv_cache_memory=2 * LITTLE["kv_cache_memory"])
    for rank in found:
        assert rank["counts"].tolist()[1] > 0, "there should be preemptions"
        assert rank.keys() == alone.keys()
        assert all(torch.equal(tokens, alone[name]) for name, tokens in rank.items())


def test_ranks_decide_alike_beside_aborts(ranks: Ranks, folder: str) -> None:
    first, second = ranks.run(TWO, "tests.dist.text_core_cases:answers", folder=folder, aborts=True, **LITTLE)
    assert first.keys() == second.keys()
    assert all(torch.equal(tokens, second[name]) for name, tokens in first.items())


def test_what_fails_on_one_rank_fails_on_all_and_nothing_else_does(ranks: Ranks, folder: str) -> None:
    first, second = ranks.run(TWO, "tests.dist.text_core_cases:one_fails", folder=folder)
    assert all(torch.equal(tokens, second[name]) for name, tokens in first.items())


def test_a_sleep_changes_nothing_that_ranks_say(ranks: Ranks, folder: str) -> None:
    for found in ranks.run(TWO, "tests.dist.text_core_cases:sleeps", folder=folder):
        assert torch.equal(found["before"], found["after"])


def test_ranks_agree_on_tokens_that_follow_a_grammar(ranks: Ranks, folder: str) -> None:
    first, second = ranks.run(TWO, "tests.dist.text_core_cases:grammars", folder=folder)
    assert len(first) == 5
    assert all(torch.equal(tokens, second[name]) for name, tokens in first.items())
