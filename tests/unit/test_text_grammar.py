"""Answers that follow grammars, in the engine core: beside free ones, several of one request, after preemption."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from multimodal_gen.llm.core import TextCore
from multimodal_gen.llm.grammar.compiler import GrammarCompiler
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.text import Grammar, TextSampling
from tests.support.text_core import Driver, ask, make_text_folder, open_core

pytestmark = [pytest.mark.unit]

DATE = r"\d{4}-\d{2}-\d{2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_folder("llama", tmp_path_factory.mktemp("model"), vocab_size=512)


@pytest.fixture(scope="module")
def core(folder: Path) -> TextCore:
    return open_core(folder)


@pytest.fixture(scope="module")
def grammars(core: TextCore) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(core.card, Tokenizer.load(core.card))
    yield made
    made.close()


@pytest.fixture(scope="module")
def date(grammars: GrammarCompiler) -> Grammar:
    return grammars.compile_now("regex", DATE, "regex")


def test_answers_with_and_without_a_grammar_are_written_together(core: TextCore, date: Grammar) -> None:
    warm = TextSampling(temperature=2.0, seed=5)
    driver = Driver(core)
    driver.add(
        ask("free", [5, 6, 7]),
        ask("ruled", [5, 6, 7], 40, grammar=date, n=3, sampling=warm, ignore_eos=False),
        ask("greedy", [5, 6, 7], 40, grammar=date, ignore_eos=False),
        ask("endless", [5, 6, 7], 40, grammar=date, ignore_eos=True, min_tokens=30),
    )
    driver.run()
    heard = driver.heard
    assert not heard.failed
    answers = [*heard.outputs["ruled"], *heard.outputs["greedy"], *heard.outputs["endless"]]
    assert all(re.fullmatch(DATE, answer.text) for answer in answers), [answer.text for answer in answers]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert len({answer.text for answer in heard.outputs["ruled"]}) > 1, "each choice has its own place and its own dice"
    alone = Driver(core)
    alone.add(ask("free", [5, 6, 7]))
    alone.run()
    assert heard.ids("free") == alone.heard.ids("free"), "a free row is not touched by its neighbours' masks"


def test_a_preempted_answer_goes_on_in_its_grammar(folder: Path, core: TextCore, date: Grammar) -> None:
    requests = [ask(f"r{i}", [5 + i, 6, 7, 8], 20, grammar=date, ignore_eos=False) for i in range(6)]
    expected = Driver(core)
    expected.add(*requests)
    expected.run()
    tight = open_core(folder, kv_page_size=4, kv_cache_memory=20 * core.model.page_bytes(4))
    driver = Driver(tight)
    driver.add(*requests)
    driver.run()
    assert tight.gauges().preemptions > 0, "memory is for a few of the six"
    for request in requests:
        assert driver.heard.ids(request.id) == expected.heard.ids(request.id)


def test_a_grammar_that_is_no_good_fails_its_request_alone(core: TextCore, date: Grammar) -> None:
    driver = Driver(core)
    broken = msgspec.structs.replace(date, digest="another", compiled=b"{}")
    driver.add(ask("bad", [5, 6], grammar=broken), ask("good", [5, 6], grammar=date, ignore_eos=False, max_tokens=40))
    driver.run()
    assert driver.heard.failed["bad"].code == "generation_failed"
    assert re.fullmatch(DATE, driver.heard.outputs["good"][0].text)
