"""The scheduler's promises, in pure Python."""

from __future__ import annotations

from collections import Counter

import pytest

from multimodal_gen.engine.scheduler import Scheduler
from multimodal_gen.request import ImageRequest

pytestmark = [pytest.mark.unit]


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: str, *, tokens: int = 100, n: int = 1, steps: int = 4, **more: object) -> ImageRequest:
    settings = {
        "id": name, "model": "m", "prompt": "p", "negative_prompt": None, "width": 64, "height": 64,
        "num_inference_steps": steps, "guidance_scale": 1.0, "seeds": tuple(range(n)), "cfg_normalization": 0.0,
        "cfg_truncation": None, "max_sequence_length": 32, "row_tokens": tokens,
    }  # fmt: skip
    return ImageRequest(**{**settings, **more})


def scheduler(budget: int = 1000, exclusive: bool = False, clock: Clock | None = None) -> Scheduler:
    return Scheduler(budget, exclusive, clock or Clock())


def ids(plan: list) -> list[str]:
    return [slot.request_id for slot in plan]


def run_to_end(s: Scheduler, requests: list[ImageRequest]) -> list[str]:
    """Steps until nothing is left; request ids in the order in which they finished."""
    left = {(r.id, i): r.num_inference_steps for r in requests for i in range(r.n)}
    finished = []
    for _ in range(10_000):
        if s.idle:
            return finished
        for slot in s.plan():
            left[slot.request_id, slot.index] -= 1
            if not left[slot.request_id, slot.index] and s.finish(slot.request_id, slot.index):
                finished.append(slot.request_id)
    raise AssertionError("the scheduler starves a request")


def test_a_new_request_joins_at_the_next_step_and_a_finished_one_leaves():
    s = scheduler()
    s.add(request("a"))
    assert [(x.request_id, x.starts) for x in s.plan()] == [("a", True)]
    s.add(request("b"))
    assert [(x.request_id, x.starts) for x in s.plan()] == [("a", False), ("b", True)]
    assert s.finish("a", 0)
    assert ids(s.plan()) == ["b"]


def test_the_budget_counts_tokens_not_rows():
    s = scheduler(budget=1000)
    s.add(request("small", tokens=100, n=5))
    s.add(request("large", tokens=600))
    assert Counter(ids(s.plan())) == {"small": 5}
    s = scheduler(budget=1000)
    s.add(request("large", tokens=600, steps=1))
    s.add(request("small", tokens=100, n=5))
    assert Counter(ids(s.plan())) == {"large": 1, "small": 4}


def test_a_row_larger_than_the_budget_runs_alone():
    s = scheduler(budget=1000)
    s.add(request("huge", tokens=5000))
    s.add(request("other", tokens=5000))
    assert ids(s.plan()) == ["huge"]


def test_a_blocked_row_does_not_block_those_that_fit():
    s = scheduler(budget=1000)
    s.add(request("first", tokens=700, steps=1))
    s.add(request("blocked", tokens=700, steps=1))
    s.add(request("fits", tokens=300, steps=9))
    assert ids(s.plan()) == ["first", "fits"]


def test_equal_requests_finish_in_order_of_arrival():
    s = scheduler(budget=100)
    requests = [request(name) for name in "abcd"]
    for r in requests:
        s.add(r)
    assert run_to_end(s, requests) == list("abcd")


def test_a_small_request_passes_a_large_one_that_came_first():
    s = scheduler(budget=1000)
    large, small = request("large", tokens=900, steps=100), request("small", tokens=200, steps=4)
    s.add(large)
    s.plan()
    s.add(small)
    assert run_to_end(s, [large, small]) == ["small", "large"]


def test_a_stream_of_small_requests_cannot_starve_a_large_one():
    s = scheduler(budget=1000)
    s.add(request("large", tokens=900, steps=10))  # 9,000 token-steps
    served = 0
    for i in range(100):
        s.add(request(f"small-{i}", tokens=500, steps=1))
        plan = s.plan()
        served += plan[0].request_id == "large"
        for slot in plan:
            if slot.request_id != "large":
                s.finish(slot.request_id, slot.index)
        if served == 10:
            return
    raise AssertionError("passed by more work than its own")


def test_priority_then_deadline_come_first():
    s = scheduler(budget=100)
    for name, more in (("late", {}), ("soon", {"deadline_s": 5.0}), ("vip", {"priority": 1})):
        s.add(request(name, **more))
    order = []
    for _ in range(3):
        (slot,) = s.plan()
        order.append(slot.request_id)
        s.finish(slot.request_id, 0)
    assert order == ["vip", "soon", "late"]


def test_a_deadline_does_not_pass_other_keys():
    s = scheduler(budget=100)
    s.add(request("patient", fair_key="a", steps=50))
    for i in range(10):
        s.add(request(f"pushy-{i}", fair_key="b", deadline_s=10.0, steps=50))
    order = [ids(s.plan())[0].split("-")[0] for _ in range(10)]
    assert Counter(order) == {"patient": 5, "pushy": 5}


def test_a_deadline_counts_once_it_is_near():
    clock = Clock()
    s = scheduler(budget=100, clock=clock)
    s.add(request("first", steps=50))
    s.add(request("far", steps=50, deadline_s=100.0))
    assert ids(s.plan()) == ["first"]
    clock.now = 80.0
    assert ids(s.plan()) == ["far"]


def test_the_exact_token_count_replaces_the_estimate():
    s = scheduler(budget=1000)
    s.add(request("a", tokens=100))
    s.add(request("b", tokens=100))
    assert ids(s.plan()) == ["a", "b"]
    s.set_tokens("a", 950)
    assert ids(s.plan()) == ["a"]


def test_expired_requests_are_named():
    clock = Clock()
    s = scheduler(clock=clock)
    s.add(request("a", deadline_s=5.0))
    s.add(request("b"))
    clock.now = 4.9
    assert s.expired() == []
    clock.now = 5.1
    assert s.expired() == ["a"]


def test_two_keys_share_the_machine_whatever_they_send():
    s = scheduler(budget=100)
    for i in range(20):
        s.add(request(f"greedy-{i}", fair_key="greedy", steps=1))
    s.add(request("modest-0", fair_key="modest", steps=1))
    s.add(request("modest-1", fair_key="modest", steps=1))
    order = []
    for _ in range(6):
        (slot,) = s.plan()
        order.append(slot.request_id.split("-")[0])
        s.finish(slot.request_id, slot.index)
    assert Counter(order[:4]) == {"greedy": 2, "modest": 2}


def test_a_key_earns_no_credit_while_it_is_away():
    s = scheduler(budget=100)
    s.add(request("a-0", fair_key="a", steps=50))
    for _ in range(10):
        s.plan()
    s.add(request("b-0", fair_key="b", steps=50))
    order = [ids(s.plan())[0] for _ in range(6)]
    assert Counter(order) == {"a-0": 3, "b-0": 3}


def test_an_exclusive_model_runs_one_row_to_its_end():
    s = scheduler(exclusive=True)
    requests = [request("a", n=2, steps=3), request("b", steps=2, priority=5)]
    s.add(requests[0])
    assert ids(s.plan()) == ["a"]
    s.add(requests[1])
    assert [len(s.plan()), len(s.plan())] == [1, 1]
    s.finish("a", 0)
    assert ids(s.plan()) == ["b"]


def test_removing_a_request_forgets_its_rows_and_its_key():
    s = scheduler()
    s.add(request("a", n=3, fair_key="k"))
    s.plan()
    s.remove("a")
    assert s.idle
    assert s.running_rows == s.waiting_rows == 0
    assert s.plan() == []


def test_the_order_is_the_same_on_every_run():
    def once() -> list[str]:
        s = scheduler(budget=300)
        requests = [request(f"r{i}", tokens=50 + 37 * i % 200, n=1 + i % 3, steps=1 + i % 4) for i in range(12)]
        for r in requests:
            s.add(r)
        return run_to_end(s, requests)

    assert once() == once()


def test_rows_of_one_step_share_the_state_of_the_weights():
    s = scheduler()
    s.add(request("a1"), weights=("A",))
    s.add(request("b1"), weights=("B",))
    s.add(request("a2"), weights=("A",))
    assert ids(s.plan()) == ["a1", "a2"]
    s.add(request("a3"), weights=("A",))
    # b1 is first in line: nobody joins any more, those that run go on.
    assert ids(s.plan()) == ["a1", "a2"]
    assert s.finish("a1", 0)
    assert ids(s.plan()) == ["a2"]
    assert s.finish("a2", 0)
    assert ids(s.plan()) == ["b1"]
    assert ids(s.plan()) == ["b1"]
    assert s.finish("b1", 0)
    assert ids(s.plan()) == ["a3"]


def test_states_that_alternate_all_get_their_turn():
    s = scheduler(budget=300)
    requests = [request(f"{name}{number}", steps=3, n=2) for number in range(4) for name in "abc"]
    for r in requests:
        s.add(r, weights=(r.id[0],))
    left = {(r.id, i): r.num_inference_steps for r in requests for i in range(r.n)}
    finished = []
    for _ in range(1000):
        if s.idle:
            break
        plan = s.plan()
        assert len({slot.request_id[0] for slot in plan}) == 1
        for slot in plan:
            left[slot.request_id, slot.index] -= 1
            if not left[slot.request_id, slot.index] and s.finish(slot.request_id, slot.index):
                finished.append(slot.request_id)
    assert sorted(finished) == sorted(r.id for r in requests)


def test_a_cancelled_first_in_line_lets_the_others_join_again():
    s = scheduler()
    s.add(request("a1"), weights=("A",))
    assert ids(s.plan()) == ["a1"]
    s.add(request("b1"), weights=("B",))
    s.add(request("a2"), weights=("A",))
    assert ids(s.plan()) == ["a1"]
    s.remove("b1")
    assert ids(s.plan()) == ["a1", "a2"]
