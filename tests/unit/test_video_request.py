"""`resolve` for models of videos: lengths, pictures, experts, and what a request costs."""

from __future__ import annotations

from typing import Any

import pytest

from multimodal_gen.errors import InvalidSize, InvalidValue, RequestTooLarge, UnsupportedParameter, UserError
from multimodal_gen.request import (
    OF_IMAGES,
    Defaults,
    ModelCard,
    SamplingParams,
    VideoLimits,
    VideoRequest,
)
from multimodal_gen.resolve import nearest_frames, resolve

pytestmark = [pytest.mark.unit]

PNG = b"\x89PNG"


def card(image: Any = "none", *, experts: int = 1) -> ModelCard:
    unused = OF_IMAGES if experts == 2 else OF_IMAGES | {"guidance_scale_2"}
    return ModelCard(
        name="clip",
        family="clips",
        pipeline_class="ClipPipeline",
        task="text-to-video",
        path="/nowhere",
        defaults=Defaults(width=832, height=480, num_frames=81, fps=24, num_inference_steps=50, guidance_scale=5.0),
        parameters=frozenset(SamplingParams.__struct_fields__) - unused,
        size_multiple=16,
        min_side=32,
        max_side=2048,
        pixels_per_token=256,
        max_sequence_length=512,
        guidance_threshold=1.0,
        previews=False,
        video=VideoLimits(frames_per_latent=4, max_frames=257, image=image),
    )


def settle(model: ModelCard | None = None, *, max_cost: int = 10**12, previews: int = 0, **params: Any) -> VideoRequest:
    made = resolve(
        request_id="id",
        prompt="a red apple",
        params=SamplingParams(**params),
        card=model or card(),
        max_cost=max_cost,
        previews=previews,
    )
    assert isinstance(made, VideoRequest)
    return made


def refused(kind: type[UserError], param: str | None, message: str, **wish: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        settle(**wish)
    assert type(caught.value) is kind
    assert caught.value.param == param


def test_what_is_left_open_comes_from_the_card():
    made = settle(seed=3)
    assert (made.width, made.height, made.num_frames, made.fps) == (832, 480, 81, 24)
    assert (made.guidance_scale, made.guidance_scale_2, made.flow_shift, made.image) == (5.0, None, None, None)
    assert made.row_tokens == 2 * 21 * 52 * 30
    assert made.cost == made.row_tokens * 50
    assert settle(guidance_scale=1.0).row_tokens == made.row_tokens // 2


def test_a_second_expert_is_guided_as_the_first_unless_said():
    two = card(experts=2)
    assert settle(two).guidance_scale_2 == 5.0
    assert settle(two, guidance_scale=3.0).guidance_scale_2 == 3.0
    assert settle(two, guidance_scale_2=1.5).guidance_scale_2 == 1.5


@pytest.mark.parametrize(
    ("frames", "near"), [(2, 1), (3, 5), (4, 5), (80, 81), (82, 81), (83, 85), (256, 257), (0, None), (258, None)]
)
def test_other_lengths_are_refused_with_the_nearest_one(frames: int, near: int | None):
    if near is None:
        refused(InvalidValue, "num_frames", "between 1 and 257", num_frames=frames)
    else:
        refused(InvalidValue, "num_frames", rf"4k \+ 1 .* got {frames}; try {near}\.", num_frames=frames)
        assert settle(num_frames=near).num_frames == near


def test_seconds_become_the_nearest_length():
    limits = card().video
    assert limits is not None
    assert [nearest_frames(x, limits) for x in (0, 0.4, 1, 2.9, 3, 64, 65, 66.9, 67, 96)] == [
        1, 1, 1, 1, 5, 65, 65, 65, 69, 97,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_frames", 2**63, "between"),
        ("num_frames", 5.0, "whole number"),
        ("num_frames", True, "whole number"),
        ("fps", 0, "between 1 and 120"),
        ("fps", 1e9, "whole number"),
        ("flow_shift", 0.0, "between"),
        ("flow_shift", float("nan"), "between"),
        ("guidance_scale", 1e308, "between"),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: Any, message: str):
    refused(InvalidValue, name, message, **{name: value})


def test_pictures_where_they_belong():
    refused(InvalidValue, "image", "from text alone", image=PNG)
    refused(InvalidValue, "image", "give one", model=card("required"))
    assert settle(card("required"), image=PNG).image == PNG
    assert settle(card("optional"), image=PNG).image == PNG
    assert settle(card("optional")).image is None


def test_what_the_model_does_not_read_is_refused():
    refused(UnsupportedParameter, "guidance_scale_2", "does not use 'guidance_scale_2'", guidance_scale_2=3.0)
    refused(UnsupportedParameter, "cfg_normalization", "does not use", cfg_normalization=1.0)
    refused(UnsupportedParameter, "partial_images", "partial", previews=1)
    unguided = {"model": card(experts=2), "guidance_scale": 1.0}
    refused(InvalidValue, "guidance_scale_2", "no effect at guidance_scale 1", guidance_scale_2=3.0, **unguided)
    refused(InvalidValue, "negative_prompt", "no effect at guidance_scale 1", negative_prompt="x", **unguided)
    refused(InvalidSize, "width", "multiple of 16 pixels, got 100; try 96", width=100)


def test_products_are_bounded_before_anything_is_allocated():
    refused(RequestTooLarge, None, r"1 video\(s\) x 65,520 tokens x 50 steps", max_cost=3_000_000)
    big = {"width": 2048, "height": 2048, "num_frames": 257}
    refused(RequestTooLarge, None, "bytes of pixels", **big)
