"""Step caches in whole runs: against diffusers' where ours can be the same, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from multimodal_gen.adapters import AdapterSource, AdapterUse, SetLora
from multimodal_gen.config import EngineConfig
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.messages import Checkpoint, Finished, Gauges, RowState
from multimodal_gen.pipelines import registry
from multimodal_gen.pipelines.stages import step_cache
from multimodal_gen.pipelines.wan.model import WanTransformer
from multimodal_gen.pipelines.zimage.model import ZImageTransformer
from multimodal_gen.request import AnyRequest, SamplingParams
from multimodal_gen.resolve import resolve
from tests.support.adapters import peft_tensors, write_adapter
from tests.support.checkpoints import PROMPT
from tests.support.device import DEVICE
from tests.support.stepping import note, run

pytestmark = [pytest.mark.parity]

NEVER = "first-block:threshold=1e-12,warmup=1,order=0"
FAMILIES = ("zimage", "t2v_a14b", "ti2v_5b")
STEPS = 9
# Caches of every kind, and none; tiny random models change much from step to step. Sizes and guidance differ, so that
# rows pack in another order than they came.
ROWS: list[dict[str, Any]] = [
    {"step_cache": "taylor:warmup=3", "guidance_scale": 4.0},
    {"step_cache": "first-block:threshold=1.345,warmup=3", "guidance_scale": 3.0},
    {"step_cache": "none", "guidance_scale": 2.0},
    {"step_cache": "first-block:threshold=1.27,warmup=2,order=0", "guidance_scale": 1.0, "num_inference_steps": 7},
    {"step_cache": "taylor:interval=3,order=2,warmup=1", "guidance_scale": 1.0},
    {"step_cache": NEVER, "guidance_scale": 4.0},
]


@pytest.fixture(params=FAMILIES)
def folder(
    request: pytest.FixtureRequest, z_image_folder: Callable[..., Path], wan_folder: Callable[..., Path]
) -> Path:
    family = request.param
    return z_image_folder(layers=3) if family == "zimage" else wan_folder(variant=family, layers=3)


def engine(folder: Path, **options: Any) -> EngineCore:
    config = EngineConfig(model_path=str(folder), device=DEVICE, **{"dtype": "float32", **options})
    return EngineCore(registry.describe(config), config)


def request(core: EngineCore, index: int, *, name: str = "", every: int = 0, **params: Any) -> AnyRequest:
    card = core.pipeline.card
    wanted: dict[str, Any] = {"num_inference_steps": STEPS, "seed": index, **ROWS[index % len(ROWS)], **params}
    wanted |= {"width": (4 + index % 3) * card.size_multiple, "height": 4 * card.size_multiple}
    if card.video is not None:
        wanted["num_frames"] = 5
        wanted["guidance_scale"] = max(1.0, wanted["guidance_scale"])
    return resolve(
        request_id=name or f"row-{index}",
        prompt=PROMPT,
        params=SamplingParams(**wanted),
        card=card,
        max_cost=10**9,
        output="latent",
        checkpoint_every=every,
    )


def skipped(core: EngineCore, wanted: AnyRequest) -> int:
    """How many steps of a request that runs alone were extrapolated."""
    core.add(wanted)
    while not core.idle:
        for event in core.step():
            if isinstance(event, Finished):
                return event.timings.cached_steps
    raise AssertionError("it never finished")


def test_a_cache_that_never_skips_changes_no_bit(folder: Path) -> None:
    """The forward in two halves is the forward."""
    core = engine(folder)
    plain, _ = run(core, [(0, request(core, 0, name="x", step_cache="none"))])
    halves, _ = run(core, [(0, request(core, 0, name="x", step_cache=NEVER))])
    assert np.array_equal(plain["x"], halves["x"])


def test_rows_with_and_without_caches_share_forwards(folder: Path) -> None:
    """Each is what it is alone, in any company: bit for bit where every row has its own forward, else to rounding."""
    for deterministic in (False, True):
        core = engine(folder, deterministic=deterministic)
        rows = [request(core, index) for index in range(len(ROWS))]
        alone = {row.id: run(core, [(0, row)])[0][row.id] for row in rows}
        together, counts = run(core, [(index // 2, row) for index, row in enumerate(rows)])
        assert max(counts) == len(ROWS)
        for name, latents in alone.items():
            tolerance = 0.0 if deterministic else 1e-4 * np.abs(latents).max()
            assert np.abs(together[name] - latents).max() <= tolerance, name


def test_caches_of_every_kind_skip_steps(folder: Path) -> None:
    """What the other tests compare would be the same without them."""
    core = engine(folder)
    counts = [skipped(core, request(core, index)) for index in range(len(ROWS))]
    assert counts[2] == counts[5] == 0
    assert all(0 < counts[index] < STEPS - 4 for index in (0, 1, 3, 4)), counts


def test_a_row_goes_on_in_another_engine_bit_for_bit(folder: Path) -> None:
    """From every checkpoint, also between a computed step and those extrapolated from it."""
    first = engine(folder, deterministic=True)
    rows = [request(first, index, every=2) for index in (0, 1, 4)]
    states: dict[int, dict[str, RowState]] = {}
    latents: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for row in rows:
        first.add(row)
    while not first.idle:
        for event in first.step():
            note(event, latents, [])
            if isinstance(event, Checkpoint):
                states.setdefault(event.state.step, {})[event.request_id] = event.state
            if isinstance(event, Finished):
                counts[event.request_id] = event.timings.cached_steps
    assert sorted(states) == [2, 4, 6, 8]
    for held in states.values():
        other = engine(folder, deterministic=True)
        again: dict[str, np.ndarray] = {}
        for row in rows:
            other.add(row, [held[row.id]])
        while not other.idle:
            for event in other.step():
                note(event, again, [])
                if isinstance(event, Finished):
                    assert event.timings.cached_steps == counts[event.request_id]
        assert all(np.array_equal(again[name], latents[name]) for name in latents)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(first block, tokens) of every pass through blocks."""
    passes: list[tuple[int, int]] = []
    for model in (WanTransformer, ZImageTransformer):
        through = model.through

        def counted(self: Any, x: Any, work: Any, begin: int, end: int, through: Any = through) -> Any:
            passes.append((begin, len(x)))
            return through(self, x, work, begin, end)

        monkeypatch.setattr(model, "through", counted)
    return iter([passes]).__next__()


def test_rows_that_skip_leave_after_the_first_block_and_the_others_go_on(
    wan_folder: Callable[..., Path], tokens: list[tuple[int, int]]
) -> None:
    core = engine(wan_folder(variant="t2v", layers=3))
    leaves = request(core, 0, step_cache="first-block:threshold=10,warmup=3", name="leaves", guidance_scale=4.0)
    stays = request(core, 0, step_cache=NEVER, name="stays", guidance_scale=1.0)
    without = request(core, 0, step_cache="taylor:interval=9,warmup=3", name="without", guidance_scale=1.0)
    _, rows = run(core, [(0, leaves), (0, stays), (0, without)])
    assert rows == [3] * STEPS
    one = 2 * 4 * 4 // 4 * 4  # tokens of one sequence: 2 latent frames of 4 x 4 patches
    first, rest = ([count // one for begin, count in tokens if begin == at] for at in (0, 1))
    assert first == [4, 4, 4, 3, 3, 3, 3, 3, 4]
    assert rest == [4, 4, 4, 1, 1, 1, 3, 1, 4]  # after three in a row the row is computed


def test_a_step_that_fails_leaves_what_rows_remember(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half has run, the second fails: the engine tries each row alone, and all ends well."""
    core = engine(folder, deterministic=True)
    rows = [request(core, index) for index in (0, 1)]
    expected, _ = run(core, [(0, row) for row in rows])
    for model in (WanTransformer, ZImageTransformer):
        finish, calls = model.finish, iter(range(10**6))

        def failing(*given: Any, finish: Any = finish, calls: Iterator[int] = calls) -> Any:
            if next(calls) == 2:
                raise RuntimeError("no memory")
            return finish(*given)

        monkeypatch.setattr(model, "finish", failing)
    found, _ = run(core, [(0, row) for row in rows])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cache", ["taylor:warmup=3", "first-block:threshold=10,warmup=3"])
def test_streamed_layers_give_the_same_bits_and_are_fetched_less_often(
    z_image_folder: Callable[..., Path], cache: str
) -> None:
    """Layers that were fetched ahead and are not needed after all do no harm."""
    loads, latents = [], []
    for text, offload in ((cache, "none"), (cache, "layerwise"), ("none", "layerwise")):
        core = engine(z_image_folder(layers=6), offload=offload)
        found, _ = run(core, [(0, request(core, 0, name="x", step_cache=text))])
        loads.append(core.pipeline.memory.use.loads)
        latents.append(found["x"])
    assert np.array_equal(latents[0], latents[1])
    assert loads[1] < loads[2]


def test_adapters_set_on_the_way_are_not_a_running_rows(z_image_folder: Callable[..., Path], tmp_path: Path) -> None:
    core = engine(z_image_folder(layers=3), deterministic=True)
    shapes = {"transformer.layers.2.feed_forward.w1": (256, 96), "transformer.layers.0.attention.to_q": (96, 96)}
    file = str(write_adapter(tmp_path / "a.safetensors", peft_tensors(shapes, prefix="", seed=2, size=0.5)))
    rows = [request(core, index) for index in (0, 1)]
    expected, _ = run(core, [(0, row) for row in rows])
    latents: dict[str, np.ndarray] = {}
    for row in rows:
        core.add(row)
    for step in range(STEPS):
        if step == 4:
            source, use = AdapterSource(nickname="a", path=file), AdapterUse(nickname="a", strength=1.0)
            core.change_adapters(SetLora(sources=(source,), uses=(use,), mode="dynamic"))
        for event in core.step():
            note(event, latents, [])
    assert all(np.array_equal(latents[name], expected[name]) for name in expected)


def test_what_rows_remember_is_counted_and_given_back(z_image_folder: Callable[..., Path]) -> None:
    core = engine(z_image_folder())
    core.add(request(core, 0))
    core.add(request(core, 1))
    held, counted = [], 0
    while not core.idle:
        for event in core.step():
            if isinstance(event, Gauges):
                held.append(event.step_cache_bytes)
                counted = event.cached_steps
    latents = 16 * 8 * 8 * 4, 16 * 8 * 10 * 4
    assert held[0] == sum(latents) + 2 * 4 * 5 * 96 * 4  # one computed step each, and what the first block added
    assert held[1] == held[0] + sum(latents)
    assert held[-1] == 0
    assert counted > 0


def test_rows_remember_no_steps_while_they_are_decoded(z_image_folder: Callable[..., Path]) -> None:
    core, held = engine(z_image_folder()), list[int]()
    core.add(msgspec.structs.replace(request(core, 0), output="pixels"))
    while not core.idle:
        held += [event.step_cache_bytes for event in core.step() if isinstance(event, Gauges)]
    assert held[STEPS - 2] > 0
    assert set(held[STEPS - 1 :]) == {0}
    assert len(held) > STEPS, "pieces are told of"


# --- against diffusers ----------------------------------------------------------------------------------------------


def diffusers_pipe(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_diffusers(pipe: Any, wanted: Any) -> np.ndarray:
    latents: torch.Tensor = pipe(
        prompt=wanted.prompt,
        width=wanted.width,
        height=wanted.height,
        num_frames=wanted.num_frames,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        generator=torch.Generator().manual_seed(wanted.seeds[0]),
        output_type="latent",
        return_dict=False,
    )[0]
    return latents.numpy()


def test_a_repeated_step_is_taylorseers_of_order_nought(wan_folder: Callable[..., Path]) -> None:
    """Along a straight line the clean latents stay where they are, and so does the velocity."""
    from diffusers import TaylorSeerCacheConfig

    folder = wan_folder(variant="t2v", layers=3, solver="euler")
    core, pipe = engine(folder), diffusers_pipe(folder)
    wanted = request(core, 0, step_cache="taylor:interval=2,order=0,warmup=3", name="x")
    plain = by_diffusers(pipe, wanted)
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=3,
            disable_cache_after_step=STEPS - 1,
            max_order=0,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )
    )
    expected = by_diffusers(pipe, wanted)
    assert np.abs(expected - plain).max() > 1e-2
    found, _ = run(core, [(0, wanted)])
    assert np.abs(found["x"] - expected).max() <= 1e-4


def test_the_first_block_changes_as_much_as_for_diffusers(
    wan_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is skipped, so that both measure along the same run."""
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook

    theirs: list[float] = []

    def measured(hook: Any, now: torch.Tensor) -> bool:
        before = hook.state_manager.get_state().head_block_residual
        if before is not None:
            theirs.append(float((now - before).abs().mean() / before.abs().mean()))
        return True

    folder = wan_folder(variant="t2v", layers=3)
    core, pipe = engine(folder), diffusers_pipe(folder)
    wanted = request(core, 0, step_cache=NEVER, name="x", guidance_scale=1.0)
    monkeypatch.setattr(FBCHeadBlockHook, "_should_compute_remaining_blocks", measured)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    expected = by_diffusers(pipe, wanted)
    ours: list[float] = []
    change = step_cache.change

    def noted(before: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor:
        found = change(before, now)
        ours.append(float(found))
        return found

    monkeypatch.setattr(step_cache, "change", noted)
    found, _ = run(core, [(0, wanted)])
    assert np.abs(found["x"] - expected).max() <= 1e-4
    assert len(ours) == STEPS - 2  # the first step has nothing to compare with, the last is not asked
    np.testing.assert_allclose(ours, theirs[: STEPS - 2], rtol=1e-3)
