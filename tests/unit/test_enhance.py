"""What a language model makes of a prompt is read, also where it was cut off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.llm.front import TextFront
from multimodal_gen.server.enhance import INSTRUCTIONS, Enhanced, Revision, _written, instructions_tokens, read_revision
from multimodal_gen.server.schemas import ImageGenerationRequest
from tests.support.llm import smollm2_card

pytestmark = [pytest.mark.unit]


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ('{"prompt": "A red  cat.", "negative_prompt": "blurry"}', Revision("A red cat.", "blurry")),
        ('{"prompt":"a\\nb","negative_prompt":""}', Revision("a b")),
        ('{"prompt": "", "negative_prompt": "x"}', None),
        ('{"prompt": "  ", "negative_prompt": "x"}', None),
        ('{"prompt": "A cat on a mat. It sle', Revision("A cat on a mat.")),
        ('{"prompt": "A cat, a mat, a ve', Revision("A cat, a mat")),
        ('{"prompt": "A \\"wild\\" cat. And \\', Revision('A "wild" cat.')),
        ('{"prompt": "A cat.", "negative_pro', Revision("A cat.")),
        ('{"prompt": "no end of anything', None),
        ('{"prompt": "\\ud83d. x', None),
        ("", None),
        ("a cat", None),
        ('["prompt"]', None),
    ],
)
def test_an_answer_is_read_as_far_as_it_goes(text: str, revision: Revision | None) -> None:
    assert read_revision(text) == revision


class Settled:
    seeds = (7, 8)


def test_a_negative_prompt_of_the_users_own_stays_and_none_is_put_where_nothing_reads_it() -> None:
    enhanced = Enhanced(Revision("A red cat.", "blurry"))
    plain, own = ImageGenerationRequest(prompt="cat"), ImageGenerationRequest(prompt="cat", negative_prompt="dog")
    changed = enhanced.applied(plain, Settled, guided=True)  # type: ignore[arg-type]
    assert (changed.prompt, changed.negative_prompt, changed.seed) == ("A red cat.", "blurry", [7, 8])
    assert enhanced.applied(plain, Settled, guided=False).negative_prompt is None  # type: ignore[arg-type]
    assert enhanced.applied(own, Settled, guided=True).negative_prompt == "dog"  # type: ignore[arg-type]
    assert Enhanced(None).applied(plain, Settled, guided=True) is plain  # type: ignore[arg-type]


@pytest.fixture
def smollm2_front() -> Iterator[TextFront]:
    front = TextFront.open(smollm2_card(), EngineConfig())
    yield front
    front.close()


def test_the_instructions_are_a_prefix_of_every_question(smollm2_front: TextFront) -> None:
    count = instructions_tokens(smollm2_front)
    one, other = _written(smollm2_front, "a rocket at night"), _written(smollm2_front, "zwei Hunde")
    assert one[:count] == other[:count]
    shared = smollm2_front.tokenizer.decode(one[:count], skip_special_tokens=False)
    assert INSTRUCTIONS in shared
    assert shared.endswith("user\n")
