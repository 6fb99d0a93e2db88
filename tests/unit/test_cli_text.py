"""What the command line prints of others' words."""

from __future__ import annotations

import pytest

from multimodal_gen.cli.text import harmless

pytestmark = [pytest.mark.unit]


def test_no_escape_sequence_reaches_a_terminal() -> None:
    hostile = "\x1b]0;title\x07 \x1b[2J \x9b31m \x7f\r"
    assert not set(harmless(hostile)) & {chr(code) for code in [*range(32), *range(127, 160)]}


def test_text_of_all_scripts_stays_as_it_is() -> None:
    text = "a\tb\nnaïve 東京 👩‍🚀 مرحبا\n"
    assert harmless(text) == text
