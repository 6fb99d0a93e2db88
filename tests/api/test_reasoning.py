"""A server of pictures and text, whose model is told to think, and which only warns of unknown fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.server import QUICK, Server, assert_error, start_server
from tests.support.text_server import QUICK_CHAT, events, post

pytestmark = [pytest.mark.api]

CHAT = "/v1/chat/completions"
THOUGHT = "The capital of {} is {}."


@pytest.fixture(scope="module")
def both() -> Iterator[Server]:
    flags = ("--reasoning-parser", "qwen3", "--unknown-fields", "warn")
    with start_server("--llm-path", "smollm2", "--model-path", "emoji-image", *flags) as server:
        yield server


def thinking() -> list[dict[str, str]]:
    """A small model thinks when it has been shown how."""
    shown = []
    for country, city in (("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo")):
        thought = f"<think>\n{THOUGHT.format(country, city)}\n</think>\n\n{city}."
        shown.append({"role": "user", "content": f"What is the capital of {country}?"})
        shown.append({"role": "assistant", "content": thought})
    return [*shown, {"role": "user", "content": "What is the capital of France?"}]


def told(server: Server, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(message of the whole answer, deltas of the stream)."""
    body = {"messages": thinking(), "temperature": 0, "max_tokens": 40, **fields}
    whole = post(server, CHAT, body)
    assert whole.status_code == 200, whole.text[:500]
    chunks = events(post(server, CHAT, {**body, "stream": True}).text)
    message = whole.json()["choices"][0]["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message.get(name, "")
    return message, deltas


def test_reasoning_comes_apart_and_as_it_is_written(both: Server) -> None:
    message, deltas = told(both)
    assert message["reasoning_content"] == THOUGHT.format("France", "Paris")
    assert message["content"] == "Paris."
    assert sum("reasoning_content" in delta for delta in deltas) > 3


def test_reasoning_may_come_at_once(both: Server) -> None:
    _, deltas = told(both, stream_reasoning=False)
    assert sum("reasoning_content" in delta for delta in deltas) == 1


@pytest.mark.parametrize("stream_reasoning", [True, False])
def test_reasoning_may_stay_where_it_is_written(both: Server, stream_reasoning: bool) -> None:
    message, deltas = told(both, separate_reasoning=False, stream_reasoning=stream_reasoning)
    assert message["content"] == f"<think>\n{THOUGHT.format('France', 'Paris')}\n</think>\n\nParis."
    assert not any("reasoning_content" in delta for delta in deltas)


def test_a_rule_holds_for_what_comes_after_the_reasoning(both: Server) -> None:
    message, _ = told(both, regex="[A-Z]{3,9}")
    assert message["content"].isupper()
    assert 3 <= len(message["content"]) <= 9


def test_unknown_fields_are_told_where_they_are_no_error(both: Server) -> None:
    body = {**QUICK_CHAT, "max_tokens": 1, "temprature": 1, "messages": [{"role": "user", "content": "hi", "x": 1}]}
    answer = post(both, CHAT, body)
    assert answer.status_code == 200, answer.text[:500]
    assert "temprature" in answer.headers["x-mmgen-warning"]
    assert answer.json()["warnings"] == ["Unknown field 'temprature' was ignored."]
    assert_error(post(both, CHAT, {**body, "chat_template": "x"}), 400, "unsupported_parameter", "chat_template")


def test_one_server_makes_pictures_and_text(both: Server) -> None:
    assert both.post(QUICK).status_code == 200
    picture, text = (model["id"] for model in both.get("/v1/models").json()["data"])
    assert (picture, text) == ("emoji-image", "smollm2")
    for wrong in (post(both, CHAT, {**QUICK_CHAT, "model": picture}), both.post({**QUICK, "model": text})):
        assert "use POST /v1/" in assert_error(wrong, 400, "unsupported_endpoint", "model")
    assert post(both, CHAT, {**QUICK_CHAT, "model": text}).status_code == 200
