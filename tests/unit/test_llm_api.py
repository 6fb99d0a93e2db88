"""`LLM`: text from Python, on a tiny model with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from multimodal_gen import LLM, DiffGenerator, TextOutput, TextParams
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.cards import describe
from multimodal_gen.engine.local_text import LocalTextEngine, RemoteTextEngine
from multimodal_gen.errors import (
    AdapterNotFound,
    Asleep,
    ConfigError,
    ContextExceeded,
    GenerationFailed,
    InvalidValue,
    ModelNotFound,
    UnknownParameter,
)
from multimodal_gen.messages import TextDelta
from multimodal_gen.text import Grammar
from tests.support.server import wait_for
from tests.support.text_adapters import write_random
from tests.support.text_core import answer, ask, make_text_folder, open_core

pytestmark = [pytest.mark.unit]

SMALL: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "16MiB", "threads": 1}
NONSENSE = Grammar(kind="regex", digest="nonsense", compiled=b"{}")
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PROMPTS = ["a red apple", "the quick brown fox", "one two three four"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder("qwen3", tmp_path_factory.mktemp("llm") / "tiny", vocab_size=512)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **SMALL) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Whatever a test does to it, nothing of it is left behind and the next prompt is answered."""
    yield shared
    engine = shared._live
    assert isinstance(engine, LocalTextEngine)
    assert engine.side.idle
    assert engine.side.core.gauges().kv_pages_used == 0
    assert len(shared.generate("a", max_tokens=2, **GREEDY)[0].token_ids) == 2


def test_prompts_are_answered_in_their_order_whatever_they_are_given_as(llm: LLM, folder: Path) -> None:
    ids = [llm.front.tokenizer.encode(prompt) for prompt in PROMPTS]
    core = open_core(folder)
    heard = answer(core, *(ask(f"r{at}", each, 6) for at, each in enumerate(ids)))
    expected = [tuple(heard.ids(f"r{at}")) for at in range(len(PROMPTS))]
    for given in (PROMPTS, ids, tuple(PROMPTS)):
        outputs = llm.generate(given, max_tokens=6, **GREEDY)
        assert [output.token_ids for output in outputs] == expected
        assert {output.finish_reason for output in outputs} == {"length"}
    (one,) = llm.generate(PROMPTS[1], max_tokens=6, **GREEDY)
    (again,) = llm.generate(ids[1], params=TextParams(max_tokens=6, temperature=1.0), **GREEDY)
    assert isinstance(one, TextOutput)
    assert one.token_ids == again.token_ids == expected[1]
    assert one.usage.prompt_tokens == len(ids[1])


def test_n_answers_of_each_prompt_follow_one_another(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    together = llm.generate(PROMPTS[:2], n=3, **options)
    assert len(together) == 6
    assert together[:3] != together[3:]
    assert len({output.token_ids for output in together[:3]}) == 3, "each choice has a stream of chance of its own"
    assert [o.token_ids for o in llm.generate(PROMPTS[1], n=3, **options)] == [o.token_ids for o in together[3:]]


def test_a_conversation_is_written_down_as_the_checkpoint_says(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|im_end|>"}]
    assert llm.front.template is not None
    prompt = llm.front.template.encode(llm.front.tokenizer, messages)
    (expected,) = llm.generate(prompt, max_tokens=5, **GREEDY)
    (answered,) = llm.chat(messages, max_tokens=5, **GREEDY)
    assert answered.token_ids == expected.token_ids
    both = llm.chat([messages, messages[1:]], max_tokens=5, **GREEDY)
    assert both[0].token_ids == expected.token_ids
    assert len(both) == 2


def test_deltas_come_as_they_are_written_and_make_up_the_answer(llm: LLM) -> None:
    heard = list[TextDelta]()
    (output,) = llm.generate("a b c", max_tokens=12, logprobs=2, on_delta=heard.append, **GREEDY)
    assert len(heard) == 12
    assert "".join(delta.text for delta in heard) == output.text
    assert [token for delta in heard for token in delta.token_ids] == list(output.token_ids)
    assert output.logprobs is not None
    assert [told.token_id for told in output.logprobs] == list(output.token_ids)
    assert all(len(told.top) == 2 for told in output.logprobs)


def test_answers_match_what_they_are_made_to_match(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "boolean"}},
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    (output,) = llm.generate("x", json_schema=schema, max_tokens=60, temperature=0)
    assert set(json.loads(output.text)) == {"kind", "legs"}
    assert output.finish_reason == "stop"
    (output,) = llm.chat([{"role": "user", "content": "?"}], regex="(yes|no)!", max_tokens=20)
    assert output.text in ("yes!", "no!")
    (output,) = llm.generate("x", ebnf='root ::= "ab" | "cd"', max_tokens=20)
    assert output.text in ("ab", "cd")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_token": 5}, UnknownParameter, "Did you mean 'max_tokens'"),
        ({"temperature": -1.0}, InvalidValue, "temperature"),
        ({"n": 0}, InvalidValue, "'n'"),
        ({"max_tokens": 5000}, ContextExceeded, "5,000.*256"),
        ({"json_schema": {"type": "nonsense"}}, InvalidValue, "json_schema"),
        ({"regex": "(", "max_tokens": 5}, InvalidValue, "regex"),
        ({"regex": "a", "ebnf": "b"}, InvalidValue, "one of"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    llm: LLM, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate("a", **options)


@pytest.mark.parametrize("prompts", ["", [], [["a"]], [3, "a"], [[1, 10**9]], [[]], 7])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    if prompts == []:
        assert llm.generate(prompts) == []
        return
    with pytest.raises(InvalidValue):
        llm.generate(prompts, max_tokens=2)


def test_an_exception_in_the_callers_code_leaves_nothing_behind(llm: LLM) -> None:
    def burst(_: TextDelta) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, max_tokens=50, on_delta=burst, **GREEDY)


def test_it_sleeps_and_wakes_and_writes_the_same(llm: LLM) -> None:
    before = llm.generate(PROMPTS, max_tokens=6, **GREEDY)
    assert llm.sleep() > llm.info.weight_bytes
    with pytest.raises(Asleep):
        llm.generate("a", max_tokens=2)
    assert llm.sleep() == 0, "it sleeps already"
    llm.wake()
    llm.wake()
    assert [o.token_ids for o in llm.generate(PROMPTS, max_tokens=6, **GREEDY)] == [o.token_ids for o in before]


def test_after_too_many_failures_the_model_is_loaded_anew(folder: Path) -> None:
    with LLM(folder, max_consecutive_errors=2, **SMALL) as llm:
        before = llm.generate("a", max_tokens=4, **GREEDY)
        engine = llm._live
        assert isinstance(engine, LocalTextEngine)
        side = engine.side

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("the weights are gone")

        side.core.runner.run = broken  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(GenerationFailed):
                llm.generate("a", max_tokens=4, **GREEDY)
        assert llm.generate("a", max_tokens=4, **GREEDY)[0].token_ids == before[0].token_ids
        assert engine.side is not side


def test_several_ranks_write_what_one_does(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = [output.token_ids for output in llm.generate(PROMPTS, max_tokens=6, **GREEDY)]
    with LLM(folder, tp_size=2, max_queued_requests=2, **SMALL) as shared_out:
        assert [o.token_ids for o in shared_out.generate(PROMPTS, max_tokens=6, **GREEDY)] == expected

        def burst(_: TextDelta) -> None:
            raise ValueError("no more")

        with pytest.raises(ValueError, match="no more"):
            shared_out.generate(PROMPTS * 4, max_tokens=100, on_delta=burst, **GREEDY)
        engine = shared_out._live
        assert isinstance(engine, RemoteTextEngine)
        wait_for(lambda: not len(engine._client.admitted), 10, "the end of all that was asked")
        generated = engine._client.text_gauges.generated_tokens
        with pytest.raises(GenerationFailed, match="grammar"):
            shared_out._run([[5]] * 8, TextParams(max_tokens=100, **GREEDY), {}, NONSENSE, None, None)
        wait_for(lambda: not len(engine._client.admitted), 10, "the end of all that was asked")
        assert engine._client.text_gauges.generated_tokens - generated < 200, "no more was asked after the error"
        assert shared_out.generate("a", max_tokens=2, **GREEDY)
        with pytest.raises(InvalidValue):
            shared_out.generate("a", n=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"quantize": "int8"}, "--quantize .*--llm-quantize"),
        ({"step_cache": "taylor"}, "--step-cache "),
        ({"compile": True}, "--compile "),
        ({"cuda_graphs": True}, "--cuda-graphs "),
        ({"lora": ["a=b.safetensors"]}, "--lora .*--lora-paths"),
    ],
)
def test_settings_of_pictures_are_refused_where_there_is_text_alone(setting: dict[str, Any], message: str) -> None:
    config = EngineConfig(model_path="none", llm_path="smollm2", **setting)
    for refuses in (describe, LLM):
        with pytest.raises(ConfigError, match=message):
            refuses(config)
    if "lora" not in setting:
        with pytest.raises(ConfigError, match=message):
            LLM("smollm2", **setting)


def test_settings_are_the_engines_with_short_names(folder: Path) -> None:
    for options, message in (
        ({"max_runing_requests": 3}, "max_running_requests"),
        ({"dtype": "float31"}, "float32"),
        ({"dtype": "float32", "llm_dtype": "float32"}, "twice"),
        ({"llm_path": "smollm2"}, "llm_path"),
        ({"lora": ["a=b"]}, "lora"),
        ({"tp_size": 5}, "5 ranks"),
        ({"ring_degree": 2}, "--ring-degree 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(folder, **options)
    with pytest.raises(ModelNotFound, match="smollm3"):
        LLM("smollm3")
    with pytest.raises(ConfigError, match="LLM writes text"):
        DiffGenerator.from_pretrained(llm_path="smollm2")
    with pytest.raises(ConfigError, match="no model of pictures"):
        DiffGenerator.from_pretrained("none")


def test_a_closed_one_says_so_and_closing_again_is_nothing(folder: Path) -> None:
    llm = LLM(folder, **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(InvalidValue, match="closed"):
        llm.generate("a")


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        ["hello"],
        [],
        [[]],
        [{"role": "user", "content": "a"}, "b"],
        [[{"role": "user", "content": "a"}, 7]],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ],
)
def test_messages_that_are_none_are_refused_and_not_left_out(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        llm.chat(messages, max_tokens=2)
    assert caught.value.param == "messages"


def test_prompts_that_are_none_are_refused(llm: LLM) -> None:
    for prompts in ([None], ["a", None], 7):
        with pytest.raises(InvalidValue):
            llm.generate(prompts, max_tokens=2)  # type: ignore[arg-type]


def test_an_adapter_of_the_settings_is_used_by_name(folder: Path, tmp_path: Path, llm: LLM) -> None:
    side = llm._live
    assert isinstance(side, LocalTextEngine)
    write_random(tmp_path / "poet.safetensors", side.side.core.model.config, seed=3)
    with LLM(folder, **SMALL, lora_paths=[f"poet={tmp_path / 'poet.safetensors'}"]) as other:
        plain = other.generate("a red apple", max_tokens=6, **GREEDY)
        poetic = other.generate("a red apple", max_tokens=6, lora="poet", **GREEDY)
        assert plain[0].token_ids == llm.generate("a red apple", max_tokens=6, **GREEDY)[0].token_ids
        assert poetic[0].token_ids != plain[0].token_ids
        with pytest.raises(AdapterNotFound, match="poet"):
            other.chat([{"role": "user", "content": "a"}], max_tokens=6, lora="poem")
