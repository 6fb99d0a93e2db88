"""Grammars: what is refused and in what time, that they are compiled once, and that answers match them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch

from multimodal_gen.errors import GenerationFailed, InvalidValue, QueueFull
from multimodal_gen.llm.grammar import compiler as compiler_module
from multimodal_gen.llm.grammar.compiler import GrammarCompiler
from multimodal_gen.llm.grammar.matcher import Matchers
from multimodal_gen.llm.sampler import Sampler, SamplingRow
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.text import Grammar, TextSampling
from tests.support.llm import smollm2_card
from tests.support.random_schemas import hasty_logits, random_schema

pytestmark = [pytest.mark.unit]

LIMIT_S = 1.5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(smollm2_card())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(smollm2_card(), tokenizer, LIMIT_S)
    made.compile_now("json_object", "", "response_format")  # ready from here on
    yield made
    made.close()


@pytest.fixture(scope="module")
def matchers(tokenizer: Tokenizer) -> Matchers:
    return Matchers(tokenizer)


def write(
    tokenizer: Tokenizer, matchers: Matchers, grammar: Grammar, seed: int, most: int = 400, **wishes: Any
) -> str | None:
    """A random answer that matches; None: not at its end after so many tokens."""
    row = SamplingRow(TextSampling(), (1,), seed, matcher=matchers.open(grammar)(), **wishes)
    generator, ids = torch.Generator().manual_seed(seed), list[int]()
    while row.matcher is not None and not row.matcher.finished:
        sampled = Sampler().sample(hasty_logits(tokenizer, generator), [row])
        assert not sampled.errors
        row.accept(sampled.ids[0])
        ids += sampled.ids
        if len(ids) == most:
            return None
    assert ids[-1] in tokenizer.eos_ids
    return tokenizer.decode(ids)


def test_every_answer_to_random_schemas_is_valid(
    compiler: GrammarCompiler, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    rng, written = random.Random(6), 0
    for seed in range(100):
        schema = random_schema(rng)
        grammar = compiler.compile_now("json_schema", json.dumps(schema), "response_format")
        text = write(tokenizer, matchers, grammar, seed)
        if text is not None:
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            written += 1
    assert written >= 95, "nearly all come to their end"


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"(yes|no), [a-f]{2,4}\d+", r"(yes|no), [a-f]{2,4}\d+"),
        ("ebnf", 'root ::= "a" root | "b"', "a*b"),
        ("json_object", "", r"\{.*\}"),
    ],
)
def test_answers_match_expressions_and_grammars(
    compiler: GrammarCompiler, tokenizer: Tokenizer, matchers: Matchers, kind: Any, source: str, pattern: str
) -> None:
    grammar = compiler.compile_now(kind, source, kind)
    answers = [write(tokenizer, matchers, grammar, seed) for seed in range(5)]
    assert any(answer is not None for answer in answers)
    assert all(re.fullmatch(pattern, answer) for answer in answers if answer is not None)


def test_a_structural_tag_lets_text_be_and_keeps_what_is_tagged(
    compiler: GrammarCompiler, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}, "required": ["x"]}
    tag = {"begin": "<call>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</call>"}
    only = {"type": "structural_tag", "format": {"type": "sequence", "elements": [{"type": "tag", **tag}]}}
    grammar = compiler.compile_now("structural_tag", json.dumps(only), "tools")
    answer = write(tokenizer, matchers, grammar, 1)
    assert answer is not None
    found = re.fullmatch(r"<call>(\{\"x\": -?\d+\})</call>", answer)
    assert found, answer
    jsonschema.validate(json.loads(found[1]), schema)


BAD = [
    ("json_schema", "{", "no JSON"),
    ("json_schema", "[]", "must be an object"),
    ("json_schema", '{"items": ' * 5000 + "{}" + "}" * 5000, "nested"),
    ("json_schema", '{"items": ' * 100 + "{}" + "}" * 100, "nested more than 64"),
    ("json_schema", '{"$ref": "#"}', "no answer can match"),
    ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "no answer can match"),
    ("json_schema", '{"$ref": "#/nowhere"}', "nowhere"),
    ("json_schema", '{"$ref": "http://127.0.0.1/x.json"}', "only places in itself"),
    ("json_schema", '{"type": "thing"}', "thing"),
    ("json_schema", '{"type": 5, "enum": [1]}', "#/type must be one of"),
    ("json_schema", '{"type": [["integer"]], "enum": [1]}', "#/type must be one of"),
    ("json_schema", '{"type": [], "minimum": 1}', "#/type must be one of"),
    ("json_schema", '{"type": "integer", "enum": [1e999]}', "no value"),
    ("json_schema", '{"type": "string", "pattern": "("}', "parenthesis"),
    ("json_schema", '{"type": "string", "pattern": "(?=a)b"}', "Lookahead"),
    ("json_schema", '{"type": "string", "pattern": "^\\\\p{L}+$"}', "(?i)unicode"),
    ("json_schema", '{"type": "string", "pattern": "a+", "maxLength": 3}', "pattern"),
    ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 2}', "minLength"),
    ("json_schema", '{"not": {"type": "string"}}', "'not'"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"properties": {"a": {"if": {}}}}', "#/properties/a has 'if'"),
    ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
    ("json_schema", '{"allOf": [{"type": "integer"}, {"minimum": 3}]}', "allOf"),
    ("json_schema", '{"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {"type": "string"}}}', "side by side"),
    ("json_schema", '{"type": "integer", "enum": ["a"]}', "no value"),
    ("json_schema", '{"required": ["a"], "additionalProperties": false}', "requires 'a'"),
    ("json_schema", '{"minimum": 1, "minLength": 2}', "needs a 'type'"),
    ("regex", "(a+", "parenthesis"),
    ("regex", "([", r"\["),
    ("regex", r"\p{L}", "(?i)unicode"),
    ("regex", "(" * 20_000 + "a" + ")" * 20_000, "(?i)nest"),
    ("regex", "\ud800", "surrogate"),
    ("ebnf", "root ::=", "line 1"),
    ("ebnf", 'x ::= "a"', "root"),
    ("ebnf", "root ::= root", "no answer can match"),
    ("structural_tag", '{"type": "structural_tag", "format": {"type": "nothing"}}', "nothing"),
    ("structural_tag", "nonsense", "no JSON"),
    ("ebnf", "#" * 70_000, "70,000 characters"),
    ("regex", "(.*)*" * 60, "ambiguous"),
    ("ebnf", 'root ::= root root | "a" | ""', "ambiguous"),
    ("regex", "(a?){100}" * 10, "ambiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source", "why"), BAD)
def test_what_cannot_be_kept_is_refused_at_once_naming_the_field(
    compiler: GrammarCompiler, kind: Any, source: str, why: str
) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidValue, match=why) as refused:
        compiler.compile_now(kind, source, "response_format")
    assert time.monotonic() - started < 2
    assert refused.value.param == "response_format"
    assert "'response_format'" in str(refused.value)
    assert "/cpp/" not in str(refused.value), "nothing of the library's insides"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", ".{1,1000000}"),
        (
            "json_schema",
            json.dumps({"properties": {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,50}$"} for i in range(200)}}),
        ),
    ],
)
def test_what_takes_for_ever_is_refused_in_time_and_holds_nobody_up(
    compiler: GrammarCompiler, kind: Any, source: str
) -> None:
    other = list[float]()
    pid, started = compiler.helper_pid, time.monotonic()

    def quick() -> None:
        compiler.compile_now("regex", f"quick {started}", "regex")
        other.append(time.monotonic() - started)

    thread = threading.Thread(target=quick)
    thread.start()
    with pytest.raises(InvalidValue, match="to compile; make it simpler"):
        compiler.compile_now(kind, source, "regex")
    assert time.monotonic() - started < LIMIT_S + 0.5
    thread.join()
    assert other[0] < LIMIT_S, "another grammar was compiled meanwhile"
    assert compiler.helper_pid == pid, "the helper itself goes on"


def test_one_compilation_for_all_who_wait_and_all_who_come_later(compiler: GrammarCompiler) -> None:
    before = compiler.compilations
    schema = json.dumps({"type": "object", "properties": {"once": {"type": "integer"}}})

    async def many() -> list[Grammar]:
        return list(await asyncio.gather(*(compiler.compile("json_schema", schema, "x") for _ in range(200))))

    found = asyncio.run(many())
    assert len({id(grammar) for grammar in found}) == 1
    assert compiler.compile_now("json_schema", schema, "x") is found[0]
    assert compiler.compilations == before + 1


def test_one_who_stops_waiting_takes_it_from_nobody(compiler: GrammarCompiler) -> None:
    async def two() -> Grammar:
        first = asyncio.create_task(compiler.compile("regex", "[ab]{3,90}c", "regex"))
        second = asyncio.create_task(compiler.compile("regex", "[ab]{3,90}c", "regex"))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(two()).kind == "regex"


def test_grammars_that_nobody_asks_for_any_more_go(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_KEPT", 2)
    for i in range(4):
        compiler.compile_now("regex", f"kept {i}", "regex")
    before = compiler.compilations
    compiler.compile_now("regex", "kept 3", "regex")
    assert compiler.compilations == before
    compiler.compile_now("regex", "kept 0", "regex")
    assert compiler.compilations == before + 1


def test_too_many_at_once_are_turned_away(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 0)
    with pytest.raises(QueueFull):
        compiler.compile_now("regex", "one too many", "regex")


def test_a_helper_that_dies_is_an_error_once_and_the_next_one_serves(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(smollm2_card(), tokenizer, LIMIT_S)
    try:
        assert compiler.helper_pid is None, "nothing is started before it is needed"
        assert tokenizer.vocabulary.digest, "finding all tokens takes longer than the helper has"
        compiler.prepare()
        assert compiler.helper_pid is not None
        threading.Timer(0.2, os.kill, (compiler.helper_pid, signal.SIGKILL)).start()
        with pytest.raises(GenerationFailed, match="starts it anew"):
            compiler.compile_now("regex", "a", "regex")
        assert compiler.compile_now("regex", "a", "regex").kind == "regex"
    finally:
        compiler.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.path.exists(f"/proc/{compiler.helper_pid}"):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{compiler.helper_pid}"), "close leaves no process"


def test_a_helper_that_hangs_is_found_and_told_and_the_next_one_serves(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = compiler.helper_pid
    assert hanging is not None
    os.kill(hanging, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(compiler_module, "START_S", 0.5 - compiler_module.MAX_WAITING * LIMIT_S)
        with pytest.raises(GenerationFailed, match="did not answer"):
            asyncio.run(compiler.compile("regex", "[a-c]{3}", "regex"))
    assert "is stuck" in caplog.text
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.path.exists(f"/proc/{hanging}"):
        time.sleep(0.02)
    assert compiler.compile_now("regex", "[a-c]{3}", "regex").kind == "regex"
    assert compiler.helper_pid != hanging


def test_a_grammar_of_another_vocabulary_is_that_requests_error(compiler: GrammarCompiler) -> None:
    import msgspec

    grammar = compiler.compile_now("regex", "abc", "regex")
    other = Tokenizer.load(msgspec.structs.replace(smollm2_card(), vocab_size=49_000))
    with pytest.raises(GenerationFailed, match="same model"):
        Matchers(other).open(grammar)
    with pytest.raises(GenerationFailed):
        Matchers(other).open(msgspec.structs.replace(grammar, compiled=b"nonsense"))


def test_rows_with_and_without_a_grammar_share_a_step(
    compiler: GrammarCompiler, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    begin = matchers.open(compiler.compile_now("regex", "[0-9]{3}", "regex"))
    greedy = TextSampling(temperature=0.0)
    rows = [SamplingRow(greedy, (1,), logprobs=2, matcher=matcher) for matcher in (None, begin(), None, begin())]
    logits = torch.randn(4, 49152, generator=torch.Generator().manual_seed(0))
    free = logits.argmax(-1).tolist()
    sampled = Sampler().sample(logits.clone(), rows)
    assert [sampled.ids[0], sampled.ids[2]] == [free[0], free[2]]
    for at in (1, 3):
        assert tokenizer.token_text(sampled.ids[at]).isdigit()
        told = sampled.logprobs[at]
        assert told is not None
        assert told.top[0][0] == free[at], "told is what the model thought, not what the grammar left"
    with pytest.raises(GenerationFailed, match="no place"):
        rows[1].accept(tokenizer.encode("x")[0])


def test_min_tokens_gives_way_to_a_grammar_that_is_complete(
    compiler: GrammarCompiler, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    grammar = compiler.compile_now("regex", "a{1,6}", "regex")
    assert write(tokenizer, matchers, grammar, 0, end_ids=(2,), min_tokens=1) is not None
    long = write(tokenizer, matchers, grammar, 0, end_ids=(2,), min_tokens=50)
    assert long == "aaaaaa", "as long as it can be"


def test_the_front_needs_no_torch_for_grammars() -> None:
    import subprocess
    import sys

    code = (
        "import sys, multimodal_gen.llm.grammar.compiler, multimodal_gen.llm.template, multimodal_gen.llm.detokenizer\n"
        "print([name for name in ('torch', 'transformers', 'xgrammar') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
