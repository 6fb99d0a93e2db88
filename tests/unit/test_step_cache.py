"""Step caches: how they are asked for, which steps they skip, and what a skipped step comes to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.active import resume, state_of
from multimodal_gen.errors import ConfigError, InvalidValue, UnsupportedParameter
from multimodal_gen.messages import Generate, decode_to_worker, encode
from multimodal_gen.parallel.branches import BranchShare
from multimodal_gen.parallel.group import SOLO, Group
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.contract import Row
from multimodal_gen.pipelines.history import History, Known
from multimodal_gen.pipelines.stages.first_block import MOST_TOKENS, looked_at
from multimodal_gen.pipelines.stages.flow_match import FlowMatchState
from multimodal_gen.pipelines.stages.step_cache import Computed, advance, choose, similar
from multimodal_gen.pipelines.stages.working import of_step_cache
from multimodal_gen.request import SamplingParams
from multimodal_gen.resolve import resolve
from multimodal_gen.settings import load
from multimodal_gen.step_cache import FirstBlock, Taylor, read, write

pytestmark = [pytest.mark.unit]

STEPS = 10


def request(text: str | None, default: str = "none", **params: Any) -> Any:
    card = registry.describe(EngineConfig(step_cache=default))
    given = SamplingParams(**{"num_inference_steps": STEPS, "seed": 0, "step_cache": text, **params})
    return resolve(request_id="r", prompt="x", params=given, card=card, max_cost=10**9)


def make_row(text: str, step: int = 0) -> Row:
    """A row in the middle of a schedule that is steep at its end."""
    sigmas = torch.linspace(1, 0, STEPS + 1) ** 0.5
    made = Row(request(text), 0, step=step)
    made.latents = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step))
    made.sampler = FlowMatchState(sigmas, sigmas[:-1] * 1000)
    return made


def one_kind(row: Row, step: int) -> int:
    return 0


# --- how they are asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("none", "none"),
        ("taylor", "taylor:interval=2,order=1,warmup=6"),
        (" taylor : order=2 , interval=4 ", "taylor:interval=4,order=2,warmup=6"),
        ("first-block:threshold=0.123456789,most=9", "first-block:threshold=0.123456789,order=1,warmup=6,most=9"),
    ],
)
def test_the_normal_form_says_every_value_and_means_the_same(text: str, normal: str) -> None:
    assert write(read(text)) == normal
    assert read(normal) == read(text)
    assert load(EngineConfig, {"step_cache": text}).step_cache == normal


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tailor", "Did you mean 'taylor'?"),
        ("none:order=1", "none takes no values"),
        ("taylor:", "no KEY=VALUE"),
        ("taylor:interval", "no KEY=VALUE"),
        ("taylor:threshold=0.1", "taylor has no 'threshold'"),
        ("taylor:order=1,order=2", "order is there twice"),
        ("taylor:interval=1", "expected int >= 2"),
        ("taylor:interval=2.5", "expected int"),
        ("first-block:threshold=0", "expected float > 0.0"),
        ("first-block:threshold=nan", "expected float > 0.0"),
        ("first-block:threshold=inf", "expected float <= 10.0"),
        ("first-block:order=3", "expected int <= 2"),
        ("", "is not one of none, first-block, taylor"),
    ],
)
def test_what_is_wrong_is_named_in_settings_and_requests(text: str, says: str) -> None:
    with pytest.raises(InvalidValue) as wrong:
        request(text)
    assert says in wrong.value.message
    assert wrong.value.param == "step_cache"
    if text:
        with pytest.raises(ConfigError, match="--step-cache"):
            load(EngineConfig, {"step_cache": text})


def test_a_request_wins_over_the_setting_and_may_turn_it_off() -> None:
    assert request(None, default="taylor").step_cache == Taylor()
    assert request("first-block:order=0", default="taylor").step_cache == FirstBlock(order=0)
    assert request("none", default="taylor").step_cache is None
    with pytest.raises(InvalidValue, match="not int"):
        request(5)  # type: ignore[arg-type]


def test_a_cache_that_could_skip_nothing_is_refused_where_it_was_asked_for() -> None:
    assert request("taylor:warmup=8", num_inference_steps=10).step_cache == Taylor(warmup=8)
    with pytest.raises(InvalidValue, match="no effect in 9 step"):
        request("taylor:warmup=8", num_inference_steps=9)
    assert request(None, default="taylor:warmup=8", num_inference_steps=9).step_cache is None


def test_models_that_run_through_diffusers_refuse_it() -> None:
    card = msgspec.structs.replace(registry.describe(EngineConfig()), parameters=frozenset({"num_inference_steps"}))
    with pytest.raises(UnsupportedParameter, match="step_cache"):
        resolve(request_id="r", prompt="x", params=SamplingParams(step_cache="taylor"), card=card, max_cost=10**9)
    with pytest.raises(ConfigError, match="every step is computed"):
        registry.with_step_cache(card, EngineConfig(step_cache="taylor"))


def test_it_travels_to_the_worker() -> None:
    for text in ("taylor:interval=3", "first-block", "none"):
        sent = request(text)
        received = decode_to_worker(encode(Generate(sent)))
        assert isinstance(received, Generate)
        assert received.request == sent


# --- which steps ----------------------------------------------------------------------------------------------------


def choices(text: str, kind: Any = one_kind) -> str:
    """What becomes of each step, where every step that is asked about is computed: c, s, a."""
    row, found = make_row(text), ""
    for step in range(STEPS):
        row.step = step
        choice = choose(row, kind)
        found += choice[0]
        computed = None if choice == "skip" else Computed(torch.zeros(2, 3, 4), torch.ones(1, 1, 1))
        _, row.history = advance(row, computed, kind)
    return found


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("none", "cccccccccc"),
        ("taylor:warmup=3", "cccscscscc"),  # the last step is computed, whatever its number
        ("taylor:interval=4,warmup=2", "ccssscsssc"),
        ("taylor:warmup=1,order=2", "cccscscscc"),  # three points for a parabola
        ("taylor:warmup=1,order=0", "cscscscscc"),
        ("taylor", "ccccccscsc"),
        ("first-block:warmup=3", "cccaaaaaac"),
    ],
)
def test_the_beginning_and_the_end_are_computed(text: str, steps: str) -> None:
    assert choices(text) == steps


def test_a_new_kind_of_step_is_computed_until_its_curve_is_known() -> None:
    """The second expert of Wan2.2, or the end of guidance."""
    assert choices("taylor:warmup=3", lambda row, step: step >= 5) == "cccscccscc"


def test_no_more_steps_in_a_row_are_skipped_than_allowed() -> None:
    row = make_row("first-block:most=2,warmup=3", step=5)
    clean = torch.zeros(2, 3, 4)
    for last, choice in ((4, "ask"), (3, "ask"), (2, "compute")):
        row.history = History((Known(1, clean), Known(last, clean)), torch.ones(1, 1, 1))
        assert choose(row, one_kind) == choice


def test_branches_of_a_row_decide_together_and_rows_apart() -> None:
    rows = [make_row("first-block:threshold=0.5"), make_row("first-block:threshold=0.05")]
    for row in rows:
        row.history = History((), torch.ones(2, 3, 4))
    now = torch.ones(2, 3, 4)
    now[1] += 0.4  # one branch changes by 0.4, both together by 0.2
    assert similar(rows, [now, now]) == [True, False]


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 5000])
def test_a_bounded_number_of_tokens_is_looked_at(tokens: int) -> None:
    assert min(tokens, MOST_TOKENS) // 2 < looked_at(tokens) <= min(tokens, MOST_TOKENS)


# --- what they come to ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_polynomials_of_the_order_are_continued_exactly(order: int) -> None:
    """Where the clean latents are a polynomial in log-SNR, a skipped step has the velocity of a computed one."""
    row = make_row(f"taylor:interval=4,order={order},warmup=3")
    assert isinstance(row.sampler, FlowMatchState)
    sigmas = row.sampler.sigmas
    coefficients = torch.randn(order + 1, 2, 3, 4)

    def velocity(step: int) -> torch.Tensor:
        sigma = float(sigmas[step])
        snr = math.log(max(1 - sigma, 1e-6) / (1 - max(1 - sigma, 1e-6)))
        clean = sum(c * snr**power for power, c in enumerate(coefficients))
        assert row.latents is not None
        return (row.latents - clean) / sigmas[step]

    for step in (0, 1, 2, 3, 4, 5):
        row.step = step
        row.latents = torch.randn(2, 3, 4)
        computed = None if choose(row, one_kind) == "skip" else Computed(velocity(step))
        found, row.history = advance(row, computed, one_kind)
        torch.testing.assert_close(found, velocity(step), rtol=1e-4, atol=1e-4)
    assert row.history.skipped == 3


def test_a_row_without_a_cache_remembers_nothing() -> None:
    row = make_row("none")
    velocity, history = advance(row, Computed(torch.ones(2, 3, 4)), one_kind)
    assert torch.equal(velocity, torch.ones(2, 3, 4))
    assert history == History()
    assert history.nbytes == 0


@pytest.mark.parametrize("text", ["taylor:order=2", "first-block"])
def test_what_a_row_remembers_goes_to_another_process_and_back(text: str) -> None:
    row = make_row(text, step=5)
    head = torch.randn(2, 3, 4) if text == "first-block" else None
    row.history = History((Known(2, torch.randn(2, 3, 4)), Known(4, torch.randn(2, 3, 4))), head, skipped=7)
    assert row.history.nbytes == (2 + (head is not None)) * 24 * 4
    other = make_row(text)
    resume(other, state_of(row), torch.device("cpu"))
    assert other.step == 5
    assert other.history.skipped == 7
    assert [known.step for known in other.history.known] == [2, 4]
    for mine, theirs in zip(other.history.known, row.history.known, strict=True):
        assert torch.equal(mine.clean, theirs.clean)
    assert (other.history.head is None) if head is None else torch.equal(other.history.head, head)
    other.restore({"latents": torch.zeros(2, 3, 4)}, 0)
    assert other.history == History()


def test_rows_that_leave_change_no_owners() -> None:
    """Rows without guidance take turns: their owner must not depend on who has left."""
    group: Any = Group(0, 2, object(), torch.device("cpu"))  # type: ignore[arg-type]  # nothing is sent
    share = BranchShare((1, 2, 1, 1), group)
    left = share.without([0])
    assert left.owners == {pair: owner for pair, owner in share.owners.items() if pair[0] != 0}
    assert left.without([2]).owners.keys() == {(1, 0), (1, 1), (3, 0)}
    alone = BranchShare((2,), SOLO).without([0])
    assert alone.mine == []
    assert alone.exchange({}, [torch.Size((3,))], torch.empty(0)) == {}


def test_histories_are_replaced_and_never_changed() -> None:
    row = make_row("taylor", step=1)
    before = row.history
    advance(row, Computed(torch.ones(2, 3, 4)), one_kind)
    assert row.history is before == replace(before)


@pytest.mark.parametrize("cache", ["none", "taylor", "taylor:order=2", "first-block"])
def test_the_memory_of_a_row_is_within_what_the_plan_counts(cache: str) -> None:
    tokens, width, patch = 2 * 600, 96, 64  # two branches of 600 tokens, and latents for one
    clean = torch.zeros(600 * patch)
    wanted = read(cache)
    known = () if wanted is None else tuple(Known(step, clean) for step in range(wanted.order + 1))
    head = torch.zeros(2, looked_at(600), width) if isinstance(wanted, FirstBlock) else None
    counted = of_step_cache(cache, tokens, width, patch, torch.bfloat16)
    assert (counted == 0) == (cache == "none")
    assert History(known, head).nbytes <= counted
