"""Which component is where: tables of cases, properties over random models, and messages that name the way out."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.plan import MemoryPlan, Share, Sizes, Wishes, plan, plan_usual
from multimodal_gen.memory.search import Search
from multimodal_gen.offload import Prefetch
from multimodal_gen.settings import load
from multimodal_gen.units import parse_size

pytestmark = [pytest.mark.unit]

ENCODER = Sizes("text_encoder", "encode", 20, (10,) * 6)
TRANSFORMER = Sizes("transformer", "denoise", 5, (10,) * 8)
VAE = Sizes("vae", "decode", 15)
MODEL = (ENCODER, TRANSFORMER, VAE)  # 180 in all
EXPERTS = (ENCODER, TRANSFORMER, Sizes("transformer_2", "denoise", 5, (10,) * 8), VAE)
WORK = {"encode": 5, "denoise": 10, "decode": 30}


def planned(wishes: Wishes, free: int, sizes: Sequence[Sizes] = MODEL, device: str = "cuda", **more: Any) -> MemoryPlan:
    return plan(sizes, wishes, WORK, free, device, **more)


def limited(limit: int, **more: Any) -> Wishes:
    return Wishes(device_limit=limit, **more)


def summary(made: MemoryPlan) -> dict[str, str]:
    """`streamed 3`: streamed, three layers resident."""
    return {
        name: f"{share.residency} {len(share.resident_layers)}" if share.residency == "streamed" else share.residency
        for name, share in made.shares.items()
    }


def peak(made: MemoryPlan, sizes: Sequence[Sizes], working: Mapping[str, int]) -> int:
    """What the plan needs, worked out once more from the contract."""
    always, ring = 0, 0
    for part in sizes:
        share = made.shares[part.name]
        if share.residency == "resident":
            always += part.rest + part.tables + sum(part.layers)
        elif share.residency == "streamed":
            always += part.rest
            for index, layer in enumerate(part.layers):
                if index in share.resident_layers:
                    always += layer
                else:
                    ring = max(ring, layer)
    worst = 0
    for stage in {part.stage for part in sizes} | set(working):
        guests = [
            p.rest + p.tables + sum(p.layers)
            for p in sizes
            if p.stage == stage and made.shares[p.name].residency == "parked"
        ]
        worst = max(worst, max(guests, default=0) + working.get(stage, 0))
    return always + made.slots * ring + worst


@pytest.mark.parametrize(
    ("limit", "cuda", "cpu"),
    [
        # All of it and the work of decoding: 180 + 30.
        (210, ("resident", "resident", "resident"), ("resident", "resident", "resident")),
        # Decoding is the worst stage, so the encoder leaves; the VAE would be there all the same.
        (209, ("parked", "resident", "resident"), ("streamed 3", "resident", "resident")),
        # Now encoding and decoding are equally bad with both away; or 20 of the encoder and two slots stay.
        (170, ("parked", "resident", "parked"), ("streamed 0", "resident", "resident")),
        # Seven of eight layers would stay, but a single one that streams has to wait for itself.
        (169, ("streamed 1", "streamed 6", "resident"), ("streamed 1", "streamed 6", "resident")),
        (90, ("streamed 0", "streamed 0", "resident"), ("streamed 0", "streamed 0", "resident")),
    ],
)
def test_auto_gives_up_what_costs_least(limit: int, cuda: tuple[str, ...], cpu: tuple[str, ...]) -> None:
    for device, expected in (("cuda:1", cuda), ("cpu", cpu)):
        made = planned(limited(limit), 10_000, device=device)
        assert tuple(summary(made).values()) == expected
        assert made.peak_bytes == peak(made, MODEL, WORK) <= limit == made.limit_bytes


def test_on_a_gpu_an_encoder_is_parked_rather_than_streamed_where_both_fit_and_on_a_cpu_the_other_way_round() -> None:
    """Decoding is the worst stage here, so the encoder has room in its own."""
    work = {"encode": 0, "denoise": 10, "decode": 100}
    sizes = (ENCODER, TRANSFORMER, Sizes("vae", "decode", 15))
    assert summary(plan(sizes, limited(245), work, 10_000, "cuda"))["text_encoder"] == "parked"
    assert summary(plan(sizes, limited(245), work, 10_000, "cpu"))["text_encoder"].startswith("streamed")


def test_what_is_free_is_the_limit_where_none_is_set_and_a_little_of_it_is_left() -> None:
    assert planned(Wishes(), 1000).limit_bytes == 950
    assert planned(limited(800), 1000).limit_bytes == 800
    assert planned(limited(2000), 1000).limit_bytes == 1000


def test_two_experts_keep_as_much_of_each() -> None:
    for limit in range(110, 260):
        made = planned(limited(limit), 10_000, EXPERTS)
        first, second = made.shares["transformer"], made.shares["transformer_2"]
        assert first.residency == second.residency
        assert first.resident_layers == second.resident_layers


def test_layerwise_streams_all_layers_unless_more_is_asked_for_or_a_limit_leaves_room() -> None:
    assert summary(planned(Wishes("layerwise"), 10_000)) == {
        "text_encoder": "streamed 0",
        "transformer": "streamed 0",
        "vae": "resident",
    }
    assert summary(planned(Wishes("layerwise", resident_layers=4), 10_000))["transformer"] == "streamed 4"
    assert summary(planned(limited(110, offload="layerwise"), 10_000))["transformer"] == "streamed 2"
    everything = planned(Wishes("layerwise", resident_layers=99), 10_000)
    assert summary(everything)["transformer"] == "resident"


def test_component_parks_everything() -> None:
    made = planned(Wishes("component"), 10_000, EXPERTS)
    assert set(summary(made).values()) == {"parked"}
    assert (made.slots, made.slot_bytes, made.peak_bytes) == (0, 0, 95)  # a transformer and its work


def test_none_keeps_all_and_counts_only_the_weights() -> None:
    made = planned(limited(180, offload="none"), 10_000)
    assert set(summary(made).values()) == {"resident"}
    assert made.peak_bytes == 210  # with the work: what a request may still fail on


@pytest.mark.parametrize(
    ("items", "offload", "expected"),
    [
        (["text_encoder=parked"], "none", ("parked", "resident", "resident")),
        (["transformer=resident"], "layerwise", ("streamed 0", "resident", "resident")),
        (["transformer=parked", "vae=parked"], "layerwise", ("streamed 0", "parked", "parked")),
        (["transformer=streamed"], "auto", ("resident", "streamed 0", "resident")),
        # A name alone: only these leave the device, the way that --offload says.
        (["transformer"], "layerwise", ("resident", "streamed 0", "resident")),
        (["text_encoder", "vae"], "component", ("parked", "resident", "parked")),
        (["text_encoder", "vae=parked"], "layerwise", ("streamed 0", "resident", "parked")),
    ],
)
def test_components_have_their_own_way(items: list[str], offload: Any, expected: tuple[str, ...]) -> None:
    config = load(EngineConfig, {"offload": offload, "offload_components": items}, environ={})
    assert tuple(summary(planned(Wishes.of(config), 10_000)).values()) == expected


def test_a_name_alone_keeps_auto_from_moving_the_others() -> None:
    made = planned(limited(150, components={"transformer": None}), 10_000)
    assert summary(made) == {"text_encoder": "resident", "transformer": "streamed 0", "vae": "resident"}


@pytest.mark.parametrize(
    ("prefetch", "slots"),
    [("0", 1), ("1", 2), ("3", 4), ("100", 8), ("10B", 2), ("39B", 4), ("0B", 1), ("1GB", 8)],
)
def test_prefetch_is_counted_in_layers_or_bytes_and_ends_with_the_model(prefetch: str, slots: int) -> None:
    config = load(EngineConfig, {"offload": "layerwise", "prefetch_layers": prefetch}, environ={})
    assert planned(Wishes.of(config), 10_000).slots == slots


def test_the_ring_has_slots_for_the_largest_layer_that_streams() -> None:
    sizes = (
        Sizes("text_encoder", "encode", 1, (30, 2)),
        Sizes("transformer", "denoise", 1, (5, 9, 9, 5)),
        Sizes("transformer_2", "denoise", 1, (7, 7, 7)),
    )
    made = plan(sizes, Wishes("layerwise", {"text_encoder": "resident"}), {}, 1000, "cuda")
    assert (made.slots, made.slot_bytes) == (2, 9)
    assert plan(sizes, Wishes("layerwise"), {}, 1000, "cuda").slot_bytes == 30


@pytest.mark.parametrize(("layers", "prefetch", "resident"), [(5, 1, 1), (6, 1, 0), (7, 2, 1), (8, 2, 0), (5, 0, 0)])
def test_one_layer_more_stays_where_the_last_would_have_the_slot_of_the_first(
    layers: int, prefetch: int, resident: int
) -> None:
    sizes = (Sizes("transformer", "denoise", 0, (10,) * layers),)
    wishes = Wishes("layerwise", prefetch=Prefetch(prefetch))
    share = plan(sizes, wishes, {}, 1000, "cuda").shares["transformer"]
    assert len(share.resident_layers) == resident
    tight = Wishes("layerwise", prefetch=Prefetch(prefetch), resident_layers=0, device_limit=10 * (prefetch + 1))
    assert plan(sizes, tight, {}, 1000, "cuda").shares["transformer"].resident_layers == ()


def test_layers_that_run_once_per_prompt_stay_last_and_do_not_count_for_the_slots_of_a_step() -> None:
    """Two layers for captions, then four for a step."""
    part = Sizes("transformer", "denoise", 0, (10,) * 6, once=2)
    assert plan([part], Wishes("layerwise"), {}, 1000, "cuda").shares["transformer"].resident_layers == ()
    kept = {limit: plan([part], limited(limit), {}, 1000, "cuda").shares["transformer"] for limit in range(20, 61, 10)}
    assert {limit: share.resident_layers for limit, share in kept.items()} == {
        20: (),
        30: (),  # one of four: the third would have the slot of the first
        40: (2, 4),
        50: (2, 4),
        60: (),
    }
    assert kept[60].residency == "resident"
    odd = Sizes("transformer", "denoise", 0, (10,) * 5, once=2)
    assert plan([odd], Wishes("layerwise"), {}, 1000, "cuda").shares["transformer"].resident_layers == (2,)


def test_host_tiers_of_a_gpu() -> None:
    """80 of the transformer and 60 of the encoder are away from the device."""
    layerwise = Wishes("layerwise")
    for free, host, pinned in ((1000, 140, 140), (200, 140, 100), (100, 95, 50), (0, 0, 0)):
        made = planned(layerwise, 10_000, host_free=free)
        assert (made.host_bytes, made.pinned_bytes) == (host, pinned)
    made = planned(Wishes("layerwise", host_limit=50, pin=20), 10_000, host_free=1000)
    assert (made.host_bytes, made.pinned_bytes) == (50, 20)
    assert planned(Wishes("layerwise", pin=0), 10_000, host_free=1000).pinned_bytes == 0
    assert planned(Wishes("none"), 10_000, host_free=1000).host_bytes == 0


def test_host_tier_of_a_cpu_is_what_the_files_may_take_of_the_page_cache() -> None:
    assert planned(limited(300), 1000, device="cpu").host_bytes == 700
    assert planned(Wishes(), 1000, device="cpu").host_bytes == 1000 - 210
    made = planned(Wishes(host_limit=50), 1000, device="cpu")
    assert (made.host_bytes, made.pinned_bytes) == (50, 0)


@pytest.mark.parametrize(
    ("wishes", "free", "param", "expected"),
    [
        (
            limited(100, offload="none"),
            10_000,
            "offload",
            "with --offload none it needs 180 B for its weights alone, and --device-memory-limit allows 100 B. "
            "--offload auto would fit, with 100 B.",
        ),
        (Wishes("none"), 100, "offload", "and 95 B are available. --offload auto would fit, with 90 B."),
        (Wishes("component"), 92, "offload", "it needs 95 B at the least, and 88 B are available. "),
        (
            limited(120, offload="layerwise", resident_layers=7),
            10_000,
            "resident_layers",
            "--resident-layers 7 it needs 160 B at the least, of which 2 x 10 B for streamed layers, and "
            "--device-memory-limit allows 120 B. --resident-layers 3 is the most that fits, with 120 B.",
        ),
        (
            limited(100, components={"text_encoder": "resident"}),
            10_000,
            "offload_components",
            "--offload-components text_encoder=resident it needs 150 B at the least, of which 2 x 10 B for streamed "
            "layers, and --device-memory-limit allows 100 B. Without --offload-components it would fit, with 100 B.",
        ),
        (
            limited(100, prefetch=Prefetch(4)),
            10_000,
            "device_memory_limit",
            "it needs 120 B at the least, of which 5 x 10 B for streamed layers, and --device-memory-limit allows "
            "100 B. --prefetch-layers 2 would fit, with 100 B.",
        ),
        (
            limited(50),
            10_000,
            "device_memory_limit",
            "needs 90 B at the least, of which 2 x 10 B for streamed layers, and --device-memory-limit allows 50 B. "
            "--device-memory-limit 90B would make it fit.",
        ),
        (Wishes(), 50, "device_memory_limit", "and 48 B are available. Free 42B more, or choose a smaller model"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers_and_the_flag(
    wishes: Wishes, free: int, param: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(wishes, free)
    assert expected in caught.value.message
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("wishes", "device", "param", "expected"),
    [
        (Wishes(components={"transfomer": "streamed"}), "cpu", "offload_components", "Did you mean 'transformer'?"),
        (Wishes(components={"vae": "streamed"}), "cpu", "offload_components", "Say vae=parked."),
        (Wishes("none", {"vae": None}), "cpu", "offload_components", "say how, as in vae=parked"),
        (Wishes("none", resident_layers=3), "cpu", "resident_layers", "--offload none streams none"),
        (Wishes(pin=5), "cpu", "pin_memory", "no effect on a CPU"),
        (Wishes(pin=5, host_limit=4), "cuda", "pin_memory", "asks for 5 B of the 4 B that --host-memory-limit"),
        (
            Wishes("layerwise", prefetch=Prefetch(9, "bytes")),
            "cuda",
            "prefetch_layers",
            "--prefetch-layers 9B is less than one layer, and the largest that would be streamed has 10 B: say 10B, or",
        ),
    ],
)
def test_wishes_that_make_no_sense_for_this_model_are_refused(
    wishes: Wishes, device: str, param: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(wishes, 10_000, device=device)
    assert expected in caught.value.message
    assert caught.value.param == param


def test_a_prefetch_too_small_for_a_layer_is_no_error_where_nothing_streams() -> None:
    made = planned(Wishes(prefetch=Prefetch(9, "bytes")), 10_000)
    assert made.slots == 0
    parked = planned(limited(150, prefetch=Prefetch(9, "bytes"), components={"transformer": "parked"}), 10_000)
    assert "streamed" not in {share.residency for share in parked.shares.values()}


def test_resident_layers_need_a_transformer_with_layers() -> None:
    with pytest.raises(ConfigError, match="this model's cannot be streamed"):
        plan([Sizes("unet", "denoise", 100), ENCODER], Wishes(resident_layers=2), {}, 1000, "cuda")


def test_the_plan_is_for_the_default_size_or_for_the_smallest_with_a_warning() -> None:
    usual, least = {"denoise": 100}, {"denoise": 10}
    made, warning = plan_usual(MODEL, limited(280), usual, least, 10_000, "cuda")
    assert (made.peak_bytes, warning) == (280, None)
    # All that the weights can leave is for requests, though layers would fit beside the smallest one.
    made, warning = plan_usual(MODEL, limited(100), usual, least, 10_000, "cuda")
    assert summary(made) == {"text_encoder": "streamed 0", "transformer": "streamed 0", "vae": "parked"}
    assert (made.peak_bytes, made.limit_bytes) == (60, 100)
    assert warning is not None
    assert "default size needs 125 B at the least, and 100 B are available" in warning
    assert "Weights take 60 B of them" in warning
    with pytest.raises(ConfigError, match="needs 60 B at the least"):
        plan_usual(MODEL, limited(50), usual, least, 10_000, "cuda")


# --- properties over random models ------------------------------------------------------------------------------------


def random_model(rng: random.Random) -> list[Sizes]:
    def layers(most: int) -> tuple[int, ...]:
        usual = rng.randint(1, 60)
        return tuple(usual if rng.random() < 0.8 else rng.randint(1, 60) for _ in range(rng.randint(1, most)))

    front = layers(3) if rng.random() < 0.3 else ()
    parts = [Sizes("transformer", "denoise", rng.randint(0, 40), front + layers(12), once=len(front))]
    if rng.random() < 0.4:
        parts.append(Sizes("transformer_2", "denoise", rng.randint(0, 40), layers(12)))
    if rng.random() < 0.8:
        parts.insert(0, Sizes("text_encoder", "encode", rng.randint(0, 50), layers(8), tables=rng.randint(0, 150)))
    if rng.random() < 0.3:
        parts.insert(0, Sizes("image_encoder", "encode", rng.randint(0, 100), layers(4) if rng.random() < 0.5 else ()))
    parts.append(Sizes("vae", "decode", rng.randint(1, 60)))
    return parts


def random_wishes(rng: random.Random, sizes: Sequence[Sizes]) -> Wishes:
    asked: dict[str, Any] = {}
    for part in sizes:
        if rng.random() < 0.2:
            asked[part.name] = rng.choice(["resident", "parked", "streamed"] if part.layers else ["resident", "parked"])
    return Wishes(
        rng.choice(["auto", "auto", "auto", "none", "layerwise", "component"]),
        asked,
        Prefetch(rng.randint(0, 4)) if rng.random() < 0.8 else Prefetch(rng.randint(60, 200), "bytes"),
        rng.randint(0, 6) if rng.random() < 0.2 else None,
        rng.randint(1, 2000) if rng.random() < 0.7 else None,
    )


def random_cases(count: int, seed: int) -> Any:
    rng = random.Random(seed)
    for _ in range(count):
        sizes = random_model(rng)
        work = {stage: rng.randint(0, 50) for stage in ("encode", "denoise", "decode")}
        yield rng, sizes, random_wishes(rng, sizes), work, rng.randint(1, 2500), rng.choice(["cpu", "cuda"])


def test_a_plan_never_needs_more_than_the_limit_and_residents_are_spread_evenly() -> None:
    made_at_all = 0
    for _, sizes, wishes, work, free, device in random_cases(800, seed=1):
        try:
            made = plan(sizes, wishes, work, free, device)
        except ConfigError:
            continue
        made_at_all += 1
        assert made.peak_bytes == peak(made, sizes, work)
        if wishes.offload != "none":
            assert made.limit_bytes is not None
            assert made.peak_bytes <= made.limit_bytes <= free
        for part in sizes:
            share = made.shares[part.name]
            if share.residency != "streamed":
                assert share.resident_layers == ()
                continue
            stay = sorted(set(share.resident_layers))
            assert stay == list(share.resident_layers)
            assert len(stay) < len(part.layers)
            late = [index for index in stay if index >= part.once]
            steps = len(part.layers) - part.once
            gaps = [b - a for a, b in itertools.pairwise([*late, late[0] + steps])] if late else [1]
            assert len(late) == min(len(stay), steps)
            assert max(gaps) - min(gaps) <= 1
            assert made.slots <= max(len(p.layers) for p in sizes)
            assert max(made.shares[part.name].streamed(part)) <= made.slot_bytes
    assert made_at_all > 300


def test_auto_refuses_nothing_that_could_fit() -> None:
    """Every combination of residencies, worked out on its own."""
    refused = 0
    for rng, sizes, _, work, free, device in random_cases(400, seed=2):
        wishes = Wishes(prefetch=Prefetch(rng.randint(0, 3)))
        least = min(peak(made, sizes, work) for made in everything(sizes, wishes.prefetch.count))
        limit = free - free // 20
        if least <= limit:
            plan(sizes, wishes, work, free, device)
        else:
            refused += 1
            with pytest.raises(ConfigError):
                plan(sizes, wishes, work, min(least - 1, free), device)
    assert refused > 20


def everything(sizes: Sequence[Sizes], prefetch: int) -> Any:
    """Plans with transformers resident or streamed, and the others in all three ways."""
    kinds = [["resident", "streamed"] if p.stage == "denoise" else ["resident", "parked", "streamed"] for p in sizes]
    for chosen in itertools.product(*kinds):
        pairs = list(zip(sizes, chosen, strict=True))
        if any(kind == "streamed" and not part.layers for part, kind in pairs):
            continue
        if len({kind for part, kind in pairs if part.stage == "denoise"}) > 1:
            continue
        streamed = [part for part, kind in pairs if kind == "streamed"]
        slots = min(1 + prefetch, max((len(part.layers) for part in streamed), default=0))
        yield MemoryPlan({p.name: Share(kind) for p, kind in pairs}, slots, 0, 0, None, 0, 0)


def test_more_memory_never_makes_it_worse() -> None:
    for _, sizes, _, work, _, device in random_cases(25, seed=3):
        search = Search(sizes, Wishes(), work, device)
        costs = [way.cost for limit in range(50, 2500, 50) if (way := search.cheapest(limit))]
        assert costs == sorted(costs, reverse=True)
        assert not costs or costs[-1] == 0  # all of it fits in the end


def test_the_flag_that_is_named_makes_it_fit() -> None:
    """Every suggestion is followed as a user would."""
    followed = set()
    for _, sizes, wishes, work, free, device in random_cases(1000, seed=4):
        try:
            plan(sizes, wishes, work, free, device)
        except ConfigError as error:
            found = re.search(r"\. (--[a-z-]+) (\S+) (?:would|is the most)", error.message)
            if found is None:
                continue
            flag, value = found.groups()
            changed = follow(wishes, flag, value)
            plan(sizes, changed, work, free, device)
            followed.add(flag)
    assert followed == {"--offload", "--resident-layers", "--prefetch-layers", "--device-memory-limit"}


def follow(wishes: Wishes, flag: str, value: str) -> Wishes:
    if flag == "--offload":
        return replace(wishes, offload=value, resident_layers=None)
    if flag == "--resident-layers":
        return replace(wishes, resident_layers=int(value))
    if flag == "--prefetch-layers":
        return replace(wishes, prefetch=Prefetch(int(value)))
    return replace(wishes, device_limit=parse_size(value))
