"""Completions and tokens with SmolLM2."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support.server import Server
from tests.support.text_server import MODEL, events, post

pytestmark = [pytest.mark.api]

FRANCE = "The capital of France is"


@pytest.fixture
def client(text_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=text_server.base_url + "/v1", api_key="none", max_retries=0)


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    response = post(server, "/v1/completions", {"prompt": FRANCE, "temperature": 0, "max_tokens": 4, **fields})
    assert response.status_code == 200, response.text[:500]
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def test_a_text_is_gone_on_with(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0, max_tokens=3)
    assert answer.choices[0].text.startswith(" Paris")
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert client.completions.create(model=MODEL, prompt=FRANCE).usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_several_prompts_get_n_answers_each_in_order(text_server: Server) -> None:
    prompts = [FRANCE, "One, two, three, four,"]
    answer = complete(text_server, prompt=prompts, n=2, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice in answer["choices"]:
        assert choice["text"].startswith(prompts[choice["index"] // 2])
    assert answer["usage"]["completion_tokens"] == 16


def test_token_ids_are_prompts(text_server: Server) -> None:
    ids = post(text_server, "/v1/tokenize", {"prompt": FRANCE}).json()["tokens"]
    text = complete(text_server)["choices"][0]["text"]
    assert complete(text_server, prompt=ids)["choices"][0]["text"] == text
    both = complete(text_server, prompt=[ids, ids], echo=True)
    assert [choice["text"] for choice in both["choices"]] == [FRANCE + text] * 2


def test_the_prompts_own_logprobs_are_told(text_server: Server) -> None:
    told = complete(text_server, echo=True, logprobs=2)["choices"][0]
    logprobs = told["logprobs"]
    assert "".join(logprobs["tokens"]) == told["text"]
    assert logprobs["token_logprobs"][0] is None
    assert all(number < 0 for number in logprobs["token_logprobs"][1:])
    assert [told["text"][at:][:1] for at in logprobs["text_offset"]] == [token[:1] for token in logprobs["tokens"]]
    assert {len(top) for top in logprobs["top_logprobs"][1:]} == {2}


def test_a_prompt_is_scored_without_an_answer(text_server: Server) -> None:
    scored = complete(text_server, max_tokens=0, echo=True, logprobs=1)
    assert scored["choices"][0]["text"] == FRANCE
    assert scored["usage"]["completion_tokens"] == 0
    whole = complete(text_server, max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert scored["choices"][0]["logprobs"]["tokens"] == whole["tokens"][:-1]
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(whole["token_logprobs"][:-1], abs=0.05)


def test_a_stream_of_several_prompts_says_the_same(text_server: Server) -> None:
    fields: dict[str, Any] = {"prompt": [FRANCE, "One, two, three,"], "n": 2, "echo": True, "max_tokens": 6}
    whole = complete(text_server, **fields)
    body = {"temperature": 0, **fields, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(text_server, "/v1/completions", body).text)
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_tokens_and_texts_are_each_others(text_server: Server) -> None:
    text = "Grüße, 世界! 🚀 <|im_end|> 12345\n\tx"
    answer = post(text_server, "/v1/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 8192
    assert post(text_server, "/v1/detokenize", {"tokens": answer["tokens"]}).json()["text"] == text


def test_control_tokens_are_told_or_left_out(text_server: Server) -> None:
    tokens = post(text_server, "/v1/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    whole = post(text_server, "/v1/detokenize", {"tokens": tokens}).json()["text"]
    bare = post(text_server, "/v1/detokenize", {"tokens": tokens, "skip_special_tokens": True}).json()["text"]
    assert "<|im_start|>user\nhi<|im_end|>" in whole
    assert "<|im_start|>" not in bare
    started = post(
        text_server,
        "/v1/tokenize",
        {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False},
    ).json()["tokens"]
    assert tokens[: len(started)] == started
    assert len(started) < len(tokens)
