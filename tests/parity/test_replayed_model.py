"""A whole model whose layers replay: other weights and sleep are seen by the next picture, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multimodal_gen import DiffGenerator
from multimodal_gen.kernels import blocked_linear, native
from multimodal_gen.nn.cpu_graphs import CpuRecorder
from tests.support.adapters import make_adapter_for

pytestmark = [pytest.mark.parity]

SMALL: dict[str, Any] = {"seed": 3, "width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
EMOJI = Path(__file__).parents[2] / "multimodal_gen/assets/emoji-image"
TURNS = ("base", "merged", "base", "beside", "base", "asleep", "merged")


def pictures(adapter: Path) -> tuple[list[np.ndarray], int]:
    """One for each of TURNS, and how many regions were replayed."""
    made, replayed = list[np.ndarray](), 0
    with DiffGenerator.from_pretrained("emoji-image", dtype="bfloat16", threads=2) as generator:
        engine: Any = generator._engine
        for turn in TURNS:
            if turn == "asleep":
                generator.sleep()
                generator.wake()
            elif turn == "base":
                generator.set_lora([])
            else:
                path = adapter if len(made) == 1 else None
                generator.set_lora("a", path, merge_mode="merge" if turn == "merged" else "dynamic")
            made.append(np.asarray(generator.generate("red apple", **SMALL).images[0]))
            replayed += engine.core.pipeline.transformer.graphs.replayed
    return made, replayed


def test_other_weights_and_sleep_are_seen_by_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := native.unavailable() or blocked_linear.unavailable((320, 320), torch.bfloat16, torch.bfloat16):
        pytest.skip(why)
    adapter = make_adapter_for(EMOJI, tmp_path / "a.safetensors")
    found, replayed = pictures(adapter)
    assert replayed > 0
    monkeypatch.setattr(CpuRecorder, "takes", lambda *_: False)
    wanted, none = pictures(adapter)
    assert none == 0
    for turn, ours, plain in zip(TURNS, found, wanted, strict=True):
        assert np.array_equal(ours, plain), turn
    by_turn = dict(zip(TURNS, found, strict=True))
    for turn, picture in zip(TURNS, found, strict=True):
        assert np.array_equal(picture, by_turn[turn]), f"{turn} is what it was before"
    assert np.array_equal(by_turn["asleep"], by_turn["base"])
    assert not np.array_equal(by_turn["merged"], by_turn["base"])
