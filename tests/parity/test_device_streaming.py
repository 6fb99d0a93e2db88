"""Whole models whose layers are streamed to a device compute the same bits, in every host tier, whatever changes.

The device is a fake: its memory is the host's, its copies come late and in pieces (`tests/support/fake_streams.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from multimodal_gen import DiffGenerator
from multimodal_gen.engine.local import LocalEngine
from multimodal_gen.memory import stream
from multimodal_gen.memory.device_mover import DeviceMover
from multimodal_gen.memory.host_images import HostImages
from multimodal_gen.memory.layers import Layer
from multimodal_gen.memory.residency import Memory
from multimodal_gen.memory.ring import Mover
from multimodal_gen.memory.shares import MemoryPlan
from multimodal_gen.memory.use import MemoryUse
from tests.support.adapters import peft_tensors
from tests.support.device import ON_CPU
from tests.support.fake_streams import HostComputes

pytestmark = [pytest.mark.parity, pytest.mark.skipif(not ON_CPU, reason="its device is a fake")]

# Of the bytes of all streamed layers: what is pinned, what is in host memory at all.
TIERS = {"pinned": (1.0, 1.0), "pageable": (0.0, 1.0), "file": (0.0, 0.0), "all three": (0.4, 0.8)}


class Device:
    """What stands in for a GPU; filled when a model is loaded."""

    def __init__(self, pinned: float, host: float) -> None:
        self.pinned, self.host = pinned, host
        self.loaded = False
        self.streams = HostComputes(0)

    def mover(
        self,
        _: torch.device,
        plan: MemoryPlan,
        layers: Sequence[Layer],
        often: Container[Layer],
        slots: Sequence[Tensor],
        use: MemoryUse,
    ) -> tuple[Mover, HostImages]:
        """Instead of `make_mover`, which takes a mover of files on a CPU."""
        total = sum(layer.nbytes for layer in layers)
        every_step = [layer.number for layer in layers if layer in often]
        images = HostImages(layers, int(self.pinned * total), int(self.host * total), self.streams, every_step)
        self.loaded = True
        return DeviceMover(slots, images, self.streams, use), images


@pytest.fixture(params=TIERS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device(*TIERS[request.param])
    monkeypatch.setattr(stream, "make_mover", made.mover)
    yield made
    assert made.loaded
    assert not made.streams.faults


def picture(gen: DiffGenerator, seed: int) -> torch.Tensor:
    result = gen.generate("a boat", seed=seed, width=64, height=64, num_inference_steps=3, output_type="latent")
    assert result.latents is not None
    return result.latents


def test_adapters_and_sleep_change_nothing(
    device: Device, z_image_folder: Callable[..., Path], generator: Callable[..., DiffGenerator], tmp_path: Path
) -> None:
    folder = z_image_folder()
    resident = generator(folder)
    with DiffGenerator.from_pretrained(
        str(folder), device="cpu", dtype="float32", offload="layerwise", prefetch_layers="2"
    ) as streamed:
        assert isinstance(streamed._engine, LocalEngine)
        memory = streamed._engine.core.pipeline.memory
        shapes = {"layers.0.attention.to_q": _square(memory), "layers.1.attention.to_q": _square(memory)}
        save_file(peft_tensors(shapes), tmp_path / "one.safetensors")
        save_file(peft_tensors(shapes, seed=1), tmp_path / "two.safetensors")
        plain = picture(resident, 1)
        assert torch.equal(picture(streamed, 1), plain)
        seen = [plain]
        for name in ("one", "two"):
            for gen in (resident, streamed):
                gen.set_lora(name, str(tmp_path / f"{name}.safetensors"), merge_mode="merge")
            wanted = picture(resident, 2)
            assert not any(torch.equal(wanted, other) for other in seen)
            assert torch.equal(picture(streamed, 2), wanted)
            memory.sleep()
            memory.wake()
            assert torch.equal(picture(streamed, 2), wanted)
            seen.append(wanted)
        for gen in (resident, streamed):
            gen.set_lora([])
        assert torch.equal(picture(streamed, 1), plain)
        assert memory.use.stall_seconds > 0
        assert memory.use.tiers["pinned"] + memory.use.tiers["pageable"] + memory.use.tiers["file"] > 0


def _square(memory: Memory) -> tuple[int, int]:
    width = memory._components["transformer"].weights.shapes["layers.0.attention.to_q.weight"]
    assert len(width) == 2
    return width
