"""What a plan costs in time, what it says to a person, GPUs by name, sizes as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multimodal_gen.config import EngineConfig
from multimodal_gen.errors import ConfigError
from multimodal_gen.memory.describe import describe
from multimodal_gen.memory.estimate import Load, Rates, moved_per_step, step_cost
from multimodal_gen.memory.gpus import GPUS, find_gpu
from multimodal_gen.memory.measure import preflight, rates, reads
from multimodal_gen.memory.plan import Sizes, Wishes, plan
from multimodal_gen.pipelines import registry
from multimodal_gen.units import UNITS, at_least, parse_size, size
from multimodal_gen.weights.hub import ASSETS

pytestmark = [pytest.mark.unit]

GB, MB = 10**9, 10**6
# Wan2.2-T2V-A14B, as its headers have it.
LAYER = 702 * MB
WAN = (
    Sizes("text_encoder", "encode", 10 * MB, (385 * MB,) * 24, tables=2100 * MB),
    Sizes("transformer", "denoise", 400 * MB, (LAYER,) * 40),
    Sizes("transformer_2", "denoise", 400 * MB, (LAYER,) * 40),
    Sizes("vae", "decode", 254 * MB),
)
WORK = {"denoise": 3 * GB, "decode": 4 * GB}
VIDEO = Load(tokens=32_760, branches=2)  # 832 x 480, 81 frames, with guidance


def test_the_plan_in_words() -> None:
    made = plan(WAN, Wishes(), WORK, 24 * GB, "cuda", 40 * GB)
    assert describe(made, WAN, "cuda:0", 0.0612) == [
        "text_encoder   streamed, 5 of 24 layers resident, 385.0 MB per layer",
        "transformer    streamed, 10 of 40 layers resident, 702.0 MB per layer",
        "transformer_2  streamed, 10 of 40 layers resident, 702.0 MB per layer",
        "vae            resident, 254.0 MB",
        "ring           2 slots of 702.0 MB for layers on their way",
        "host           20.0 GB page-locked, 18.0 GB in RAM, 13.5 GB read from files",
        "peak 22.4 GB of 22.8 GB, est. +6 % per step",
    ]


def test_parts_that_are_not_needed_are_not_said() -> None:
    small = (Sizes("transformer", "denoise", 10 * MB), Sizes("vae", "decode", 254 * MB))
    assert describe(plan(small, Wishes(), {}, GB, "cpu"), small, "cpu") == [
        "transformer  resident, 10.0 MB",
        "vae          resident, 254.0 MB",
        "peak 264.0 MB of 950.0 MB",
    ]
    parked = plan(small, Wishes("component"), {}, GB, "cpu")
    assert describe(parked, small, "cpu")[1:3] == [
        "vae          parked, 254.0 MB while decoding",
        "host         264.0 MB read from files, of which the page cache may keep 746.0 MB",
    ]


def test_copies_that_hide_behind_compute_cost_nothing() -> None:
    made = plan(WAN, Wishes("layerwise", host_limit=80 * GB, pin=80 * GB), WORK, 24 * GB, "cuda", 100 * GB)
    assert moved_per_step(made, WAN) == 40 * LAYER  # one expert at a time
    cost = step_cost(made, WAN, VIDEO, Rates(100e12, 25e9, 12e9, 3e9), itemsize=2)
    assert cost is not None
    assert cost.transfer == pytest.approx(40 * LAYER / 25e9)
    # 28 GB of bf16 weights are 14.04 billion numbers, each multiplied and added once per token and branch; attention of
    # 32,760 tokens, 5,120 wide, in 40 layers is as much again.
    products, attention = 2 * 2 * 32_760 * 14.04e9, 2 * 4 * 32_760**2 * 5120 * 40
    assert cost.compute * 100e12 == pytest.approx(products + attention, rel=0.02)
    assert cost.slowdown == 0.0


def test_a_step_with_little_to_compute_waits_for_its_copies() -> None:
    made = plan(WAN, Wishes("layerwise"), {}, 24 * GB, "cuda", host_free=0)
    assert made.host_bytes == 0
    cost = step_cost(made, WAN, Load(tokens=256, branches=1), Rates(100e12, 25e9, 12e9, 3e9), itemsize=2)
    assert cost is not None
    assert cost.transfer == pytest.approx(40 * LAYER / 3e9)
    assert cost.slowdown == pytest.approx(cost.transfer / cost.compute - 1)
    assert cost.slowdown > 10


def test_tiers_share_a_step_by_their_bytes() -> None:
    one = (Sizes("transformer", "denoise", 0, (GB,) * 4),)
    made = plan(one, Wishes("layerwise", host_limit=3 * GB, pin=GB), {}, 10 * GB, "cuda", 100 * GB)
    cost = step_cost(made, one, Load(1000, 1), Rates(1e12, 10e9, 5e9, 1e9), itemsize=2)
    assert cost is not None
    assert cost.transfer == pytest.approx(1 / 10 + 2 / 5 + 1 / 1)


def test_layers_that_run_once_per_prompt_do_not_move_in_a_step() -> None:
    part = Sizes("transformer", "denoise", 0, (10,) * 6, once=2)
    made = plan([part], Wishes("layerwise"), {}, 1000, "cpu")
    assert moved_per_step(made, [part]) == 40
    assert step_cost(made, [Sizes("unet", "denoise", 10)], VIDEO, Rates(1, 1, 1, 1), 2) is None


def test_the_load_of_a_model_is_a_request_with_its_defaults() -> None:
    card = registry.describe(EngineConfig())
    assert Load.of(card) == Load(tokens=128 * 128 // card.pixels_per_token, branches=2)


@pytest.mark.parametrize(
    ("text", "name", "memory"),
    [
        ("rtx-4090", "rtx-4090", 24 * GB),
        ("RTX 4090", "rtx-4090", 24 * GB),
        ("rtx_4090", "rtx-4090", 24 * GB),
        ("24GB", "a GPU of 24GB", 24 * GB),
        ("1.5 GiB", "a GPU of 1.5 GiB", 3 << 29),
    ],
)
def test_gpus_have_names_or_sizes(text: str, name: str, memory: int) -> None:
    shown, row, found = find_gpu(text)
    assert (shown, found) == (name, memory)
    assert (row is None) == (name not in GPUS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtx-4099", "is not in the table. Did you mean 'rtx-4090'?"),
        ("", "is not in the table. Say how much memory it has, as in 24GB, or one of t4,"),
        ("24", "--gpu cannot be '24': say which unit: 24GB or 24MB."),
        ("24XB", "there is no unit XB"),
    ],
)
def test_unknown_gpus_are_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_gpu(text)
    assert expected in caught.value.message


def test_rows_of_the_table_are_plausible() -> None:
    for name, row in GPUS.items():
        assert find_gpu(name)[1] is row
        assert 8 * GB <= row.memory <= 300 * GB, name
        assert 10e12 <= row.flops <= 2500e12, name
        assert row.rates.file < row.rates.pageable < row.rates.pinned <= 64e9, name


def test_this_machine_is_measured_in_no_time(tmp_path: Path) -> None:
    files = sorted(ASSETS.rglob("*.safetensors"))
    found = rates(torch.device("cpu"), torch.float32, files)
    assert 1e8 < found.flops < 1e14
    assert 1e7 < found.pageable == found.pinned < 1e12
    assert 1e6 < found.file < 1e12
    assert reads([], 5.0) == 5.0
    small = tmp_path / "small"
    small.write_bytes(b"x")
    assert reads([small], 7.0) == 7.0


def test_the_preflight_measures_only_where_layers_stream() -> None:
    part = Sizes("transformer", "denoise", 0, (10,) * 6)
    cpu, files = torch.device("cpu"), sorted(ASSETS.rglob("*.safetensors"))
    lines, cost = preflight(plan([part], Wishes(), {}, 1000, "cpu"), [part], VIDEO, files, cpu, torch.float32)
    assert (lines[-1], cost) == ("peak 60 B of 950 B", None)
    streamed = plan([part], Wishes("layerwise"), {}, 1000, "cpu")
    lines, cost = preflight(streamed, [part], VIDEO, files, cpu, torch.float32)
    assert cost is not None
    assert lines[-1].startswith("peak 20 B of 950 B, est. +")
    assert preflight(streamed, [part], None, files, cpu, torch.float32)[1] is None


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("12GB", 12 * GB),
        ("12 gb", 12 * GB),
        (" 500 MB ", 500 * MB),
        ("1.5GiB", 3 << 29),
        ("0.1GB", 100 * MB),
        ("0", 0),
        ("7B", 7),
        ("9007199254740993B", 9007199254740993),  # more than a float can tell apart
        (12, 12),
    ],
)
def test_sizes_are_read(text: object, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "value", ["", "GB", "12", "-1GB", "1e9B", "12 G B", "1,5GB", "12GX", "inf", None, True, 1.5, -1]
)
def test_other_sizes_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"a size is|which unit|no unit"):
        parse_size(value)


def test_sizes_are_shown_and_suggested_so_that_they_suffice() -> None:
    assert [size(count) for count in (0, 999, 1500, 702 * MB, 11_240 * MB)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "702.0 MB",
        "11.2 GB",
    ]
    assert [at_least(count) for count in (1, 999, 1001, 11_240 * MB, 12 * GB)] == [
        "1B",
        "999B",
        "1.1kB",
        "11.3GB",
        "12GB",
    ]
    for count in (1, 12_345, 99_999_999, 10**12 + 1):
        assert count <= parse_size(at_least(count)) <= count * 1.1
    assert set(UNITS) == {"B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"}
