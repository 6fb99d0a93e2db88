"""Rooflines count what the models compute: at full size, on torch's meta device, which has shapes and no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from multimodal_gen.attention.naive import NaiveAttention
from multimodal_gen.cli import roofline, roofline_measured
from multimodal_gen.cli.main import main
from multimodal_gen.kernels.costs import OPS, Call
from multimodal_gen.pipelines.wan import packing as wan_packing
from multimodal_gen.pipelines.wan import work as wan_work
from multimodal_gen.pipelines.wan.config import WanConfig
from multimodal_gen.pipelines.wan.model import WanTransformer
from multimodal_gen.pipelines.workloads import WORKLOADS, Workload
from multimodal_gen.pipelines.zimage import packing as zimage_packing
from multimodal_gen.pipelines.zimage import work as zimage_work
from multimodal_gen.pipelines.zimage.model import ZImageConfig, ZImageTransformer

pytestmark = [pytest.mark.unit]

META = torch.device("meta")


def flops_of(calls: Sequence[Call]) -> int:
    return sum(call.times * call.cost().flops for call in calls)


def counted(forward: Callable[[], object]) -> int:
    """What torch's own counter sees."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        forward()
    return counter.get_total_flops()


def test_a_step_of_z_image_costs_what_the_model_computes() -> None:
    branches, sizes, width, height, caption = 2, zimage_work.SIX_BILLION, 1024, 768, 64
    config = ZImageConfig(
        16, sizes.dim, sizes.layers, sizes.refiners, sizes.heads, 1e-5, 2560, 256.0, 1000.0, (32, 48, 48), 2
    )
    with META:
        model = ZImageTransformer(config, NaiveAttention())
        captions = [torch.empty(caption, sizes.dim) for _ in range(branches)]
        patches = torch.empty(width // 16 * height // 16, config.patch_dim)
        with torch.inference_mode():
            time = model.modulate(torch.empty(1), None)
    rope = zimage_packing.Rope(config.axes_dims, config.rope_theta)
    shape = zimage_packing.Shape(height // 16, width // 16, (caption,) * branches)
    layout = zimage_packing.make_layout([shape], rope, META)
    found = counted(lambda: model([patches], [time], captions, layout, [None]))
    assert found == flops_of(zimage_work.step(sizes, width, height, caption, branches))
    assert 6.0e9 < sum(p.numel() for p in model.parameters()) < 6.3e9


def test_a_step_of_wan_costs_what_the_model_computes() -> None:
    layers = wan_work.FOURTEEN_BILLION.layers // 10
    sizes = replace(wan_work.FOURTEEN_BILLION, layers=layers)
    width, height, frames, text = 832, 480, 17, 512
    config = WanConfig((1, 2, 2), sizes.heads, 128, 16, 16, 4096, 256, sizes.hidden, sizes.layers, 1e-6, None)
    with META:
        model = WanTransformer(config, NaiveAttention())
        with torch.inference_mode():
            time = model.modulate(torch.empty(1), None)
            contexts = [model.read(torch.empty(40, 4096), text - 40, None, None, keep=True) for _ in range(2)]
    shape = wan_packing.Shape(5, height // 16, width // 16)
    layout = wan_packing.make_layout([(shape, 0, 0), (shape, 0, 1)], wan_packing.Rope(config), META)
    patches = [torch.empty(shape.tokens, sizes.patch_in, device=META)] * 2

    def forward() -> object:
        return model(patches, [time, time], contexts, layout, [None, None])

    counted(forward)  # keys of the text are made in the first step
    assert counted(forward) == flops_of(wan_work.step(sizes, width, height, frames, text))
    assert 13.9e9 < 10 * sum(p.numel() for p in model.blocks.parameters()) < 14.5e9


def test_a_step_is_as_long_as_its_longer_side() -> None:
    device = roofline.Device("x", 1e12, 1e11, {"product": 0.5, "attention": 0.25, "rows": 0.8})
    product = Call("linear", "", 1, {"tokens": 1000, "inputs": 1000, "outputs": 1000})  # 2 GFLOP, 6 MB
    thin = Call("linear", "", 1, {"tokens": 1, "inputs": 1000, "outputs": 1000})  # 2 MFLOP, 2 MB
    rows = Call("gated_residual", "", 3, {"tokens": 1000, "dim": 1000})  # 6 MB
    attention = Call(
        "attention", "", 1, {"segments": 2, "tokens": 500, "keys": 500, "heads": 10, "dim": 100}
    )  # 2 GFLOP
    assert roofline.floor(product, device) == pytest.approx(2e-3)
    assert roofline.expected(product, device) == pytest.approx(4e-3)
    assert roofline.floor(thin, device) == pytest.approx(2.004e-5)
    assert roofline.expected(thin, device) == pytest.approx(2.505e-5)
    assert roofline.floor(rows, device) == pytest.approx(6.004e-5)
    assert roofline.expected(attention, device) == pytest.approx(8e-3)
    of_step = roofline.total([product, rows, attention], device)
    assert of_step.floor_s == pytest.approx(4e-3 + 3 * 6.004e-5)
    assert of_step.share_of_peak == pytest.approx(4e-3 / of_step.expected_s)


def test_every_operation_can_be_measured_and_is_in_some_step() -> None:
    assert set(roofline_measured.MAKERS) == set(OPS)
    assert {call.op for workload in WORKLOADS for call in workload.step()} == set(OPS)


def test_the_page_has_the_totals_of_the_steps() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    a100, h100 = roofline.DEVICES[:2]
    for workload in WORKLOADS[:2]:
        on_a100, on_h100 = (roofline.total(workload.step(), device) for device in (a100, h100))
        cells = [f"{on_a100.flops / 1e12:.1f}", f"{on_a100.bytes / 1e9:.1f}"]
        for of in (on_a100, on_h100):
            cells += [f"{1e3 * of.floor_s:.0f} / {1e3 * of.expected_s:.0f} ms", f"{100 * of.share_of_peak:.0f} %"]
        assert f"| {' | '.join(cells)} |" in page, workload.title


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the large steps are measured")
def test_the_command_measures_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(wan_work.FOURTEEN_BILLION, dim=64, heads=2, layers=1, hidden=128)
    tiny = zimage_work.Sizes(dim=96, layers=1, refiners=1, heads=3, patch=64)
    steps = {
        "pictures": lambda: zimage_work.step(tiny, 64, 64, 32),
        "videos": lambda: wan_work.step(small, 64, 64, 5, 20),
    }
    workloads = [*WORKLOADS[:1], *(Workload(name, step, False) for name, step in steps.items())]
    monkeypatch.setattr(roofline, "WORKLOADS", workloads)
    monkeypatch.setattr(roofline_measured, "SECONDS", 0.0)
    assert main(["bench", "--roofline", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "roofline.json").read_text())
    assert set(found["measured"]) == {"pictures", "videos"}
    for record in found["measured"].values():
        assert record["measured_s"] == pytest.approx(sum(call["times"] * call["seconds"] for call in record["calls"]))
        assert record["share"] == pytest.approx(record["floor_s"] / record["measured_s"])
    assert "Expected, not measured" in capsys.readouterr().out
    assert main(["bench", "--roofline", "video"]) == 2
