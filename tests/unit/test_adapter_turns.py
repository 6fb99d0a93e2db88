"""Turns and slots of adapters, in pure Python."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from multimodal_gen.llm.adapter_turns import TURN_STEPS, AdapterTurns, ReadyAdapters
from tests.support.text import Stepper, text_request

pytestmark = [pytest.mark.unit]


def test_all_compute_where_they_fit():
    turns = AdapterTurns(3)
    for _ in range(50):
        assert turns.choose([None, "a", "b", "a"]) == {None, "a", "b"}


def test_with_one_place_two_adapters_and_the_base_take_turns_and_none_starves():
    turns = AdapterTurns(1)
    chosen = [turns.choose(["a", "b", None]) for _ in range(9 * TURN_STEPS)]
    assert all(len(step) == 1 for step in chosen)
    counts = Counter(next(iter(step)) for step in chosen)
    assert counts == {"a": 3 * TURN_STEPS, "b": 3 * TURN_STEPS, None: 3 * TURN_STEPS}
    for adapter in ("a", "b", None):
        idle = longest_absence(adapter, chosen)
        assert idle <= 2 * TURN_STEPS, (adapter, idle)


def longest_absence(adapter: str | None, chosen: list[frozenset[str | None]]) -> int:
    longest = now = 0
    for step in chosen:
        now = 0 if adapter in step else now + 1
        longest = max(longest, now)
    return longest


def test_a_stream_of_new_texts_of_one_adapter_does_not_keep_the_place():
    """Texts of `a` come and go all the time; the one text of `b` is last in every order."""
    turns = AdapterTurns(1)
    ran = [turns.choose([*["a"] * (1 + step % 5), "b"]) for step in range(4 * TURN_STEPS)]
    assert longest_absence("b", ran) <= TURN_STEPS


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_get_their_turn_within_the_promise(seed: int):
    rng = random.Random(seed)
    limit, everyone = rng.randint(1, 4), [None, *"abcdefgh"[: rng.randint(1, 8)]]
    turns, absent = AdapterTurns(limit), Counter[str | None]()
    bound = -(-len(everyone) // limit) * TURN_STEPS
    gone: set[str | None] = set()
    for _ in range(1500):
        for adapter in everyone:  # texts start and end
            if rng.random() < 0.02:
                gone ^= {adapter}
        wanted = [adapter for adapter in everyone if adapter not in gone]
        rng.shuffle(wanted)
        chosen = turns.choose(wanted)
        assert len(chosen) == min(limit, len(wanted)), "no place is left empty while somebody waits"
        assert chosen <= set(wanted)
        for adapter in everyone:
            absent[adapter] = 0 if adapter in chosen or adapter in gone else absent[adapter] + 1
            assert absent[adapter] <= bound


def test_the_same_calls_choose_the_same_on_every_rank():
    rng = random.Random(1)
    calls = [[rng.choice([None, "a", "b", "c"]) for _ in range(rng.randint(1, 6))] for _ in range(300)]
    one, other = AdapterTurns(2), AdapterTurns(2)
    assert [one.choose(call) for call in calls] == [other.choose(call) for call in calls]


def test_adapters_leave_before_the_base_and_the_least_used_first():
    slots = ReadyAdapters(3)
    assert slots.bring([None]) == []
    assert slots.bring(["a"]) == []
    assert slots.bring(["b"]) == []
    assert slots.bring(["a"]) == []  # used again: b is the least used adapter, the base less than both
    assert slots.bring(["c"]) == ["b"]
    assert list(slots.held) == [None, "a", "c"]
    assert slots.bring(["d", "e"]) == ["a", "c"]
    assert slots.bring(["d", "e", "f"]) == [None], "the base goes where every place is wanted, and only then"


def test_one_slot_holds_whoever_computes():
    slots = ReadyAdapters(1)
    assert [list(slots.bring([who])) for who in ("a", "b", None, "a")] == [[], ["a"], ["b"], [None]]


def test_what_is_wanted_now_never_leaves():
    rng, slots = random.Random(3), ReadyAdapters(4)
    for _ in range(2000):
        wanted = rng.sample([None, *"abcdefgh"], rng.randint(1, 4))
        leaving = slots.bring(wanted)
        assert not set(leaving) & set(wanted)
        assert set(wanted) <= set(slots.held)
        assert len(slots.held) <= 4
        if None in leaving:
            assert None not in wanted
            assert set(slots.held) == set(wanted), "an adapter stayed while the base had to leave"


@pytest.mark.parametrize("pages", [64, 14])
@pytest.mark.parametrize("sequences", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [3, 8, 16, 40])
def test_an_endless_queue_of_one_adapter_keeps_no_other_out(length: int, sequences: int, pages: int):
    """One place, places and pages of the scheduler all taken by `a`, and more of it always waits."""
    stepper, count = Stepper(pages=pages, sequences=sequences, adapters=1, step_tokens=12), 0

    def more() -> None:
        nonlocal count
        while stepper.scheduler.waiting < 8:
            prompt = range(50 * count, 50 * count + 10)
            stepper.scheduler.add(text_request(f"a{count}", prompt, length, adapter="a"))
            count += 1

    for _ in range(20):
        more()
        stepper.step()
    for name, adapter in (("b", "b"), ("base", None)):
        stepper.scheduler.add(text_request(name, range(10), 8, adapter=adapter))
    ahead = count  # in order of arrival
    while not {("b", 0), ("base", 0)} <= set(stepper.finished):
        more()
        stepper.step()
        answered = len(stepper.finished)
        assert answered <= ahead + 20, f"{answered} requests were answered, of which {ahead} came before"
