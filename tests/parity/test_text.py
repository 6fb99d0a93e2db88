"""Greedy answers token by token against `generate` of transformers, however they are scheduled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal_gen.llm.loading import TextModel
from multimodal_gen.llm.tokenizer import Tokenizer
from tests.support.text_core import answer, ask, greedy, greedy_together, make_text_folder, open_core
from tests.support.text_models import open_model, reference, smollm2

pytestmark = [pytest.mark.parity]

TOKENS = 16
CASES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_running_requests": 1},
    "eight": {"max_running_requests": 8},
    "thirty-two": {"max_running_requests": 32},
    "in pieces": {"max_running_requests": 32, "chunked_prefill_size": 7},
    "nothing is kept": {"max_running_requests": 8, "prefix_cache": False},
    "in pieces, nothing is kept": {"max_running_requests": 32, "chunked_prefill_size": 7, "prefix_cache": False},
    "pages of one token": {"max_running_requests": 8, "kv_page_size": 1},
}


def prompts(count: int = 50, vocabulary: int = 320) -> list[list[int]]:
    """Random ones, of which a third begin alike."""
    rng = random.Random(11)
    shared = [rng.randrange(3, vocabulary) for _ in range(20)]
    return [
        (shared if rng.random() < 0.33 else []) + [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, 40))]
        for _ in range(count)
    ]


class Family:
    """A tiny model, and what transformers makes of the prompts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = make_text_folder(name, folder)
        theirs = reference(self.folder)
        self.expected = [greedy(theirs, prompt, TOKENS) for prompt in prompts()]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(family: Family, case: str) -> None:
    core = open_core(family.folder, **CASES[case])
    heard = answer(core, *(ask(str(i), prompt, TOKENS) for i, prompt in enumerate(prompts())))
    assert [heard.ids(str(i)) for i in range(50)] == family.expected
    if CASES[case].get("prefix_cache", True) and CASES[case]["max_running_requests"] == 1:
        assert core.gauges().cached_tokens > 100


def test_tokens_are_those_of_transformers_after_preemptions(family: Family) -> None:
    for keep in (True, False):
        # 40 pages of 4 tokens hold two or three of them at their full length.
        core = open_core(family.folder, kv_page_size=4, kv_cache_memory=_bytes(family, 40, 4), prefix_cache=keep)
        heard = answer(core, *(ask(str(i), prompt, TOKENS) for i, prompt in enumerate(prompts())))
        assert core.gauges().preemptions > 5
        assert [heard.ids(str(i)) for i in range(50)] == family.expected


def test_a_second_asking_reads_nothing_again_and_says_the_same(family: Family) -> None:
    core = open_core(family.folder, kv_page_size=1)
    for name in "ab":
        heard = answer(core, *(ask(f"{name}{i}", prompt, TOKENS) for i, prompt in enumerate(prompts(12))))
        assert [heard.ids(f"{name}{i}") for i in range(12)] == family.expected[:12]
    cached = [heard.finished[f"b{i}"].usage.cached_tokens for i in range(12)]
    assert cached == [len(prompt) - 1 for prompt in prompts(12)]


def _bytes(family: Family, pages: int, page_size: int) -> int:
    model = open_model(family.folder)
    return (1 + model.backend.copies) * pages * model.page_bytes(page_size)


def test_bf16_tokens_are_those_of_transformers_or_as_good(tmp_path: Path) -> None:
    folder = make_text_folder("qwen3", tmp_path / "model")
    exact, rounded = reference(folder), reference(folder, torch.bfloat16)
    heard = answer(open_core(folder, "bfloat16"), *(ask(str(i), p, TOKENS) for i, p in enumerate(prompts(24))))
    our_exact, their_exact = 0, 0
    for i, prompt in enumerate(prompts(24)):
        ours, theirs, wanted = heard.ids(str(i)), greedy(rounded, prompt, TOKENS), greedy(exact, prompt, TOKENS)
        our_exact, their_exact = our_exact + (ours == wanted), their_exact + (theirs == wanted)
        if ours != theirs:
            _assert_tie(exact, rounded, prompt, ours, theirs)
    assert our_exact >= their_exact - 5 > 3, f"{our_exact} and {their_exact} of 24 answers are those of float32"


@torch.no_grad()
def _assert_tie(exact: Any, rounded: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> None:
    """Where they part, the logits of the two tokens are closer together than rounding moves logits."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    ids = torch.tensor([prompt + ours[:at]])
    logits, moved = exact(ids).logits[0, -1].float(), rounded(ids).logits[0, -1].float()
    gap = abs(float(logits[ours[at]] - logits[theirs[at]]))
    assert gap < 2 * float((logits - moved).abs().max()), f"token {at}: {ours[at]} instead of {theirs[at]}, {gap}"


# --- SmolLM2, with the weights of its GGUF file -----------------------------------------------------------------------

TEXTS = [
    "The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time,", "2 + 2 =",
    "The three primary colours are", "Dear Sir or Madam,", "In 1969,", "The opposite of hot is", "To be or not to be,",
    "import numpy as np\n", "Roses are red,", "The largest planet is", "She opened the door and", "Q: Who are you?\nA:",
    "Une phrase en français :",
]  # fmt: skip
SMOL_TOKENS = 8


class Smol:
    """The model, loaded once, and what transformers makes of the texts."""

    def __init__(self, theirs: Any) -> None:
        self.model: TextModel = open_model(smollm2())
        self.tokenizer = Tokenizer.load(self.model.card)
        self.prompts = [self.tokenizer.encode(text) for text in TEXTS]
        self.expected = greedy_together(theirs, self.prompts, SMOL_TOKENS)


@pytest.fixture(scope="module")
def smol(smollm2_by_transformers: Any) -> Smol:
    return Smol(smollm2_by_transformers)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_running_requests": 1},
        {"max_running_requests": 8, "chunked_prefill_size": 16, "kv_page_size": 1},
        {"max_running_requests": 32, "prefix_cache": False},
    ],
    ids=["1", "8, in pieces, pages of one token", "32, nothing is kept"],
)
def test_smollm2_says_what_it_says_in_transformers(smol: Smol, settings: dict[str, Any]) -> None:
    core = open_core(smollm2(), model=smol.model, **settings)
    count = 4 if settings["max_running_requests"] == 1 else len(TEXTS)
    heard = answer(core, *(ask(str(i), smol.prompts[i], SMOL_TOKENS) for i in range(count)))
    assert [heard.ids(str(i)) for i in range(count)] == smol.expected[:count]
    texts = [heard.outputs[str(i)][0].text for i in range(count)]
    assert texts == [smol.tokenizer.decode(ids) for ids in smol.expected[:count]]
