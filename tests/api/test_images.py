"""Images through the official clients and plain HTTP: what is asked for is what comes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import openai
import pytest
from PIL import Image

from multimodal_gen.media.recipe import Recipe
from tests.support.server import QUICK, Server

pytestmark = [pytest.mark.api]

EXTRA = {"num_inference_steps": 2, "seed": 7}


def picture(b64: str | None) -> Image.Image:
    """The decoded image."""
    assert b64
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0)


def test_openai_client_with_every_field(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="emoji-image",
        prompt="a red apple",
        n=2,
        size="96x64",
        quality="auto",
        background="opaque",
        moderation="auto",
        output_format="webp",
        output_compression=80,
        response_format="b64_json",
        user="alice",
        extra_body={**EXTRA, "negative_prompt": "blue", "guidance_scale": 2, "cfg_truncation": 0.9},
    )
    assert answer.data is not None
    assert [picture(item.b64_json).size for item in answer.data] == [(96, 64)] * 2
    assert {picture(item.b64_json).format for item in answer.data} == {"WEBP"}
    assert (answer.size, answer.output_format, answer.background, answer.quality) == (
        "96x64", "webp", "opaque", "medium",
    )  # fmt: skip
    assert all(item.url is None for item in answer.data)
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == usage.input_tokens_details.text_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_steps_are_extrapolated_for_those_who_ask(server: Server) -> None:
    cache = "first-block:threshold=10.0,order=0,warmup=2,most=1"
    wish = {**QUICK, "num_inference_steps": 6, "n": 2}
    plain, quick = (server.post({**wish, "step_cache": name}).json() for name in ("none", cache))
    assert "step_cache" not in plain
    assert plain["timings"]["cached_steps"] == 0
    assert quick["step_cache"] == cache
    assert quick["timings"]["cached_steps"] == 4  # the third and the fifth of both
    recipes = [Recipe.from_json(picture(made["data"][1]["b64_json"]).info["mmgen"]) for made in (plain, quick)]
    assert [recipe.step_cache for recipe in recipes] == [None, cache]
    assert plain["data"] != quick["data"]


def test_answer_has_seeds_timings_and_identity(server: Server) -> None:
    response = server.post({**QUICK, "n": 3, "seed": 40}, {"x-request-id": "my-request.1"})
    body = response.json()
    assert [item["seed"] for item in body["data"]] == [40, 41, 42]
    assert body["id"] == response.headers["x-request-id"] == "my-request.1"
    assert body["model"] == "emoji-image"
    timings = body["timings"]
    assert timings["steps"] == 2
    assert timings["per_step"] == pytest.approx(timings["denoise"] / 2)
    parts = sum(timings[name] for name in ("queue", "encode", "denoise", "decode"))
    assert 0 < parts <= timings["total"] * 1.05
    assert "warnings" not in body


def test_same_seed_same_bytes_and_a_list_names_each_seed(server: Server) -> None:
    first = server.post({**QUICK, "n": 2, "seed": [11, 5]}).json()["data"]
    again = server.post({**QUICK, "n": 2, "seed": [11, 5]}).json()["data"]
    assert first == again
    assert [item["seed"] for item in first] == [11, 5]
    alone = server.post({**QUICK, "seed": 5}).json()["data"][0]
    pixels = [list(picture(item["b64_json"]).tobytes()) for item in (first[1], alone)]
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1


def test_a_seed_is_drawn_and_reported(server: Server) -> None:
    body = {**QUICK, "seed": None}
    seeds = {server.post(body).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_size_auto_and_width_with_height(server: Server) -> None:
    for asked, size in (({"size": "auto"}, "128x128"), ({"size": None, "width": 64, "height": 96}, "64x96")):
        assert server.post({**QUICK, **asked}).json()["size"] == size


def test_quality_chooses_the_steps(server: Server) -> None:
    model = server.get("/v1/models").json()["data"][0]
    body = {**QUICK, "num_inference_steps": None, "quality": "low"}
    answer = server.post(body).json()
    assert answer["timings"]["steps"] == -(-model["defaults"]["num_inference_steps"] // 2)
    assert answer["quality"] == "low"


def test_files_carry_their_recipe(server: Server) -> None:
    data = server.post({**QUICK, "n": 2, "seed": 9}).json()["data"]
    image = picture(data[1]["b64_json"])
    recipe = Recipe.from_json(image.info["mmgen"])
    assert (recipe.prompt, recipe.seed, recipe.num_inference_steps) == (QUICK["prompt"], 10, 2)
    assert "Seed: 10" in image.info["parameters"]


def test_null_means_the_default(server: Server) -> None:
    fields = (
        "n",
        "model",
        "quality",
        "user",
        "stream",
        "partial_images",
        "style",
        "svg",
        "cfg_truncation",
        "priority",
    )
    assert server.post({**QUICK, **dict.fromkeys(fields)}).status_code == 200


def test_open_webui_payload(server: Server) -> None:
    body = {"model": "emoji-image", "prompt": "a cat", "n": 1, "size": "64x64", "response_format": "b64_json"}
    item = server.post(body).json()["data"][0]
    assert "url" not in item
    assert picture(item["b64_json"]).size == (64, 64)


def test_async_clients_share_the_machine(server: Server) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.images.generate(
                        prompt=f"animal {i}", size=f"{64 + 16 * (i % 3)}x64", extra_body={"num_inference_steps": 2 + i}
                    )
                    for i in range(6)
                )
            )

    answers = asyncio.run(ask())
    assert [answer.size for answer in answers] == ["64x64", "80x64", "96x64"] * 2


def test_stream_shows_partial_images_then_the_image(client: openai.OpenAI) -> None:
    extra = {**EXTRA, "num_inference_steps": 4}
    stream = client.images.generate(prompt="a red apple", size="64x64", stream=True, partial_images=2, extra_body=extra)
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [e.partial_image_index for e in events if e.type == "image_generation.partial_image"] == [0, 1]
    assert all(picture(event.b64_json).size == (64, 64) for event in events)
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert last.usage.output_tokens > 0
    whole = client.images.generate(prompt="a red apple", size="64x64", extra_body=extra)
    assert whole.data is not None
    assert whole.data[0].b64_json == last.b64_json


def test_stream_of_an_async_client_with_several_images(server: Server) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.base_url + "/v1", api_key="none", max_retries=0) as client:
            stream = await client.images.generate(
                prompt="a cat", n=3, size="64x64", stream=True, extra_body={**EXTRA, "seed": 30}
            )
            return [event.model_dump() async for event in stream]

    events = asyncio.run(ask())
    assert [(event["type"], event["index"], event["seed"]) for event in events] == [
        ("image_generation.completed", i, 30 + i) for i in range(3)
    ]


def test_stream_comments_tell_progress(server: Server) -> None:
    text = server.post({**QUICK, "stream": True}).text
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert comments == [": started", ": image 0 step 1/2", ": image 0 step 2/2"]


def test_errors_of_a_stream_before_it_starts_are_plain(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", size="1x1", stream=True)
    assert (caught.value.code, caught.value.param) == ("invalid_size", "size")
    assert caught.value.request_id


def test_deadline_passes(server: Server) -> None:
    response = server.post({**QUICK, "num_inference_steps": 200, "deadline_s": 0.2})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


def test_models(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["emoji-image"]
    assert client.models.retrieve("emoji-image") == listed[0]
    with pytest.raises(openai.NotFoundError, match="Did you mean 'emoji-image'") as caught:
        client.models.retrieve("emoji-imag")
    assert caught.value.code == "model_not_found"


def test_long_prompt_is_cut_with_a_warning(server: Server) -> None:
    response = server.post({**QUICK, "prompt": "many words " * 400, "max_sequence_length": 16})
    assert response.status_code == 200
    assert len(response.json()["warnings"]) == 1
    assert "cut to 16 tokens" in response.json()["warnings"][0]
    assert response.json()["usage"]["input_tokens"] <= 16


def test_a_stream_warns_of_a_cut_prompt_too(server: Server) -> None:
    body = {**QUICK, "stream": True, "n": 2}
    for more, warned in (({"prompt": "many words " * 400, "max_sequence_length": 16}, True), ({}, False)):
        lines = server.post({**body, **more}).text.splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        assert len(events) == 2
        for event in events:
            assert ("warnings" in event) == warned
            assert not warned or "cut to 16 tokens" in event["warnings"][0]
