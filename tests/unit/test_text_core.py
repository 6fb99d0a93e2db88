"""The engine of text on a tiny model: ends, choices, what is told, failures of one, pages that come back."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multimodal_gen.adapters import AdapterSource, SwapLoras
from multimodal_gen.errors import ConfigError, OutOfMemory
from multimodal_gen.llm.core import TextCore
from multimodal_gen.llm.sequence import Slot
from multimodal_gen.memory.free import free_bytes
from multimodal_gen.messages import Failed, Started, TextFinished, TextStep
from multimodal_gen.text import Grammar, TextSampling
from tests.support.text import Clock
from tests.support.text_core import Driver, answer, ask, grammar, make_text_folder, open_core

pytestmark = [pytest.mark.unit]

PROMPT = list(range(5, 25))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def shared(folder: Path) -> TextCore:
    """For tests that leave it as it was."""
    return open_core(folder)


@pytest.fixture
def core(shared: TextCore) -> Iterator[TextCore]:
    yield shared
    assert shared.idle
    assert shared.gauges().kv_pages_used == 0
    assert shared.adapters.held == 0


def test_events_come_in_order(core: TextCore) -> None:
    heard = answer(core, ask("a", PROMPT, 3))
    kinds = [type(event) for event in heard.events]
    assert kinds == [Started, TextStep, TextStep, TextStep, TextFinished]
    [output] = heard.outputs["a"]
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (3, "length", None)
    assert output.usage.prompt_tokens == 20
    timings = heard.finished["a"].timings
    assert timings.total >= timings.prefill + timings.decode > 0


def test_the_models_end_token_ends_an_answer_and_is_no_text(core: TextCore) -> None:
    ids = answer(core, ask("a", PROMPT, 8)).ids("a")
    core.card, card = _with_eos(core, ids[4]), core.card
    try:
        [output] = answer(core, ask("b", PROMPT, 8, ignore_eos=False)).outputs["b"]
        assert list(output.token_ids) == ids[: ids.index(ids[4]) + 1]
        assert (output.finish_reason, output.stop_reason) == ("stop", None)
        shown = answer(core, ask("c", PROMPT, 8, ignore_eos=False, include_stop=True)).outputs["c"][0]
        assert shown.text.startswith(output.text)
        assert answer(core, ask("d", PROMPT, 8)).ids("d") == ids
        late = answer(core, ask("e", PROMPT, 8, ignore_eos=False, min_tokens=6)).ids("e")
        assert len(late) >= 6
        assert ids[4] not in late[:6]
    finally:
        core.card = card


def _with_eos(core: TextCore, token: int) -> object:
    import msgspec

    return msgspec.structs.replace(core.card, eos_ids=(token,))


def test_a_stop_token_of_the_request_is_named(core: TextCore) -> None:
    ids = answer(core, ask("a", PROMPT, 8)).ids("a")
    [output] = answer(core, ask("b", PROMPT, 8, stop_token_ids=(ids[3],))).outputs["b"]
    assert list(output.token_ids) == ids[: ids.index(ids[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[3])


def test_a_stop_text_ends_an_answer_and_is_named(core: TextCore) -> None:
    [whole] = answer(core, ask("a", PROMPT, 12)).outputs["a"]
    stop = whole.text[3:6]
    [cut] = answer(core, ask("b", PROMPT, 12, stop=("never said", stop))).outputs["b"]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < 12
    [kept] = answer(core, ask("c", PROMPT, 12, stop=(stop,), include_stop=True)).outputs["c"]
    assert kept.text == whole.text[: whole.text.index(stop) + len(stop)]


def test_choices_are_different_streams_of_one_seed_and_share_the_prompt(core: TextCore) -> None:
    sampling = TextSampling(temperature=1.5, seed=7)
    heard = answer(core, ask("a", range(30, 60), 8, n=4, sampling=sampling))
    answers = [heard.ids("a", index) for index in range(4)]
    assert len({tuple(each) for each in answers}) == 4
    assert heard.finished["a"].usage.completion_tokens == 32
    assert answer(core, ask("b", range(30, 60), 8, n=4, sampling=sampling)).outputs["b"][2].token_ids == tuple(
        answers[2]
    )


def test_seeds_decide_in_any_company(core: TextCore) -> None:
    sampling = TextSampling(temperature=1.2, top_p=0.9, seed=3)
    alone = answer(core, ask("a", PROMPT, 8, sampling=sampling)).ids("a")
    others = [ask(f"o{i}", range(i, i + 9), 8, sampling=TextSampling(seed=i)) for i in range(5)]
    assert answer(core, *others, ask("b", PROMPT, 8, sampling=sampling)).ids("b") == alone


def test_logprobs_and_those_of_the_prompt(core: TextCore) -> None:
    heard = answer(core, ask("a", PROMPT, 4, logprobs=3, prompt_logprobs=True))
    [output] = heard.outputs["a"]
    assert output.logprobs is not None
    assert [each.token_id for each in output.logprobs] == list(output.token_ids)
    assert all(each.top[0] == (each.token_id, each.logprob) for each in output.logprobs)  # greedy
    echo = heard.finished["a"].prompt_logprobs
    assert [each.token_id for each in echo] == PROMPT
    assert echo[0].logprob is None
    # The same sequence again, one token longer: what was said of the answer is said of the prompt.
    longer = [*PROMPT, *output.token_ids]
    again = answer(core, ask("b", longer, 1, logprobs=3, prompt_logprobs=True)).finished["b"].prompt_logprobs
    for before, after in zip([*echo[1:], *output.logprobs], again[1:], strict=True):
        assert before.logprob == pytest.approx(after.logprob, abs=1e-4)


def test_prompt_logprobs_in_pieces_are_the_same(folder: Path, core: TextCore) -> None:
    whole = answer(core, ask("a", PROMPT, 1, logprobs=1, prompt_logprobs=True)).finished["a"].prompt_logprobs
    pieces = open_core(folder, chunked_prefill_size=3)
    found = answer(pieces, ask("a", PROMPT, 1, logprobs=1, prompt_logprobs=True)).finished["a"].prompt_logprobs
    assert [each.token_id for each in found] == PROMPT
    for one, other in zip(whole[1:], found[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_cancelled_request_has_no_pages_by_the_next_step(core: TextCore) -> None:
    driver = Driver(core)
    driver.add(ask("a", range(40, 80), 50, n=2), ask("b", PROMPT, 3))
    driver.step(), driver.step()
    used = core.gauges().kv_pages_used
    [failed] = core.cancel("a")
    assert isinstance(failed, Failed)
    assert failed.error.code == "cancelled"
    assert core.gauges().kv_pages_used < used
    assert core.cancel("a") == []
    assert set(driver.run().outputs) == {"b"}


def test_a_deadline_ends_a_request_where_it_is(folder: Path) -> None:
    clock = Clock()
    core = open_core(folder, clock=clock)
    driver = Driver(core)
    driver.add(ask("a", PROMPT, 50, deadline_s=1.0), ask("b", PROMPT, 3))
    driver.step()
    clock.now = 2.0
    heard = driver.run()
    assert heard.failed["a"].code == "deadline_exceeded"
    assert set(heard.outputs) == {"b"}


def test_what_cannot_fit_is_refused_with_both_numbers(core: TextCore) -> None:
    heard = answer(core, ask("a", PROMPT, 250))
    assert heard.failed["a"].code == "prompt_too_long"
    assert "20 tokens" in heard.failed["a"].message
    assert "256" in heard.failed["a"].message


def test_a_failing_request_fails_alone(core: TextCore, monkeypatch: pytest.MonkeyPatch) -> None:
    run = core.runner.run

    def fails_for_b(slots: list[Slot], *rest: object) -> object:
        if any(slot.sequence.request.id == "b" and slot.sequence.generated == 2 for slot in slots):
            raise RuntimeError("broken")
        return run(slots, *rest)

    expected = answer(core, ask("x", PROMPT, 6)).ids("x")
    monkeypatch.setattr(core.runner, "run", fails_for_b)
    heard = answer(core, ask("a", PROMPT, 6), ask("b", range(50, 60), 6, n=2), ask("c", range(70, 80), 6))
    assert set(heard.outputs) == {"a", "c"}
    assert heard.failed["b"].code == "generation_failed"
    assert heard.ids("a") == expected
    assert not core.sick


def test_a_short_memory_makes_steps_smaller(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = open_core(folder)
    run = core.runner.run

    def small_steps_only(slots: list[Slot], *rest: object) -> object:
        if sum(slot.count for slot in slots) > 30:
            raise OutOfMemory("too much")
        return run(slots, *rest)

    monkeypatch.setattr(core.runner, "run", small_steps_only)
    heard = answer(core, *(ask(str(i), range(i, i + 20), 3) for i in range(4)))
    assert len(heard.outputs) == 4
    assert core.scheduler.limits.step_tokens <= 40


def test_many_failures_in_a_row_make_it_sick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = open_core(folder, max_consecutive_errors=2)

    def broken(*_: object) -> object:
        raise RuntimeError("broken")

    monkeypatch.setattr(core.runner, "run", broken)
    answer(core, ask("a", PROMPT))
    assert not core.sick
    answer(core, ask("b", PROMPT))
    assert core.sick


def test_numbers_that_overflow_end_their_request_and_leave_nothing_in_the_cache(folder: Path) -> None:
    core = open_core(folder)
    weight = core.model.decoder.embedding.weight
    before = weight.data[300].clone()
    weight.data[300] = torch.inf
    heard = answer(core, ask("bad", [300] * 40, 6), ask("good", PROMPT, 6))
    weight.data[300] = before
    assert heard.failed["bad"].code == "overflow"
    assert set(heard.outputs) == {"good"}
    assert answer(core, ask("bad", [300] * 40, 6)).finished["bad"].usage.cached_tokens == 0


def test_answers_follow_their_grammars_beside_others_that_have_none(core: TextCore) -> None:
    schema = {"properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}
    rules = {
        "word": grammar(core, "regex", "[abc]{3}"),
        "json": grammar(core, "json_schema", json.dumps({"type": "object", **schema})),
    }
    free = answer(core, ask("x", PROMPT, 20)).ids("x")
    sampling = TextSampling(temperature=1.0, seed=1)
    asked = [
        ask(name, range(30, 40), 20, n=3, grammar=rule, sampling=sampling, ignore_eos=False)
        for name, rule in rules.items()
    ]
    heard = answer(core, *asked, ask("free", PROMPT, 20))
    assert heard.ids("free") == free
    for output in heard.outputs["word"]:
        assert re.fullmatch("[abc]{3}", output.text)
        assert (output.finish_reason, output.token_ids[-1]) == ("stop", 2)
    assert all(json.loads(output.text)["a"] in (1, 22) for output in heard.outputs["json"])
    [late] = answer(core, ask("late", PROMPT, 3, grammar=rules["json"])).outputs["late"]
    assert late.finish_reason == "length"


def test_a_grammar_of_another_model_fails_its_request_alone(core: TextCore) -> None:
    foreign = Grammar(kind="regex", digest="foreign", compiled=b"{}")
    heard = answer(core, ask("a", PROMPT, 3, grammar=foreign), ask("b", PROMPT, 3))
    assert heard.failed["a"].code == "generation_failed"
    assert set(heard.outputs) == {"b"}


def test_grammars_that_lead_nowhere_end_their_requests_and_make_nothing_sick(folder: Path) -> None:
    core = open_core(folder, max_consecutive_errors=2)
    nowhere = grammar(core, "regex", r"a[^\x00-\U0010ffff]")
    heard = answer(core, *(ask(str(i), PROMPT, 9, grammar=nowhere) for i in range(5)), ask("free", PROMPT, 3))
    assert {error.code for error in heard.failed.values()} == {"generation_failed"}
    assert len(heard.failed) == 5
    assert set(heard.outputs) == {"free"}
    assert not core.sick


def test_sleep_gives_memory_back_and_waking_says_the_same(folder: Path) -> None:
    core = open_core(folder)
    before = answer(core, ask("a", PROMPT)).ids("a")
    core.sleep()
    assert core.model.weights.nbytes == 0
    assert core.gauges().kv_pages_cached == 0
    assert answer(core, ask("b", PROMPT)).failed["b"].code == "asleep"
    core.wake()
    heard = answer(core, ask("c", PROMPT))
    assert heard.ids("c") == before
    assert heard.finished["c"].usage.cached_tokens == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_context": 1000}, ("--max-context 1000", "256")),
        ({"kv_cache_memory": 100}, ("--kv-cache-memory", "256 tokens")),
        ({"max_context": 200, "kv_cache_memory": 66_000}, ("200 tokens", "--kv-cache-memory")),
    ],
)
def test_settings_that_cannot_be_met_are_named(folder: Path, settings: dict[str, int], named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        open_core(folder, **settings)
    assert all(text in caught.value.message for text in named)


def test_little_memory_shortens_texts(folder: Path) -> None:
    page_bytes = open_core(folder).runner.kv_bytes // open_core(folder).room.pages
    core = open_core(folder, kv_cache_memory=2 * page_bytes * 4)
    assert core.info.context == 64
    assert len(answer(core, ask("a", PROMPT, 44)).ids("a")) == 44


def test_memory_for_keys_and_values_counts_as_used_before_it_is_touched(folder: Path) -> None:
    core = open_core(folder, kv_cache_memory=4 << 30)
    awake, held = free_bytes("cpu"), 2 * core.runner.kv_bytes
    assert held > 4 << 29
    core.sleep()
    assert free_bytes("cpu") > awake + held // 2


def make_adapter(path: Path, seed: int) -> AdapterSource:
    torch.manual_seed(seed)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(shape)
        for layer in range(1)
        for side, shape in (("A", (4, 96)), ("B", (96, 4)))
    }
    save_file(tensors, path)
    return AdapterSource(nickname=path.stem, path=str(path), alpha=4.0)


def test_a_thousand_requests_with_random_aborts_leave_no_page_and_no_adapter_held(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    core = open_core(folder, kv_page_size=4, kv_cache_memory=100_000, chunked_prefill_size=48, max_loras_per_batch=2)
    sources = tuple(make_adapter(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("xyz"))
    core.adapters.change(SwapLoras(sources=sources))
    digests = [None, None, *(info.digest for info in core.adapters.state.loaded)]
    driver, aborted = Driver(core), set[str]()
    for number in range(1000):
        prompt = [rng.randrange(3, 6) for _ in range(rng.randint(1, 24))]
        sampling = TextSampling(temperature=rng.choice([0.0, 1.0]), seed=number)
        more = {"n": rng.choice([1, 1, 1, 3]), "adapter": rng.choice(digests), "sampling": sampling}
        driver.add(ask(f"r{number}", prompt, rng.randint(1, 20), **more))
        if rng.random() < 0.5:
            driver.step()
        living = [*core.scheduler.running_ids, *core.scheduler.queued_ids]
        if living and rng.random() < 0.2:
            victim = rng.choice(living)
            driver.note(core.cancel(victim))
            aborted.add(victim)
    heard = driver.run()
    assert set(heard.failed) == aborted
    assert set(heard.outputs) | aborted == {f"r{number}" for number in range(1000)}
    assert core.gauges().preemptions > 0
    assert core.adapters.held == 0
    assert core.gauges().kv_pages_used == 0
    core.holdings.tree.clear()
    assert core.holdings.pool.used == 0
    assert not core._writings
    assert not core.scheduler._keys
