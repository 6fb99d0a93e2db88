"""Layers that are recorded or compiled compute what they compute otherwise, and break only where it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multimodal_gen.attention.apart import ApartAttention
from multimodal_gen.attention.sdpa import SdpaAttention
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.cards import describe
from multimodal_gen.errors import ConfigError
from multimodal_gen.kernels import native
from multimodal_gen.kernels.eager import eager_break
from multimodal_gen.nn import compiled
from multimodal_gen.nn.graphs import CudaTape, Graphs, TapeRecorder
from multimodal_gen.nn.lowrank import Overlay, Piece, Update
from multimodal_gen.pipelines.regions import Regions
from multimodal_gen.pipelines.wan import packing as wan_packing
from multimodal_gen.pipelines.wan.config import WanConfig
from multimodal_gen.pipelines.wan.model import WanTransformer
from multimodal_gen.pipelines.zimage import packing as zimage_packing
from multimodal_gen.pipelines.zimage.model import ZImageConfig, ZImageTransformer
from tests.support.tape import PlayedBack

pytestmark = [pytest.mark.unit]

CPU = torch.device("cpu")
Step = Callable[..., list[Tensor]]  # (size, seed) and maybe an adapter → velocities


@pytest.fixture(autouse=True)
def _small_work() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def played_back() -> Any:
    """The tape sees operations of torch only, not what our own code writes to addresses."""
    with native.torch_only():
        yield PlayedBack()


class Void(PlayedBack):
    """As CUDA's capture after an error inside it."""

    def end(self) -> Any:
        super().end()
        raise RuntimeError("the capture is void")


def test_a_capture_that_is_void_does_not_hide_what_made_it_so() -> None:
    def compute(x: Tensor) -> Tensor:
        if asked:
            raise MemoryError("too much")
        return x

    graphs, asked = Graphs(TapeRecorder(Void())), list[int]()
    graphs.run(compute, (torch.ones(3),), (0,), ())
    asked.append(1)
    with pytest.raises(MemoryError, match="too much"):
        graphs.run(compute, (torch.ones(3),), (0,), ())
    asked.clear()
    with pytest.raises(RuntimeError, match="void"):
        graphs.run(compute, (torch.ones(3),), (0,), ())


@pytest.fixture
def compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def filled(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    return model.eval()


def pictures(layers: int = 3, device: torch.device = CPU, *, recorded: bool = True) -> tuple[ZImageTransformer, Step]:
    """A small Z-Image, and a step of pictures of size x 2 patches under guidance."""
    config = ZImageConfig(4, 48, layers, 1, 3, 1e-5, 20, 256.0, 1000.0, (4, 6, 6), 2)
    model = filled(ZImageTransformer(config, ApartAttention(SdpaAttention(), recorded=recorded))).to(device)
    rope, layouts = zimage_packing.Rope(config.axes_dims, config.rope_theta), dict[int, Any]()

    def step(size: int, seed: int, overlay: Overlay | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = zimage_packing.Shape(size, 2, (32, 64))
        layout = layouts.setdefault(size, zimage_packing.make_layout([shape], rope, device))
        captions = [
            torch.randn(joint.length - layout.images[joint.image][2], 48, generator=generator).to(device)
            for joint in layout.joints
        ]
        time = model.modulate(torch.rand(1, generator=generator).to(device), None)
        patches = torch.randn(size * 2, config.patch_dim, generator=generator).to(device)
        return model([patches], [time], captions, layout, [overlay])

    return model, step


def videos(layers: int = 3, device: torch.device = CPU, *, recorded: bool = True) -> tuple[WanTransformer, Step]:
    """A small Wan, and a step of a video of size x 2 x 3 patches under guidance; its prompts stay the same."""
    config = WanConfig((1, 2, 2), 3, 16, 4, 4, 12, 8, 64, layers, 1e-6, None)
    model = filled(WanTransformer(config, ApartAttention(SdpaAttention(), recorded=recorded))).to(device)
    rope, layouts = wan_packing.Rope(config), dict[int, Any]()
    texts = [torch.randn(length, 12, generator=torch.Generator().manual_seed(length)).to(device) for length in (5, 3)]
    contexts = [model.read(text, 2, None, None, keep=keep) for text, keep in zip(texts, (True, False), strict=True)]

    def step(size: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = wan_packing.Shape(size, 2, 3)
        layout = layouts.setdefault(size, wan_packing.make_layout([(shape, 0, 0), (shape, 0, 1)], rope, device))
        time = model.modulate(torch.rand(1, generator=generator).to(device) * 1000, None)
        patches = [torch.randn(shape.tokens, 16, generator=generator).to(device) for _ in range(2)]
        return model(patches, [time, time], contexts, layout, [None, None])

    return model, step


MODELS = {"pictures": pictures, "videos": videos}
REGIONS = {"pictures": 2, "videos": 1}  # that are recorded: of pictures what comes before the joint layers, too


@pytest.mark.parametrize("recorded", [True, False], ids=["attention inside", "attention between graphs"])
@pytest.mark.parametrize("name", MODELS)
def test_replayed_layers_compute_what_they_compute_without_graphs(
    name: str, recorded: bool, played_back: PlayedBack
) -> None:
    model, step = MODELS[name](recorded=recorded)
    calls = [(2, 1), (2, 2), (5, 3), (2, 4), (5, 5), (5, 6), (2, 7)]
    wanted = [step(*call) for call in calls]
    model.graphs = Graphs(TapeRecorder(played_back))
    found = [step(*call) for call in calls]
    for ours, plain in zip(found, wanted, strict=True):
        assert_close(ours, plain)
    regions = REGIONS[name]
    assert model.graphs.replayed == 5 * regions  # all but the first of each size
    breaks = 0 if recorded else {"pictures": 4, "videos": 3}[name]  # of each size: one per layer
    assert played_back.segments == 2 * (regions + breaks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recorded", [True, False], ids=["attention inside", "attention between graphs"])
@pytest.mark.parametrize("compile_too", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_a_gpu_compute_what_it_computes_without_them(
    name: str, compile_too: bool, recorded: bool, compiler: None
) -> None:
    device = torch.device("cuda")
    model, step = MODELS[name](3, device, recorded=recorded)
    calls = [(2, 1), (2, 2), (5, 3), (2, 4), (5, 5), (5, 6), (2, 7)]
    wanted = [step(*call) for call in calls]
    if compile_too:
        compiled.compile_layers(layers_of(model))
    model.graphs = Graphs(TapeRecorder(CudaTape(device)))
    for call, plain in zip(calls, wanted, strict=True):
        assert_close(step(*call), plain)
    assert model.graphs.replayed == 5 * REGIONS[name]
    model.graphs.clear()  # as when the model sleeps: the memory of all graphs is gone
    for call, plain in zip(calls, wanted, strict=True):
        assert_close(step(*call), plain)


def test_layers_with_adapters_beside_them_are_not_recorded() -> None:
    model, step = pictures()
    overlay = overlay_of(model)
    plain = step(2, 1)
    model.graphs = Graphs(TapeRecorder(PlayedBack()))
    with_adapter = [step(2, 1, overlay) for _ in range(3)]
    assert model.graphs.replayed == 0
    assert not torch.allclose(with_adapter[0][0], plain[0])
    assert torch.equal(with_adapter[0][0], with_adapter[2][0])


def test_old_graphs_leave_and_cleared_ones_are_made_anew() -> None:
    graphs, x = Graphs(TapeRecorder(PlayedBack())), torch.ones(3)
    fixed = [object() for _ in range(TapeRecorder.most + 1)]
    for thing in (*fixed, *fixed[1:], fixed[0]):
        graphs.run(lambda x: x.mul_(2), (x.clone(),), (0,), (thing,))
    assert graphs.replayed == TapeRecorder.most  # the first had to leave
    graphs.clear()
    assert torch.equal(graphs.run(lambda x: x.mul_(3), (x.clone(),), (0,), (fixed[1],)), 3 * x)


def test_a_recording_that_fails_leaves_nothing_behind() -> None:
    graphs, x, fails = Graphs(TapeRecorder(PlayedBack())), torch.ones(3), [False]

    @eager_break
    def looks(x: Tensor) -> Tensor:
        if fails[0]:
            raise RuntimeError("no")
        return x + 1

    def compute(x: Tensor) -> Tensor:
        return x.copy_(looks(x * 2) * 2)

    assert graphs.run(compute, (x.clone(),), (0,), ())[0] == 6
    fails[0] = True
    with pytest.raises(RuntimeError, match="no"):
        graphs.run(compute, (x.clone(),), (0,), ())
    fails[0] = False
    assert [graphs.run(compute, (x * k,), (0,), ())[0].item() for k in (1, 2, 3)] == [6, 10, 14]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", MODELS)
def test_traced_layers_compute_the_same_share_their_code_and_break_only_where_it_is_written(name: str) -> None:
    from torch._dynamo.utils import counters

    model, step = MODELS[name](6)
    wanted = {call: step(*call) for call in ((2, 1), (2, 2), (4, 3), (5, 4))}
    counters.clear()
    compiled.compile_layers(layers_of(model), "aot_eager")
    frames = []
    for call, plain in wanted.items():
        assert_close(step(*call), plain)
        frames.append(counters["stats"]["unique_graphs"])
    reasons = list(counters["graph_break"])
    assert reasons
    assert all("@eager_break" in reason for reason in reasons), reasons
    assert frames[0] == frames[1], "another step of the same shape compiles nothing"
    assert frames[0] < 20, "six layers share what one is compiled to"
    assert frames[2] == frames[3], "from the second size on, sizes are numbers like others"


@pytest.mark.usefixtures("compiler")
def test_compiled_layers_compute_the_same() -> None:
    model, step = pictures(1)
    plain = step(2, 1)
    compiled.compile_layers(model.layers)
    assert_close(step(2, 1), plain)


@pytest.mark.usefixtures("compiler")
def test_traced_layers_take_adapters_beside_them() -> None:
    model, step = pictures(1)
    overlay = overlay_of(model)
    plain, with_adapter = step(2, 1), step(2, 1, overlay)
    compiled.compile_layers(layers_of(model), "aot_eager")
    assert_close(step(2, 1), plain)
    assert_close(step(2, 1, overlay), with_adapter)
    assert_close(step(2, 1), plain)


def overlay_of(model: ZImageTransformer) -> Overlay:
    """An adapter of one layer, large enough to be seen."""
    piece = Piece(slice(0, 48), slice(0, 1), torch.ones(1, 48))
    return Overlay({model.layers[0].attention.out: Update(torch.ones(48, 1), (piece,))})


def layers_of(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, ZImageTransformer):
        return [*model.noise_refiner, *model.layers]
    assert isinstance(model, WanTransformer)
    return list(model.blocks)


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path) -> None:
    config = EngineConfig()
    with pytest.raises(ConfigError, match=r"--cuda-graphs.*cpu"):
        Regions(replace_config(config, cuda_graphs=True), CPU)
    with pytest.raises(ConfigError, match=r"--compile and --deterministic"):
        describe(replace_config(config, compile=True, deterministic=True))
    for wish in ("compile", "cuda_graphs"):
        with pytest.raises(ConfigError, match="no such model is loaded"):
            describe(replace_config(config, model_path="none", llm_path="smollm2", **{wish: True}))
    assert isinstance(Regions(replace_config(config, compile=True), CPU).attention("sdpa", solo()), ApartAttention)
    assert not isinstance(Regions(config, CPU).attention("sdpa", solo()), ApartAttention)


def replace_config(config: EngineConfig, **values: Any) -> EngineConfig:
    import msgspec

    return msgspec.structs.replace(config, **values)


def solo() -> Any:
    from multimodal_gen.parallel.mesh import Mesh

    return Mesh.solo()
