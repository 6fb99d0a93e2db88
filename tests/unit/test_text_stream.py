"""Chunks of streams, from deltas as the engine sends them; and clients that read nothing, or leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from multimodal_gen.engine.ticket import TextTicket
from multimodal_gen.errors import GenerationFailed
from multimodal_gen.llm.answers import Answers
from multimodal_gen.llm.parsers.answer import AnswerParser
from multimodal_gen.llm.parsers.reasoning import FORMATS as REASONING
from multimodal_gen.llm.parsers.reasoning import ReasoningParser
from multimodal_gen.llm.parsers.tools.base import Tool
from multimodal_gen.llm.parsers.tools.json_calls import HermesCalls
from multimodal_gen.llm.tokenizer import Tokenizer
from multimodal_gen.messages import TextDelta, TextFinished
from multimodal_gen.server import event_stream
from multimodal_gen.server.completion_replies import CompletionForm
from multimodal_gen.server.context import Running
from multimodal_gen.server.text_replies import ChatForm, Heading, chat_body
from multimodal_gen.server.text_stream import ChatStream, CompletionStream
from multimodal_gen.text import TextRequest, TextTimings, TextUsage, TokenLogprob
from tests.support.llm import smollm2_card

pytestmark = [pytest.mark.unit]

CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
ANSWER = f"<think>\nHm, the time.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(smollm2_card())


def parser(*, stream: bool = True) -> AnswerParser:
    return AnswerParser(ReasoningParser(REASONING["qwen3"], inside=False), HermesCalls([Tool("now")]), stream=stream)


def form(make: Callable[[], AnswerParser] = AnswerParser, **more: Any) -> ChatForm:
    return ChatForm(Heading("chatcmpl-1", "m"), tokenizer(), make, **more)


class Cancels(list[str]):
    """The requests that were cancelled."""


def ticket(cancels: Cancels | None = None, n: int = 1, logprobs: int | None = None) -> TextTicket:
    request = TextRequest(id="r1", prompt=(1, 2), max_tokens=9, n=n, logprobs=logprobs)
    return TextTicket(request, (cancels if cancels is not None else Cancels()).append, time.monotonic())


def write(to: TextTicket, text: str, size: int = 3, index: int = 0) -> list[TextDelta]:
    """Have the engine write a text, a few letters a step."""
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    deltas = [TextDelta("r1", index, part, (5,)) for part in parts] + [TextDelta("r1", index, "", (2,), (), "stop")]
    for delta in deltas:
        to.push(delta)
    return deltas


FINISHED = TextFinished("r1", TextUsage(2, 0, 7), TextTimings())


def stream(to: TextTicket, how: ChatForm, metrics: Any = None) -> ChatStream:
    context: Any = SimpleNamespace(running=Running(), metrics=metrics)
    exchange: Any = SimpleNamespace(owner="o", request_id="q1", outcome="")
    return ChatStream(context, exchange, to, how, {})


def chunks(to: TextTicket, how: ChatForm) -> list[dict[str, Any]]:
    async def collect() -> list[bytes]:
        return [part async for part in stream(to, how).parts()]

    parts = asyncio.run(collect())
    assert parts[-1] == b"data: [DONE]\n\n"
    return [json.loads(part.removeprefix(b"data: ")) for part in parts[:-1]]


def told(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of the chunks."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in found:
        delta = chunk["choices"][0]["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert call["id"].startswith("call_")
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


def whole(deltas: list[TextDelta], how: ChatForm) -> dict[str, Any]:
    answers = Answers(TextRequest(id="r1", prompt=(1, 2), max_tokens=9))
    for delta in deltas:
        answers.note(delta)
    choice = json.loads(chat_body(how, answers.outputs(FINISHED), FINISHED))["choices"][0]
    assert isinstance(choice, dict)
    return choice


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_reasoning_text_and_calls_are_streamed_as_the_whole_answer_has_them(size: int) -> None:
    to = ticket()
    deltas = write(to, ANSWER, size)
    to.end(FINISHED)
    found = chunks(to, form(parser))
    expected = whole(deltas, form(parser))
    message = told(found)
    assert message["content"] == expected["message"]["content"] == "Let me see."
    assert message["reasoning_content"] == expected["message"]["reasoning_content"] == "Hm, the time."
    assert message["tool_calls"] == [call["function"] for call in expected["message"]["tool_calls"]]
    assert message["tool_calls"] == [{"name": "now", "arguments": '{"zone": "UTC"}'}] * 2
    assert found[-1]["choices"][0]["finish_reason"] == expected["finish_reason"] == "tool_calls"
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_reasoning_may_come_in_one_chunk() -> None:
    to = ticket()
    write(to, ANSWER)
    to.end(FINISHED)
    found = chunks(to, form(lambda: parser(stream=False)))
    told_at_once = [chunk["choices"][0]["delta"].get("reasoning_content") for chunk in found]
    assert [text for text in told_at_once if text] == ["Hm, the time."]


def test_a_message_of_calls_alone_has_no_content() -> None:
    choice = whole(write(ticket(), CALL), form(parser))
    assert choice["message"]["content"] is None
    assert len(choice["message"]["tool_calls"]) == 1


def test_logprobs_of_text_that_is_held_back_come_with_what_follows() -> None:
    to = ticket(logprobs=0)
    for text, token in (("<too", 10), ("l_call", 11), ("ing", 12)):
        to.push(TextDelta("r1", 0, text, (token,), (TokenLogprob(token, -1.0),)))
    to.push(TextDelta("r1", 0, "", (2,), (TokenLogprob(2, -float("inf")),), "stop"))
    to.end(FINISHED)
    found = chunks(to, form(parser, logprobs=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in found]
    assert sum(len(part["content"]) for part in parts if part) == 3  # the end token is no part of the answer
    assert told(found)["content"] == "<tool_calling"


def test_the_usage_comes_last_where_it_was_asked_for() -> None:
    to = ticket()
    write(to, "hi")
    to.end(FINISHED)
    *others, last = chunks(to, form(usage_chunk=True))
    assert {chunk["usage"] for chunk in others} == {None}
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 9


def test_an_error_in_the_middle_is_the_last_event() -> None:
    to, sent = ticket(), list[dict[str, Any]]()
    to.push(TextDelta("r1", 0, "hi", (5,)))
    to.end(GenerationFailed("It broke."))

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(stream(to, form())({}, _never, send))
    bodies = [message["body"] for message in sent[1:]]
    error = json.loads(bodies[-2].removeprefix(b"data: "))["error"]
    assert (error["code"], error["message"]) == ("generation_failed", "It broke.")
    assert bodies[-1] == b""
    assert not any(b"DONE" in body for body in bodies)


async def _never() -> Any:
    await asyncio.Event().wait()


class Metrics:
    """Counts what was cancelled."""

    count = 0

    def cancelled(self) -> None:
        self.count += 1


def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "LOOK_S", 0.01)
    cancels, metrics = Cancels(), Metrics()
    to = ticket(cancels)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def run() -> None:
        answer = asyncio.create_task(stream(to, form(), metrics)({}, _never, send))
        for _ in range(event_stream.MAX_BEHIND):
            to.push(TextDelta("r1", 0, "x", (5,)))
        await asyncio.sleep(0.1)
        assert not answer.done()  # as much may wait
        for _ in range(10):
            to.push(TextDelta("r1", 0, "x", (5,)))
        await asyncio.wait_for(answer, 2)

    asyncio.run(run())
    assert cancels == ["r1"]
    assert metrics.count == 1


def test_a_client_that_leaves_cancels_its_request() -> None:
    cancels, metrics = Cancels(), Metrics()
    to = ticket(cancels)

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        return

    asyncio.run(asyncio.wait_for(stream(to, form(), metrics)({}, receive, send), 2))
    assert cancels == ["r1"]
    assert metrics.count == 1


def completions(tickets: list[TextTicket], metrics: Any = None, **more: Any) -> CompletionStream:
    context: Any = SimpleNamespace(running=Running(), metrics=metrics)
    exchange: Any = SimpleNamespace(owner="o", request_id="q1", outcome="")
    how = CompletionForm(Heading("cmpl-1", "m"), tokenizer(), 1, **more)
    return CompletionStream(context, exchange, tickets, how, {})


def sent_by(answer: CompletionStream) -> list[bytes]:
    """The bodies that a client gets, but for the empty one at the end."""
    sent = list[dict[str, Any]]()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(answer({}, _never, send), 2))
    return [message["body"] for message in sent[1:-1]]


def test_the_texts_of_several_prompts_come_mixed_and_end_together() -> None:
    tickets = [ticket(), ticket()]
    for to, text in zip(tickets, ("abcdef", "ghi"), strict=True):
        write(to, text)
        to.end(FINISHED)
    bodies = sent_by(completions(tickets, echoes=("1:", "2:"), usage_chunk=True))
    assert bodies[-1] == b"data: [DONE]\n\n"
    *found, usage = [json.loads(body.removeprefix(b"data: ")) for body in bodies[:-1]]
    texts = {0: "", 1: ""}
    for chunk in found:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "1:abcdef", 1: "2:ghi"}
    assert usage["usage"]["completion_tokens"] == 14


def test_the_first_prompt_that_fails_ends_all() -> None:
    cancels = Cancels()
    tickets = [ticket(cancels), ticket(cancels)]
    write(tickets[0], "abc")
    tickets[1].end(GenerationFailed("It broke."))
    bodies = sent_by(completions(tickets, Metrics()))
    assert json.loads(bodies[-1].removeprefix(b"data: "))["error"]["code"] == "generation_failed"
    assert len(cancels) == 2
