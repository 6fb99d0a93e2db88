"""Sets of adapters on a tiny transformer: exact weights, one forward for mixed rows, transactions, the auto policy."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from multimodal_gen import DiffGenerator
from multimodal_gen.adapters import AdapterSource, LoadLora, LoraState, Pin
from multimodal_gen.engine.core import EngineCore
from multimodal_gen.errors import (
    AdapterError,
    AdapterInUse,
    AdapterLimit,
    AdapterMergeOnly,
    AdapterNotFound,
    GenerationFailed,
    WeightsUnavailable,
)
from multimodal_gen.lora.policy import MAX_LOSS, MIXED, WINDOW, Traffic, choose
from multimodal_gen.messages import Finished, Gauges
from multimodal_gen.request import ImageRequest, SamplingParams
from multimodal_gen.resolve import resolve
from multimodal_gen.weights.header import read_header
from tests.support.adapters import Shapes, only, peft_tensors, write_adapter
from tests.support.checkpoints import PROMPT, make_z_image
from tests.support.weights import numbers_of

pytestmark = [pytest.mark.unit]

REQUEST = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 2.0, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image(tmp_path_factory.mktemp("model"), seed=31)


@pytest.fixture(scope="module")
def shapes(folder: Path) -> Shapes:
    header = read_header(folder / "transformer" / "diffusion_pytorch_model.safetensors", "")
    return {
        name.removesuffix(".weight"): i.shape for name, i in header.items() if len(i.shape) == 2 and "pad" not in name
    }


@pytest.fixture
def file(tmp_path: Path, shapes: Shapes) -> Callable[..., str]:
    def make(name: str, *parts: str, size: float = 0.3, **options: int) -> str:
        wanted = only(shapes, *parts) if parts else shapes
        return str(write_adapter(tmp_path / f"{name}.safetensors", peft_tensors(wanted, size=size, **options)))

    return make


def load(folder: Path, **options: object) -> DiffGenerator:
    return DiffGenerator.from_pretrained(str(folder), **{"device": "cpu", "dtype": "float32", "threads": 1, **options})


@pytest.fixture(scope="module")
def shared(folder: Path) -> DiffGenerator:
    return load(folder, deterministic=True)


@pytest.fixture
def gen(shared: DiffGenerator) -> DiffGenerator:
    shared.set_lora([])
    for info in shared.list_loras().loaded:
        shared.unload_lora(info.nickname)
    return shared


def latents(gen: DiffGenerator, **options: object) -> torch.Tensor:
    found = gen.generate(PROMPT, output_type="latent", **{**REQUEST, **options}).latents
    assert found is not None
    return found


def checksum(gen: DiffGenerator) -> str:
    core = gen._engine.core
    digest = hashlib.sha256()
    for tree in core.pipeline.trees.values():
        for parameter in numbers_of(tree.model).values():
            digest.update(parameter.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_a_thousand_cycles_in_bf16_leave_the_base_bit_identical(folder: Path, file: Callable[..., str]) -> None:
    rng = random.Random(0)
    with load(folder, dtype="bfloat16") as gen:
        base = checksum(gen)
        names = ["a", "b", "c"]
        gen.set_lora(names, [file("a", seed=1), file("b", "attention", rank=7), file("c", "layers.0", seed=3)])
        assert checksum(gen) != base
        seen = {}
        for cycle in range(1000):
            chosen = rng.sample(names, rng.randint(1, 3))
            strengths = [rng.choice([-1.5, -0.3, 0.0, 0.5, 1.0, 2.0]) for _ in chosen]
            gen.set_lora(chosen, strength=strengths, merge_mode="merge")
            if cycle % 50 == 0:
                seen[tuple(zip(chosen, strengths, strict=True))] = checksum(gen)
            gen.unmerge_lora_weights()
            if cycle % 25 == 0:
                assert checksum(gen) == base, cycle
        assert checksum(gen) == base
        for members, wanted in seen.items():
            gen.set_lora([name for name, _ in members], strength=[s for _, s in members], merge_mode="merge")
            assert checksum(gen) == wanted, members


def test_memory_stays_level_over_swaps(folder: Path, file: Callable[..., str]) -> None:
    process = psutil.Process()
    files = [file(f"f{i}", seed=i, rank=16) for i in range(3)]
    with load(folder) as gen:
        after = {}
        for swap in range(100):
            mode = "merge" if swap % 2 else "dynamic"
            gen.set_lora([f"n{swap % 3}"], [files[swap % 3]], strength=0.1 + swap / 200, merge_mode=mode)
            latents(gen)
            after[swap + 1] = process.memory_info().rss
        assert after[100] <= 1.05 * after[5]


def test_eight_rows_with_eight_lists_share_one_forward(folder: Path, file: Callable[..., str]) -> None:
    lists = [
        [],
        [("a", 1.0)],
        [("b", 0.5)],
        [("a", 0.3), ("b", -0.7)],
        [("b", -0.7), ("a", 0.3)],
        [("c", 1.0)],
        [("c", 0.2), ("b", 0.2), ("a", 0.2)],
        [("a", 1.0), ("a", 0.5)],
    ]
    for deterministic in (False, True):
        with load(folder, deterministic=deterministic) as gen:
            gen.set_lora(["a", "b", "c"], [file("a", seed=1), file("b", "attention", rank=6), file("c", "w2", rank=2)])
            gen.set_lora([])
            core = gen._engine.core
            wishes = [
                request(core, f"r{i}", [{"nickname": n, "strength": s} for n, s in wish], seed=i)
                for i, wish in enumerate(lists)
            ]
            alone = {wish.id: run(core, [wish])[1][wish.id] for wish in wishes}
            steps, together = run(core, wishes)
            assert steps == [8, 8], "one step each for all eight rows"
            for name, got in together.items():
                if deterministic:
                    assert np.array_equal(got, alone[name]), name
                else:
                    assert np.linalg.norm(got - alone[name]) <= 1e-5 * np.linalg.norm(alone[name]), name
            assert len({got.tobytes() for got in together.values()}) == 8


def request(
    core: EngineCore, name: str, loras: list[dict[str, object]] | None, seed: int = 5, **params: object
) -> ImageRequest:
    from multimodal_gen.adapters import pins_of, read_uses

    state = core.loras.state
    pins = state.active if loras is None else pins_of(read_uses(loras), state, core.pipeline.trees)
    return resolve(
        request_id=name,
        prompt=PROMPT,
        params=SamplingParams(**{**REQUEST, "seed": seed, **params}),
        card=core.pipeline.card,
        max_cost=10**9,
        output="latent",
        loras=pins,
        own_loras=loras is not None,
    )


def run(core: EngineCore, requests: list[ImageRequest]) -> tuple[list[int], dict[str, np.ndarray]]:
    """(rows of each step, latents by request)."""
    from multimodal_gen.media.arrays import to_numpy

    for wish in requests:
        core.add(wish)
    steps, found = [], {}
    while not core.idle:
        for event in core.step():
            if isinstance(event, Gauges):
                steps.append(event.step_rows)
            elif isinstance(event, Finished):
                found[event.request_id] = to_numpy(event.outputs[0]).copy()
    return steps, found


def test_running_rows_keep_their_weights_and_new_ones_get_the_new_set(
    gen: DiffGenerator, file: Callable[..., str]
) -> None:
    core = gen._engine.core
    gen.set_lora("a", file("a"), merge_mode="merge")
    want_a = run(core, [request(core, "a0", None)])[1]["a0"]
    gen.set_lora("b", file("b", seed=2), merge_mode="merge")
    want_b = run(core, [request(core, "b0", None)])[1]["b0"]
    gen.set_lora("a", merge_mode="merge")
    first = request(core, "first", None, num_inference_steps=2)
    core.add(first)
    list(core.step())  # one of two steps under A
    gen.set_lora("b", merge_mode="merge")  # committed while A's row runs
    second = request(core, "second", None)
    steps, found = run(core, [second])
    assert steps == [1, 1, 1], "the second waits until the first is done: weights hold one set"
    assert np.array_equal(found["first"], want_a)
    assert np.array_equal(found["second"], want_b)


def test_an_adapter_that_is_unloaded_stays_for_those_who_run_with_it(
    gen: DiffGenerator, file: Callable[..., str]
) -> None:
    core = gen._engine.core
    gen.set_lora("a", file("a"), merge_mode="dynamic")
    want = run(core, [request(core, "x", None)])[1]["x"]
    sent = request(core, "y", None)
    core.add(sent)
    with pytest.raises(AdapterInUse):
        gen.unload_lora("a")
    gen.set_lora([])
    gen.unload_lora("a")
    gen.set_lora("c", file("c", seed=3))  # a second change, which forgets what nobody pins
    assert np.array_equal(run(core, [])[1]["y"], want)
    gen.set_lora([])
    late = list(core.add(sent))
    assert [event.error.code for event in late] == ["adapter_not_found"]  # type: ignore[union-attr]


def test_strength_zero_is_the_base_model(gen: DiffGenerator, file: Callable[..., str]) -> None:
    base = latents(gen)
    for mode in ("merge", "dynamic"):
        gen.set_lora("a", file("a"), strength=0.0, merge_mode=mode)
        assert torch.equal(latents(gen), base)


def test_caches_do_not_mix_sets(folder: Path, file: Callable[..., str]) -> None:
    """Encoded prompts and modulations depend on the set; a cache that forgot that would return the wrong ones."""
    wide = file("a")
    with load(folder) as cached, load(folder, condition_cache_mb=0) as fresh:
        for gen in (cached, fresh):
            gen.set_lora("a", wide, merge_mode="dynamic")
        for loras in (None, [], [{"nickname": "a", "strength": 0.5}], None, []):
            assert torch.equal(latents(cached, loras=loras), latents(fresh, loras=loras)), loras


def test_auto_prefers_beside_where_rounding_would_lose_the_update(folder: Path, file: Callable[..., str]) -> None:
    faint, plain = file("faint", size=1e-4), file("plain")
    with load(folder, dtype="bfloat16") as gen:
        state = gen.set_lora("faint", faint)
        assert state.merged == {"transformer": False}
        assert "rounding would lose" in state.reasons["transformer"]
        assert gen.set_lora("plain", plain).merged == {"transformer": True}
    with load(folder) as gen:
        assert gen.set_lora("faint", faint).merged == {"transformer": True}


def test_auto_follows_the_traffic_but_not_when_bits_matter(folder: Path, file: Callable[..., str]) -> None:
    a = file("a")
    for deterministic in (False, True):
        with load(folder, deterministic=deterministic) as gen:
            gen.set_lora("a", a)
            for _ in range(MIXED):
                latents(gen, loras=[])
            assert gen.list_loras().merged == {"transformer": deterministic}
            for _ in range(WINDOW):
                latents(gen)
            assert gen.list_loras().merged == {"transformer": True}


def test_the_choice() -> None:
    assert choose("merge", "", 1.0).merged
    assert not choose("dynamic", "", 0.0).merged
    assert choose("auto", "DoRA", 1.0).merged
    assert not choose("auto", "", MAX_LOSS + 0.01).merged
    assert choose("auto", "", 0.0).merged
    assert not choose("auto", "", 0.0).settled
    traffic = Traffic()
    for other in (True, False, True, True):
        traffic.note(other)
        assert traffic.merged(now=True)
    traffic.note(True)
    assert not traffic.merged(now=True)
    assert not traffic.merged(now=False)


def test_a_failing_merge_restores_the_set_before(folder: Path, file: Callable[..., str]) -> None:
    from multimodal_gen.engine.faults import Fault

    with load(folder) as gen:
        gen.set_lora("a", file("a"), merge_mode="merge")
        before, state = checksum(gen), gen.list_loras()
        fault = Fault.parse("merge:raise:1")
        for merged in gen._engine.core.loras._merged.values():
            merged._on_layer = lambda: fault.trip("merge")
        with pytest.raises(RuntimeError, match="injected"):
            gen.set_lora("b", file("b", seed=2), merge_mode="merge")
        assert checksum(gen) == before
        assert gen.list_loras() == state
        gen.set_lora("b", file("b", seed=2), merge_mode="merge")
        assert checksum(gen) != before


def test_a_checkpoint_that_changed_on_disk_is_not_merged_into(tmp_path: Path, file: Callable[..., str]) -> None:
    folder = make_z_image(tmp_path / "own", seed=31)
    with load(folder) as gen:
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[:-4096] + bytes(4096))
        before = checksum(gen)
        with pytest.raises(WeightsUnavailable) as caught:
            gen.set_lora("a", file("a"), merge_mode="merge")
        assert str(tmp_path) not in caught.value.message
        assert checksum(gen) == before
        assert not gen._engine.core.sick, "nothing had been written, so nothing is in doubt"
        gen.set_lora("a", file("a"), merge_mode="dynamic")
        latents(gen)
        weights.write_bytes(data)
        gen.set_lora("a", file("a"), merge_mode="merge")
        assert checksum(gen) != before, "the file is back"


def test_limits(folder: Path, file: Callable[..., str]) -> None:
    with load(folder, max_loras=1, lora=[f"a={file('a')}:0.5"]) as gen:
        (pin,), (info,) = gen.list_loras().active, gen.list_loras().loaded
        assert pin == Pin("transformer", "a", info.digest, 0.5, info.sha256)
        assert info.sha256 == hashlib.sha256(Path(info.path).read_bytes()).hexdigest()
        with pytest.raises(AdapterLimit, match="--max-loras"):
            gen.set_lora("b", file("b"))
        gen.set_lora("a", file("a", seed=9))


def test_python_errors(gen: DiffGenerator, file: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="'a' is loaded"):
        gen.set_lora("a")
    with pytest.raises(AdapterNotFound, match="no adapter at"):
        gen.set_lora("a", tmp_path / "none.safetensors")
    with pytest.raises(AdapterNotFound):
        gen.generate(PROMPT, loras=[{"nickname": "a"}], **REQUEST)
    gen.set_lora("good", file("good"))
    with pytest.raises(AdapterNotFound, match="Did you mean 'good'"):
        gen.generate(PROMPT, loras=[{"nickname": "goood"}], **REQUEST)
    (tmp_path / "whole").mkdir()
    tensors = {"layers.0.attention.to_q.diff": torch.zeros(96, 96)}
    whole = write_adapter(tmp_path / "whole" / "adapter_model.safetensors", tensors)
    with pytest.raises(AdapterMergeOnly, match="whole weight differences"):
        gen.set_lora("whole", whole.parent, merge_mode="dynamic")
    assert gen.set_lora("whole", whole.parent).merged == {"transformer": True}


def test_what_cannot_come_back_after_a_restart_is_told(folder: Path, file: Callable[..., str]) -> None:
    """Requests must not silently get less than the active set."""
    kept, lost = file("kept"), file("lost", seed=2)
    with load(folder) as gen:
        state = gen.set_lora(["kept", "lost"], [kept, lost])
    Path(lost).unlink()
    with load(folder) as gen:
        core = gen._engine.core
        core.bring_adapters(state)
        assert list(core.loras.state.missing) == [state.active[1].digest]
        (failed,) = core.add(request(core, "x", None))
        assert failed.error.code == "adapter_unavailable"  # type: ignore[union-attr]
        assert "'lost'" in failed.error.message  # type: ignore[union-attr]
        assert not core.sick
        base = latents(gen, loras=[])
        assert not torch.equal(latents(gen, loras=[{"nickname": "kept"}]), base)
        gen.set_lora("kept")
        assert not core.loras.state.missing
        assert not torch.equal(latents(gen), base)


def test_a_restart_after_everything_was_unloaded_brings_nothing_back(folder: Path, file: Callable[..., str]) -> None:
    with load(folder, lora=[f"a={file('a')}"]) as gen:
        assert gen.list_loras().active
        fresh = EngineCore(gen.card, gen.config)
        fresh.bring_adapters(LoraState())
        assert fresh.loras.state == LoraState()


def test_loading_under_the_name_of_an_active_adapter_is_refused(gen: DiffGenerator, file: Callable[..., str]) -> None:
    gen.set_lora("a", file("a"))
    with pytest.raises(AdapterInUse, match="another name"):
        gen._engine.core.change_adapters(LoadLora(source=AdapterSource(nickname="a", path=file("b", seed=2))))


def test_merging_a_set_of_which_a_part_was_unloaded_is_refused(gen: DiffGenerator, file: Callable[..., str]) -> None:
    gen.set_lora(["a", "b"], [file("a"), file("b", seed=2)])
    gen.unmerge_lora_weights()
    gen.unload_lora("b")
    with pytest.raises(AdapterNotFound, match="'b'"):
        gen.merge_lora_weights()


def test_what_overflows_is_refused_and_leaves_the_base(folder: Path, tmp_path: Path, file: Callable[..., str]) -> None:
    name = "layers.0.attention.to_q"
    huge = {f"{name}.lora_A.weight": torch.full((2, 96), 1e20), f"{name}.lora_B.weight": torch.full((96, 2), 1e20)}
    path = str(write_adapter(tmp_path / "huge.safetensors", huge))
    with load(folder, max_consecutive_errors=2) as gen:
        before, base = checksum(gen), latents(gen)
        with pytest.raises(AdapterError, match="overflow"):
            gen.set_lora("huge", path, merge_mode="merge")
        assert checksum(gen) == before
        assert not gen.list_loras().loaded
        # Large, but finite in the weights: the pictures overflow, and the engine is not to blame.
        gen.set_lora("loud", file("loud"), strength=100.0, lora_alpha=1e6, merge_mode="merge")
        for _ in range(3):
            with pytest.raises(GenerationFailed, match="overflowed"):
                gen.generate(PROMPT, **REQUEST)
            assert not gen._engine.core.sick
        gen.set_lora([])
        assert torch.equal(latents(gen), base)


def test_own_lists_are_bounded_and_cost_nothing_while_they_wait(gen: DiffGenerator, file: Callable[..., str]) -> None:
    names = [f"wide{i}" for i in range(3)]
    gen.set_lora(names, [file(name, "layers.0.attention", rank=500, seed=i) for i, name in enumerate(names)])
    gen.set_lora([])
    core = gen._engine.core
    (failed,) = core.add(request(core, "wide", [{"nickname": name} for name in names]))
    assert failed.error.code == "invalid_adapter"  # type: ignore[union-attr]
    assert "1500" in failed.error.message  # type: ignore[union-attr]
    core.add(request(core, "waits", [{"nickname": "wide0"}] * 20))
    assert all(use.overlay is None for use in core._active["waits"].adapters.trees.values())
    assert not core.loras._overlays
    _, found = run(core, [])
    assert len(found) == 1
    assert sum(next(iter(o.updates.values())).down.shape[1] for o in core.loras._overlays.values()) == 3 * 500, (
        "listed twenty times, stacked once (for q, k and v)"
    )


def test_own_lists_give_the_same_bits_whatever_is_active(gen: DiffGenerator, file: Callable[..., str]) -> None:
    gen.set_lora(["a", "b"], [file("a"), file("b", seed=2)], merge_mode="merge")
    want = latents(gen, loras=[{"nickname": "a"}])
    gen.set_lora("a", merge_mode="merge")
    assert torch.equal(latents(gen, loras=[{"nickname": "a"}]), want)


def test_a_failure_while_admitting_is_the_requests_own(
    gen: DiffGenerator, file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = gen._engine.core
    gen.set_lora("a", file("a"), merge_mode="dynamic")

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("device")

    monkeypatch.setattr("multimodal_gen.lora.manager.make_overlay", fail)
    _, found = run(core, [request(core, "x", None), request(core, "y", [])])
    assert list(found) == ["y"]
    monkeypatch.setattr(core.loras, "apply", fail)
    (failed,) = core.add(request(core, "z", None))
    assert failed.error.code == "out_of_memory"  # type: ignore[union-attr]
    core._failures = 0


def test_a_failure_in_the_second_tree_takes_back_the_first(
    folder: Path, tmp_path: Path, file: Callable[..., str]
) -> None:
    text = {f"text_encoder.layers.0.self_attn.q_proj.lora_{x}.weight": t for x, t in _factors(32, 32)}
    image = {f"transformer.layers.0.attention.to_q.lora_{x}.weight": t for x, t in _factors(96, 96)}
    both = str(write_adapter(tmp_path / "both.safetensors", {**text, **image}))
    with load(folder) as gen:
        gen.set_lora("old", file("old"), merge_mode="merge")
        before, state = checksum(gen), gen.list_loras()

        def fail() -> None:
            raise MemoryError

        merged = gen._engine.core.loras._merged
        assert list(merged) == ["transformer", "text_encoder"]
        merged["text_encoder"]._on_layer = fail
        with pytest.raises(MemoryError):
            gen.set_lora("both", both, merge_mode="merge")
        assert checksum(gen) == before
        assert gen.list_loras() == state
        merged["text_encoder"]._on_layer = lambda: None
        assert gen.set_lora("both", both, merge_mode="merge").merged == {"transformer": True, "text_encoder": True}


def _factors(out: int, width: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(out)
    return [("A", torch.randn(2, width, generator=generator)), ("B", torch.randn(out, 2, generator=generator))]
