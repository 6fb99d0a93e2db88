"""`resolve`: every bound, every error code, and defaults taken from the model's card."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from multimodal_gen.errors import (
    InvalidN,
    InvalidSize,
    InvalidValue,
    PromptTooLong,
    RequestTooLarge,
    UnsupportedParameter,
    UserError,
)
from multimodal_gen.request import (
    MAX_GUIDANCE,
    MAX_N,
    MAX_PREVIEWS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_STEPS,
    Defaults,
    ImageRequest,
    ModelCard,
    SamplingParams,
    Timings,
)
from multimodal_gen.resolve import resolve

pytestmark = [pytest.mark.unit]

CARD = ModelCard(
    name="toy",
    family="toys",
    pipeline_class="ToyPipeline",
    task="text-to-image",
    path="/nowhere",
    defaults=Defaults(width=128, height=96, num_inference_steps=20, guidance_scale=3.0, max_sequence_length=512),
    parameters=frozenset(SamplingParams.__struct_fields__),
    size_multiple=16,
    min_side=32,
    max_side=512,
    pixels_per_token=256,
    max_sequence_length=256,
    guidance_threshold=0.0,
)
HUGE = 10**5000  # more digits than Python turns into text
DEFAULTS = SamplingParams()


def settle(prompt: Any = "a red apple", card: ModelCard = CARD, previews: Any = 0, **params: Any) -> ImageRequest:
    return resolve(
        request_id="id",
        prompt=prompt,
        params=SamplingParams(**params),
        card=card,
        max_cost=10**12,
        previews=previews,
    )


def refused(kind: type[UserError], **wish: Any) -> UserError:
    """The error of a wish, checked for what every error owes the user."""
    with pytest.raises(kind) as caught:
        settle(**wish)
    error = caught.value
    assert type(error) is kind
    assert error.status == 400
    assert error.type == "invalid_request_error"
    assert 20 < len(error.message) < 400
    assert error.message.isprintable()
    return error


def test_what_is_left_open_comes_from_the_card():
    request = settle()
    assert (request.width, request.height) == (128, 96)
    assert (request.num_inference_steps, request.guidance_scale) == (20, 3.0)
    assert request.max_sequence_length == 256  # the model's limit, below its default
    assert (request.cfg_normalization, request.cfg_truncation) == (0.0, 1.0)
    assert (request.model, request.negative_prompt, request.n, request.previews) == ("toy", None, 1, 0)
    assert request.output == "pixels"


def test_given_values_are_kept():
    given: dict[str, Any] = {
        "negative_prompt": "",
        "width": 64,
        "height": 512,
        "num_inference_steps": 3,
        "guidance_scale": 0.5,
        "cfg_normalization": 1.5,
        "cfg_truncation": None,
        "max_sequence_length": 9,
        "priority": -3,
        "deadline_s": 2.5,
    }
    request = settle(**given, previews=2)
    assert {name: value for name, value in msgspec.structs.asdict(request).items() if name in given} == given
    assert request.previews == 2


@pytest.mark.parametrize(
    ("name", "low", "high", "error"),
    [
        ("num_outputs_per_prompt", 1, MAX_N, InvalidN),
        ("width", 32, 512, InvalidSize),
        ("height", 32, 512, InvalidSize),
        ("num_inference_steps", 1, MAX_STEPS, InvalidValue),
        ("max_sequence_length", 1, 256, InvalidValue),
        ("priority", -100, 100, InvalidValue),
        ("previews", 0, MAX_PREVIEWS, InvalidValue),
        ("seed", 0, MAX_SEED, InvalidValue),
    ],
)
def test_whole_numbers_have_bounds(name, low, high, error):
    settle(**{name: low})
    settle(**{name: high})
    shown = {"num_outputs_per_prompt": "n", "previews": "partial_images"}.get(name, name)
    for wrong in (low - 1, high + 1, 10**9 if high < 10**9 else 2**64, -(2**63), HUGE, 1.5, float("nan"), True):
        assert refused(error, **{name: wrong}).param == shown
    if name != "seed":
        assert refused(error, **{name: "4"}).param == shown


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("guidance_scale", 0.0, MAX_GUIDANCE),
        ("cfg_normalization", 0.0, 100.0),
        ("cfg_truncation", 0.0, 1e6),
        ("deadline_s", 1e-3, 86_400.0),
    ],
)
def test_numbers_are_finite_and_have_bounds(name, low, high):
    settle(**{name: low})
    settle(**{name: high})
    settle(**{name: int(high)})
    for wrong in (low - 1, high * 1.01, float("nan"), float("inf"), -float("inf"), 1e308, HUGE, True, "4", [4.0]):
        assert refused(InvalidValue, **{name: wrong}).param == name


@pytest.mark.parametrize("name", ["width", "height"])
def test_sides_are_multiples_and_the_message_says_of_what(name):
    error = refused(InvalidSize, **{name: 100})
    assert error.param == name
    assert "multiple of 16" in error.message
    near = int(error.message.rstrip(".").split()[-1])
    settle(**{name: near})


@pytest.mark.parametrize("side", [33, 511])
def test_the_suggested_side_is_accepted_at_both_ends(side):
    near = int(refused(InvalidSize, width=side).message.rstrip(".").split()[-1])
    settle(width=near)


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_empty_prompts(prompt):
    assert refused(InvalidValue, prompt=prompt).param == "prompt"


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_text_has_a_length_and_is_unicode(name):
    settle(**{name: "x" * MAX_PROMPT_CHARS})
    settle(**{name: "a\0b\u202ec <|im_end|> 🍎"})
    error = refused(PromptTooLong, **{name: "x" * (MAX_PROMPT_CHARS + 1)})
    assert (error.param, error.code) == (name, "prompt_too_long")
    assert refused(InvalidValue, **{name: "a \ud83c b"}).param == name
    assert refused(InvalidValue, **{name: 7}).param == name


def test_image_i_uses_seed_plus_i():
    assert settle(seed=7, num_outputs_per_prompt=3).seeds == (7, 8, 9)
    top = settle(seed=MAX_SEED - MAX_N + 1, num_outputs_per_prompt=MAX_N)
    assert max(top.seeds) == MAX_SEED
    assert refused(InvalidValue, seed=MAX_SEED - MAX_N + 2, num_outputs_per_prompt=MAX_N).param == "seed"


def test_what_only_guidance_reads_is_refused_without_guidance():
    for given in ({"negative_prompt": "blur"}, {"cfg_normalization": 1.0}, {"cfg_truncation": 0.5}):
        assert refused(InvalidValue, guidance_scale=0.0, **given).param == next(iter(given))
    settle(guidance_scale=0.0, negative_prompt="")


def test_previews_need_steps_between():
    assert settle(num_inference_steps=4, previews=3).previews == 3
    assert refused(InvalidValue, num_inference_steps=3, previews=3).param == "partial_images"


def test_a_long_prompt_costs_more():
    short, long = settle(), settle(prompt="a red apple " * 100)
    assert long.row_tokens > short.row_tokens


def test_a_list_gives_one_seed_for_each_image():
    assert settle(seed=[5, 5, MAX_SEED], num_outputs_per_prompt=3).seeds == (5, 5, MAX_SEED)
    assert settle(seed=(4,)).seeds == (4,)
    for wrong in ([], [1], [1, 2, 3], [1] * 1_000_000):
        assert refused(InvalidValue, seed=wrong, num_outputs_per_prompt=2).param == "seed"
    for element in (-1, MAX_SEED + 1, True, 1.0, "1", HUGE, [1]):
        assert refused(InvalidValue, seed=[element]).param == "seed"
    for wrong in ("12", b"12", {"a": 1}, 2.0, "x" * 10_000):
        assert refused(InvalidValue, seed=wrong).param == "seed"


def test_no_seed_draws_another_each_time():
    drawn = {settle().seeds[0] for _ in range(20)}
    assert len(drawn) > 15
    assert all(0 <= seed <= MAX_SEED for seed in drawn)


def test_fields_that_the_model_does_not_use_are_refused_by_name():
    plain = msgspec.structs.replace(
        CARD, parameters=frozenset({"seed", "num_outputs_per_prompt", "width"}), previews=False, guidance_threshold=1.0
    )
    settle(card=plain, width=64, seed=4)
    for name, value in (("negative_prompt", "x"), ("guidance_scale", 2.0), ("cfg_truncation", None)):
        error = refused(UnsupportedParameter, card=plain, **{name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")
    assert refused(UnsupportedParameter, card=plain, previews=1).param == "partial_images"


@pytest.mark.parametrize(
    ("guidance", "threshold", "branches"), [(0.0, 0.0, 1), (0.1, 0.0, 2), (1.0, 1.0, 1), (1.1, 1.0, 2)]
)
def test_cost_counts_tokens_branches_steps_and_images(guidance, threshold, branches):
    card = msgspec.structs.replace(CARD, guidance_threshold=threshold)
    request = settle(
        card=card,
        width=64,
        height=128,
        guidance_scale=guidance,
        num_inference_steps=7,
        num_outputs_per_prompt=3,
        seed=0,
    )
    assert request.row_tokens == branches * (4 * 8 + 32)
    assert request.cost == request.row_tokens * 7 * 3


def test_the_product_is_bounded_even_where_each_factor_is_legal():
    wish = SamplingParams(num_inference_steps=MAX_STEPS, num_outputs_per_prompt=MAX_N, width=512, height=512)
    needed = resolve(request_id="id", prompt="x", params=wish, card=CARD, max_cost=10**12).cost
    resolve(request_id="id", prompt="x", params=wish, card=CARD, max_cost=needed)
    with pytest.raises(RequestTooLarge, match=f"{needed:,} token-steps") as caught:
        resolve(request_id="id", prompt="x", params=wish, card=CARD, max_cost=needed - 1)
    assert caught.value.code == "request_too_large"
    assert caught.value.status == 400


def test_codes_are_those_of_the_api():
    codes = {
        InvalidN: "invalid_n",
        InvalidSize: "invalid_size",
        InvalidValue: "invalid_value",
        PromptTooLong: "prompt_too_long",
        RequestTooLarge: "request_too_large",
        UnsupportedParameter: "unsupported_parameter",
    }
    assert {kind: kind.code for kind in codes} == codes


def test_requests_and_parameters_cannot_be_changed_or_misspelt():
    with pytest.raises(AttributeError):
        settle().width = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="widht"):
        SamplingParams(widht=5)  # type: ignore[call-arg]


def test_requests_survive_the_wire():
    request = settle(seed=[3, 2**62], num_outputs_per_prompt=2, cfg_truncation=None, guidance_scale=0.1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ImageRequest) == request


def test_time_per_step():
    assert Timings(denoise=3.0, steps=4).per_step == 0.75
    assert Timings().per_step == 0.0
