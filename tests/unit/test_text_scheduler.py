"""The scheduler of text: its promises, and thousands of random requests against a model that remembers its pages."""

from __future__ import annotations

import random

import pytest

from multimodal_gen.llm.policies import OLD_SECONDS, POLICIES
from tests.support.text import Stepper, text_request

pytestmark = [pytest.mark.unit]


def ids(slots: list) -> list[str]:
    return [slot.sequence.request.id for slot in slots]


def counts(slots: list) -> dict[str, int]:
    return {slot.sequence.request.id: slot.count for slot in slots}


def test_a_long_prompt_is_read_in_pieces_beside_those_who_write():
    s = Stepper(step_tokens=8)
    s.scheduler.add(text_request("short", range(5)))
    assert counts(s.step()) == {"short": 5}
    s.scheduler.add(text_request("long", range(100, 120)))
    assert counts(s.step()) == {"short": 1, "long": 7}
    assert counts(s.step()) == {"short": 1, "long": 7}
    last = s.step()
    assert counts(last) == {"short": 1, "long": 6}
    assert [slot.logits for slot in last] == [1, 1]
    assert counts(s.step()) == {"short": 1, "long": 1}


def test_those_who_write_go_on_even_where_they_fill_the_step():
    s = Stepper(step_tokens=2)
    for name in "abcd":
        s.scheduler.add(text_request(name, [1], 20))
    for _ in range(4):
        s.step()
    s.scheduler.add(text_request("long", range(3)))
    assert counts(s.step()) == {"a": 1, "b": 1, "c": 1, "d": 1, "long": 1}


def test_half_a_step_is_for_prompts_however_many_write():
    s = Stepper(step_tokens=8, sequences=16)
    for number in range(9):
        s.scheduler.add(text_request(f"w{number}", [number], 30))
    for _ in range(4):
        s.step()
    s.scheduler.add(text_request("long", range(20)))
    assert counts(s.step())["long"] == 4
    assert sum(counts(s.step()).values()) == 9 + 4


def test_logits_are_wanted_at_the_end_of_a_prompt_or_of_all_of_it():
    s = Stepper(step_tokens=8)
    s.scheduler.add(text_request("a", range(10), prompt_logprobs=True))
    assert [(slot.count, slot.logits) for slot in s.step()] == [(8, 8)]
    assert [(slot.count, slot.logits) for slot in s.step()] == [(2, 2)]
    assert [(slot.count, slot.logits) for slot in s.step()] == [(1, 1)]
    s = Stepper(step_tokens=8)
    s.scheduler.add(text_request("a", range(10)))
    assert [(slot.count, slot.logits) for slot in s.step()] == [(8, 0)]
    assert [(slot.count, slot.logits) for slot in s.step()] == [(2, 1)]


def test_a_prompt_seen_before_is_not_read_again_but_for_its_end():
    s = Stepper()
    s.scheduler.add(text_request("a", range(10), 2))
    s.run()
    s.scheduler.add(text_request("b", range(10), 2))
    [slot] = s.step()
    assert (slot.count, slot.sequence.cached) == (2, 8)
    s.run()
    s.scheduler.add(text_request("c", range(8), 2))  # its last token must be read for its logits
    [slot] = s.step()
    assert (slot.count, slot.sequence.cached) == (4, 4)


def test_an_answer_is_found_by_the_next_turn_of_the_chat():
    s = Stepper()
    s.scheduler.add(text_request("a", range(10), 8))
    s.run()
    s.scheduler.add(text_request("b", [*range(10), *s.answers["a", 0], 7, 7, 7], 2))
    [slot] = s.step()
    assert slot.sequence.cached == 16


def test_prompts_are_shared_neither_with_other_adapters_nor_where_their_logits_are_asked_for():
    s = Stepper()
    s.scheduler.add(text_request("a", range(10), 2))
    s.run()
    s.scheduler.add(text_request("b", range(10), 2, adapter="other"))
    s.scheduler.add(text_request("c", range(10), 2, prompt_logprobs=True))
    assert counts(s.step()) == {"b": 10, "c": 10}


def test_without_a_prefix_cache_nothing_stays_and_requests_share_nothing():
    s = Stepper(prefix_cache=False)
    s.scheduler.add(text_request("a", range(10), 9))
    s.step()
    s.scheduler.add(text_request("b", range(10), 2))
    assert counts(s.step()) == {"a": 1, "b": 10}
    s.run()
    assert s.holdings.pool.used == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_choices_share_the_prompt(prefix_cache: bool):
    s = Stepper(prefix_cache=prefix_cache)
    s.scheduler.add(text_request("a", range(17), 4, n=4))
    assert [(slot.sequence.index, slot.count) for slot in s.step()] == [(0, 17)]
    assert [(slot.sequence.index, slot.count) for slot in s.step()] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert s.holdings.pool.used == 4 + 4
    s.run()
    assert len(s.answers) == 4


def test_the_newest_of_the_lowest_priority_is_preempted_and_reads_its_tokens_again():
    s = Stepper(pages=11)
    s.scheduler.add(text_request("low", range(10), 12, priority=-1))
    s.scheduler.add(text_request("old", range(20, 30), 12))
    s.scheduler.add(text_request("new", range(40, 48), 12))
    victims = []
    while not s.scheduler.idle:
        before = s.scheduler.preemptions
        s.step()
        if s.scheduler.preemptions > before:
            victims.append(s.scheduler.queued_ids)
    assert victims[0] == ["low"]
    assert next(name for name, _ in s.finished) == "old"
    alone = Stepper()
    for name, start, stop in (("low", 0, 10), ("old", 20, 30), ("new", 40, 48)):
        alone.scheduler.add(text_request(name, range(start, stop), 12))
        alone.run()
    assert s.answers == alone.answers


def test_a_request_that_needs_all_pages_gets_the_pinned_ones_too():
    s = Stepper(pages=8)
    s.scheduler.add(text_request("system", range(9), 1, keep_prefix=9))
    s.run()
    assert s.holdings.tree.pinned == 2
    s.scheduler.add(text_request("all", range(50, 74), 8))
    s.run()
    assert s.holdings.tree.pinned == 0


def test_a_pinned_prefix_survives_what_evicts_the_rest():
    s = Stepper(pages=16)
    s.scheduler.add(text_request("system", range(9), 1, keep_prefix=9))
    s.run()
    for number in range(20):
        s.scheduler.add(text_request(f"r{number}", range(100 * number, 100 * number + 20), 4))
        s.run()
    s.scheduler.add(text_request("again", [*range(8), 3, 3], 1))
    assert s.step()[0].sequence.cached == 8
    assert s.holdings.tree.evictions > 0


def test_the_longest_prefix_starts_first():
    s = Stepper(policy="lpm", sequences=1)
    s.scheduler.add(text_request("seen", range(20), 1))
    s.run()
    for name, prompt in (("none", range(50, 70)), ("half", [*range(8), 9, 9]), ("most", [*range(16), 9, 9])):
        s.scheduler.add(text_request(name, prompt, 1))
    s.run()
    assert [name for name, _ in s.finished] == ["seen", "most", "half", "none"]


def test_the_routing_key_that_most_running_ones_have_starts_first_and_no_key_last():
    s = Stepper(policy="routing-key", sequences=3)
    for name, key in (("a", "x"), ("b", "y"), ("c", "y")):
        s.scheduler.add(text_request(name, [1, 2], {"a": 3}.get(name, 9), routing_key=key))
    s.step()
    for name, key in (("none", None), ("x", "x"), ("y", "y")):
        s.scheduler.add(text_request(name, [3, 4], 1, routing_key=key))
    s.run()
    assert [name for name, _ in s.finished][1:4] == ["y", "x", "none"]


def test_the_highest_priority_starts_first_but_waiting_counts():
    s = Stepper(policy="priority", sequences=1)
    s.scheduler.add(text_request("now", [1], 2))
    s.step()
    for name, priority in (("none", 0), ("high", 2), ("low", -1)):
        s.scheduler.add(text_request(name, [1], 1, priority=priority))
    s.run()
    assert [name for name, _ in s.finished] == ["now", "high", "none", "low"]
    s.scheduler.add(text_request("patient", [1], 1))
    s.clock.now += 3 * OLD_SECONDS
    s.scheduler.add(text_request("important", [1], 1, priority=2))
    s.run()
    assert [name for name, _ in s.finished][-2:] == ["patient", "important"]


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_starves_beside_an_endless_stream_of_better_requests(policy: str):
    s = Stepper(policy=policy, sequences=2)
    s.scheduler.add(text_request("seed", range(20), 1, routing_key="x"))
    s.run()
    s.scheduler.add(text_request("poor", range(50, 58), 4, priority=-1))
    for number in range(400):
        s.scheduler.add(text_request(f"r{number}", range(20), 4, priority=1, routing_key="x"))
        s.step(1.0)
        if ("poor", 0) in s.finished:
            return
    raise AssertionError("it never finished")


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_keys_share_the_order_of_arrival(policy: str):
    s = Stepper(policy=policy, sequences=1)
    for number in range(10):
        s.scheduler.add(text_request(f"flood{number}", [1, 2, 3], 1, fair_key="a"))
    s.scheduler.add(text_request("other", [9, 9, 9], 1, fair_key="b"))
    s.run()
    assert [name for name, _ in s.finished].index("other") <= 1


def test_with_one_place_two_adapters_and_the_base_all_get_on():
    s = Stepper(adapters=1)
    for number in range(6):
        s.scheduler.add(text_request(f"r{number}", [number, 1], 40, adapter=[None, "a", "b"][number % 3]))
    seen = []
    for _ in range(60):
        seen.append({slot.sequence.request.adapter for slot in s.step()})
    assert all(len(adapters) == 1 for adapters in seen)
    assert set().union(*seen[:25]) == set().union(*seen[25:50]) == {None, "a", "b"}


def test_adapters_that_hold_all_pages_between_them_do_not_lock_each_other_out():
    s = Stepper(pages=10, adapters=1, step_tokens=4)
    s.scheduler.add(text_request("a", range(18), 20, adapter="a"))
    s.scheduler.add(text_request("b", range(18), 20, adapter="b"))
    s.scheduler.add(text_request("c", range(18), 20))
    s.run(2000)


def test_a_deadline_that_has_passed_is_told():
    s = Stepper()
    s.scheduler.add(text_request("a", deadline_s=1.0))
    s.clock.now = 1.0
    assert s.scheduler.expired() == []
    s.clock.now = 1.1
    assert s.scheduler.expired() == ["a"]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_random_requests_and_aborts_leave_nothing_behind(policy: str, prefix_cache: bool):
    rng = random.Random(f"{policy} {prefix_cache}")
    for _ in range(12):
        s = Stepper(
            pages=rng.choice([10, 24, 80]),
            page_size=rng.choice([1, 4, 16]),
            step_tokens=rng.choice([1, 7, 64]),
            sequences=rng.choice([1, 3, 16]),
            adapters=rng.choice([1, 2, 4]),
            policy=policy,
            prefix_cache=prefix_cache,
        )
        done = set[str]()
        for number in range(60):
            room = s.holdings.tokens
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, min(60, room - 1)))]
            request = text_request(
                f"r{number}",
                prompt,
                rng.randint(1, min(40, room - len(prompt))),
                n=rng.choice([1, 1, 1, 4]),
                adapter=rng.choice([None, None, "a", "b"]),
                priority=rng.randint(-2, 2),
                fair_key=rng.choice("xy"),
                routing_key=rng.choice([None, "k", "l"]),
                keep_prefix=rng.choice([0, 0, 0, 8]),
                prompt_logprobs=rng.random() < 0.1,
            )
            s.lengths.update({(request.id, i): rng.randint(1, request.max_tokens) for i in range(request.n)})
            s.scheduler.add(request)
            for _ in range(rng.choice([0, 1, 5, 20])):
                if not s.scheduler.idle:
                    s.step()
            living = [*s.scheduler.running_ids, *s.scheduler.queued_ids]
            if living and rng.random() < 0.3:
                victim = rng.choice(living)
                s.scheduler.remove(victim, spoilt=rng.random() < 0.3)
                done.add(victim)
        s.run()
        assert {name for name, _ in s.finished} | done == {f"r{number}" for number in range(60)}
        tree, pool = s.holdings.tree, s.holdings.pool
        assert pool.used == tree.nodes == tree.unlocked == tree.evictable + tree.pinned
        assert prefix_cache or pool.used == 0
        tree.clear()
        assert (pool.used, tree.nodes, tree.evictable, tree.pinned) == (0, 0, 0, 0)


def test_answers_do_not_depend_on_pages_pieces_or_company():
    rng = random.Random(5)
    requests = [
        text_request(f"r{i}", [rng.randrange(2) for _ in range(rng.randint(1, 30))], rng.randint(1, 12), n=2)
        for i in range(40)
    ]
    answers = []
    for pages, step, prefix_cache in ((16, 5, True), (16, 64, False), (400, 64, True), (400, 3, False)):
        s = Stepper(pages=pages, step_tokens=step, sequences=16, prefix_cache=prefix_cache)
        for request in requests:
            s.scheduler.add(request)
        s.run()
        answers.append(s.answers)
    assert all(other == answers[0] for other in answers)
