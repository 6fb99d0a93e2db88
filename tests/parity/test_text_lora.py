"""Adapters of language models: the same tokens as peft, whoever shares the batch, and nobody starves."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multimodal_gen.adapters import AdapterSource, RestoreLora, SwapLoras
from multimodal_gen.errors import AdapterError, AdapterLimit, AdapterMergeOnly, AdapterMismatch, AdapterNotFound
from multimodal_gen.llm.adapter_turns import TURN_STEPS
from multimodal_gen.llm.adapters import STACKED_TOKENS
from multimodal_gen.llm.core import TextCore
from multimodal_gen.llm.loading import TextModel
from multimodal_gen.lora.sources import make_source
from multimodal_gen.messages import TextStep
from tests.support.text_adapters import ALL, with_peft, write_peft
from tests.support.text_core import Driver, answer, ask, greedy, make_text_folder, open_core
from tests.support.text_models import open_model, reference

pytestmark = [pytest.mark.parity]

PROMPTS = ((5, 9, 33, 120, 7), (5, 9, 33, 120, 7), (200, 4, 11), (5, 9, 33, 120, 7, 8, 9, 10, 11, 12))
NAMES = ("a", "b", "c")
TOKENS = 10


class Setting:
    """A tiny model, three adapters of it, and what peft says."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = make_text_folder(family, folder / "model")
        self.model: TextModel = open_model(self.folder)
        theirs = reference(self.folder)
        targets = {"a": ALL, "b": ("q_proj", "v_proj"), "c": ("down_proj", "o_proj", "k_proj")}
        self.files = {
            name: write_peft(theirs, folder / name, seed=seed, targets=targets[name], rank=2 + 3 * seed)
            for seed, name in enumerate(NAMES)
        }
        self.said = {None: [greedy(theirs, prompt, TOKENS) for prompt in PROMPTS]}
        for name, file in self.files.items():
            wrapped = with_peft(theirs, file)
            self.said[name] = [greedy(wrapped, prompt, TOKENS) for prompt in PROMPTS]
            theirs = wrapped.unload()

    def core(self, *names: str, **settings: Any) -> TextCore:
        """A core of the model with these adapters loaded."""
        core = open_core(self.folder, model=self.model, **settings)
        for name in names:
            load(core, name, self.files[name])
        return core


def load(core: TextCore, name: str, path: Path, *unload: str) -> str:
    """Load an adapter; returns its digest."""
    core.adapters.change(SwapLoras(sources=(make_source(name, str(path), None),), unload=unload))
    return digest(core, name)


def digest(core: TextCore, name: str | None) -> str | None:
    return None if name is None else {info.nickname: info.digest for info in core.adapters.state.loaded}[name]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("llama", tmp_path_factory.mktemp("one"))


def test_every_adapter_says_what_peft_says_and_none_says_what_another_does(setting: Setting):
    core = setting.core(*NAMES)
    for name in (None, *NAMES):
        heard = answer(core, *[ask(str(i), p, TOKENS, adapter=digest(core, name)) for i, p in enumerate(PROMPTS)])
        assert [heard.ids(str(i)) for i in range(len(PROMPTS))] == setting.said[name], name
    distinct = {tuple(map(tuple, said)) for said in setting.said.values()}
    assert len(distinct) == 4, "the adapters change nothing, so this test says nothing"


@pytest.mark.parametrize("places", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("chunk", [64, 3])
def test_base_and_three_adapters_in_one_batch_say_what_each_says_alone(setting: Setting, places: int, chunk: int):
    core = setting.core(*NAMES, max_loras_per_batch=places, chunked_prefill_size=chunk)
    driver = Driver(core)
    wanted = {f"{name} {i}": setting.said[name][i] for i in range(len(PROMPTS)) for name in (None, *NAMES)}
    for i, prompt in enumerate(PROMPTS):
        driver.add(*[ask(f"{name} {i}", prompt, TOKENS, adapter=digest(core, name)) for name in (None, *NAMES)])
    mixed = 0
    while not core.idle:
        driver.step()
        ready = [each for each in core.adapters.ready if each is not None]
        assert len(core.adapters.ready) <= places
        mixed = max(mixed, len(ready))
    assert {name: driver.heard.ids(name) for name in wanted} == wanted
    assert mixed == min(3, places)


def test_a_long_prompt_computes_its_adapter_by_itself(llama: Setting):
    """Beyond `STACKED_TOKENS` runs of tokens take the place of the stack; both in one answer, beside others."""
    prompt = [(7 * at) % 300 + 5 for at in range(STACKED_TOKENS + 30)]
    theirs, said = reference(llama.folder), {}
    for name in NAMES:
        wrapped = with_peft(theirs, llama.files[name])
        said[name] = greedy(wrapped, prompt, 6)
        theirs = wrapped.unload()
    said[None] = greedy(theirs, prompt, 6)
    core = llama.core(*NAMES, chunked_prefill_size=1024)
    heard = answer(core, *[ask(f"{name}", prompt, 6, adapter=digest(core, name)) for name in (None, *NAMES)])
    assert {name: heard.ids(f"{name}") for name in said} == said
    assert len(set(map(tuple, said.values()))) > 1


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "int4-weights")])
def test_adapters_run_beside_weights_of_fewer_bits(llama: Setting, dtype: str, bits: str):
    core = open_core(llama.folder, dtype, llm_quantize=bits)
    for name in NAMES:
        load(core, name, llama.files[name])
    every = (None, *NAMES)
    alone = {name: answer(core, ask("x", PROMPTS[0], 6, adapter=digest(core, name))).ids("x") for name in every}
    heard = answer(core, *[ask(f"{name}", PROMPTS[0], 6, adapter=digest(core, name)) for name in every])
    assert len(set(map(tuple, alone.values()))) == 4, "an adapter changes nothing"
    together = {name: heard.ids(f"{name}") for name in every}
    assert {name: ids[0] for name, ids in together.items()} == {name: ids[0] for name, ids in alone.items()}


def test_n_answers_of_an_adapter_share_its_prompt_and_no_other_adapters(llama: Setting):
    core = llama.core(*NAMES, kv_page_size=4)
    prompt = PROMPTS[3]
    heard = answer(core, ask("base", prompt, 4), ask("a", prompt, 4, adapter=digest(core, "a"), n=3))
    assert [heard.ids("a", index) for index in range(3)] == [llama.said["a"][3][:4]] * 3
    assert heard.finished["a"].usage.cached_tokens == 0, "keys and values of the base model are not the adapter's"
    again = answer(core, ask("again", prompt, 4, adapter=digest(core, "a")))
    assert again.finished["again"].usage.cached_tokens == 8
    assert again.ids("again") == llama.said["a"][3][:4]


def test_with_one_place_two_adapters_and_the_base_write_side_by_side(llama: Setting):
    """A long answer of one does not hold up the others: each gets a token at least every three turns."""
    core = llama.core("a", "b", max_loras_per_batch=1)
    driver, seen = Driver(core), dict[str, list[int]]()
    driver.add(ask("a", PROMPTS[0], 100, adapter=digest(core, "a")))
    for _ in range(5):
        driver.step()
    driver.add(ask("b", PROMPTS[0], 40, adapter=digest(core, "b")), ask("base", PROMPTS[0], 40))
    step = 0
    while not core.idle:
        step += 1
        for event in driver.step():
            if isinstance(event, TextStep):
                assert len({delta.request_id for delta in event.deltas}) == 1
                seen.setdefault(event.deltas[0].request_id, []).append(step)
    for name, steps in seen.items():
        gaps = [after - before for before, after in zip([0, *steps], steps, strict=False)]
        assert max(gaps) <= 2 * TURN_STEPS + 1, (name, gaps)
    assert set(seen) == {"a", "b", "base"}
    assert driver.heard.ids("b")[:TOKENS] == llama.said["b"][0]
    assert driver.heard.ids("base")[:TOKENS] == llama.said[None][0]


def test_a_stream_of_requests_of_one_adapter_cannot_keep_another_out(llama: Setting):
    """All places of the scheduler are taken, and there is always another request of `a` that waits."""
    now = [0.0]
    core = llama.core("a", "b", max_loras_per_batch=1, max_running_requests=3, clock=lambda: now[0])
    driver, count = Driver(core), 0

    def more() -> None:
        nonlocal count
        while core.scheduler.waiting < 6:
            driver.add(ask(f"a{count}", PROMPTS[2], 2 + count % 3, adapter=digest(core, "a")))
            count += 1

    for _ in range(10):
        more()
        driver.step()
    driver.add(ask("b", PROMPTS[0], TOKENS, adapter=digest(core, "b")))
    for _ in range(300):
        more()
        driver.step()
        now[0] += 0.1
        if "b" in driver.heard.outputs:
            break
    assert driver.heard.ids("b") == llama.said["b"][0], f"b waits while {count} requests of a were answered"


def test_adapters_swapped_while_requests_run_change_no_answer(llama: Setting):
    core = llama.core("a")
    driver = Driver(core)
    old = digest(core, "a")
    driver.add(ask("old", PROMPTS[0], TOKENS, adapter=old))
    driver.step()
    new = load(core, "a", llama.files["b"])  # the name means another adapter from now on
    core.adapters.change(SwapLoras(unload=("a",)))
    heard = driver.run()
    assert heard.ids("old") == llama.said["a"][0]
    driver.add(ask("gone", PROMPTS[0], TOKENS, adapter=new), ask("old again", PROMPTS[0], TOKENS, adapter=old))
    assert {name: error.code for name, error in driver.run().failed.items()} == {
        "gone": "adapter_not_found",
        "old again": "adapter_not_found",
    }
    assert core.adapters.held == 0
    assert not core.adapters.ready or set(core.adapters.ready) == {None}


def test_after_a_thousand_random_requests_and_aborts_nothing_is_held(llama: Setting):
    rng = random.Random(11)
    core = llama.core(*NAMES, max_loras_per_batch=2, max_running_requests=12, kv_cache_memory=1 << 19)
    driver, alive, count = Driver(core), set[str](), 0
    while count < 1000 or not core.idle:
        for _ in range(rng.randint(0, 6)) if count < 1000 else ():
            name, prompt = rng.choice([None, *NAMES]), rng.choice(PROMPTS)
            request = ask(f"r{count}", prompt, rng.randint(1, 8), adapter=digest(core, name), n=rng.choice([1, 1, 2]))
            driver.add(request)
            alive.add(request.id)
            count += 1
        for request_id in sorted(alive):
            if rng.random() < 0.05:
                driver.note(core.cancel(request_id))
        driver.step()
        alive -= driver.heard.finished.keys() | driver.heard.failed.keys()
        if rng.random() < 0.1:  # loaded anew, sometimes as another one
            swapped = rng.choice(NAMES)
            load(core, swapped, llama.files[rng.choice(NAMES)])
    assert not alive
    assert len(driver.heard.finished) + len(driver.heard.failed) == count >= 1000
    assert {error.code for error in driver.heard.failed.values()} == {"cancelled"}
    assert core.adapters.held == 0
    assert core.gauges().kv_pages_used == 0
    core.adapters.change(SwapLoras(unload=tuple(dict.fromkeys(i.nickname for i in core.adapters.state.loaded))))
    core.adapters.change(SwapLoras())
    assert core.adapters.kept == 0, "an adapter's tensors stay although nobody can use them"
    assert core.adapters.nbytes == 0


def test_an_adapter_of_smollm2_fits_the_gguf_file(smollm2_by_transformers: Any, tmp_path: Path):
    """Rows of queries and keys stand in another order in that file; adapters are trained on transformers' order."""
    file = write_peft(smollm2_by_transformers, tmp_path / "a", seed=3, targets=("q_proj", "k_proj", "v_proj"), size=0.5)
    prompt = list(range(100, 140))
    base = greedy(smollm2_by_transformers, prompt, 6)
    wrapped = with_peft(smollm2_by_transformers, file)
    wanted = greedy(wrapped, prompt, 6)
    wrapped.unload()
    core = open_core("smollm2", model=open_model("smollm2"))
    load(core, "a", file)
    heard = answer(core, ask("a", prompt, 6, adapter=digest(core, "a")), ask("base", prompt, 6))
    assert (heard.ids("a"), heard.ids("base")) == (wanted, base)
    assert wanted != base


# --- files ----------------------------------------------------------------------------------------------------------


def renamed(source: Path, folder: Path, rename: Mapping[str, str], drop: Sequence[str] = ()) -> Path:
    """The tensors of an adapter under other names, without a configuration: alpha is in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, tensor in load_file(source / "adapter_model.safetensors").items():
        for old, new in rename.items():
            key = key.replace(old, new)
        if not any(part in key for part in drop):
            tensors[key] = tensor
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    return path


def test_fused_projections_of_serving_programs_are_split(llama: Setting, tmp_path: Path):
    core = llama.core()
    tensors = load_file(llama.files["a"] / "adapter_model.safetensors")
    fused = {}
    for layer in range(3):
        at = f"base_model.model.model.layers.{layer}"
        for fused_name, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            down = torch.cat([tensors[f"{at}.{part}.lora_A.weight"] for part in parts])
            up = torch.block_diag(*[tensors[f"{at}.{part}.lora_B.weight"] for part in parts])
            fused[f"model.layers.{layer}.{fused_name}.lora_A.weight"] = down
            fused[f"model.layers.{layer}.{fused_name}.lora_B.weight"] = up * 4.0  # alpha / rank of the file
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            fused[f"layers.{layer}.{part}.lora_A.weight"] = tensors[f"{at}.{part}.lora_A.weight"]
            fused[f"layers.{layer}.{part}.lora_B.weight"] = tensors[f"{at}.{part}.lora_B.weight"] * 4.0
    save_file(fused, tmp_path / "fused.safetensors")
    load(core, "fused", tmp_path / "fused.safetensors")
    heard = answer(core, ask("x", PROMPTS[0], TOKENS, adapter=digest(core, "fused")))
    assert heard.ids("x") == llama.said["a"][0]


def test_what_cannot_run_beside_the_weights_is_refused_when_it_is_loaded(llama: Setting, tmp_path: Path):
    core, theirs = llama.core("a"), reference(llama.folder)
    before = core.adapters.state
    dora = write_peft(theirs, tmp_path / "dora", seed=1, use_dora=True)
    with pytest.raises(AdapterMergeOnly, match="DoRA"):
        load(core, "dora", dora)
    head = write_peft(theirs, tmp_path / "head", seed=1, targets=["lm_head"])
    with pytest.raises(AdapterError, match="lm_head"):
        load(core, "head", head)
    hidden = llama.model.config.hidden
    save_file({"model.layers.0.mlp.up_proj.diff": torch.ones(hidden, 96)}, tmp_path / "whole.safetensors")
    with pytest.raises(AdapterMergeOnly, match="whole"):
        load(core, "whole", tmp_path / "whole.safetensors")
    up = "model.layers.0.mlp.up_proj"
    save_file(
        {f"{up}.lora_A.weight": torch.ones(2, 97), f"{up}.lora_B.weight": torch.ones(hidden, 2)},
        tmp_path / "wrong.safetensors",
    )
    with pytest.raises(AdapterMismatch, match="97"):
        load(core, "wrong", tmp_path / "wrong.safetensors")
    with pytest.raises(AdapterMismatch):
        load(core, "other", renamed(llama.files["a"], tmp_path / "other", {"self_attn": "attn"}))
    huge = {f"{up}.lora_A.weight": torch.ones(2, 96), f"{up}.lora_B.weight": torch.full((hidden, 2), 3e38)}
    save_file({**huge, f"{up}.alpha": torch.tensor(4.0)}, tmp_path / "huge.safetensors")
    with pytest.raises(AdapterError, match="overflow"):
        load(core, "huge", tmp_path / "huge.safetensors")
    assert core.adapters.state == before
    assert answer(core, ask("x", PROMPTS[0], TOKENS)).ids("x") == llama.said[None][0]


def test_limits_hold_and_a_swap_makes_room(llama: Setting):
    core = llama.core("a", max_loaded_loras=1)
    with pytest.raises(AdapterLimit, match="--max-loaded-loras"):
        load(core, "b", llama.files["b"])
    load(core, "b", llama.files["b"], "a")
    assert [info.nickname for info in core.adapters.state.loaded] == ["b"]
    with pytest.raises(AdapterNotFound, match="'a'"):
        core.adapters.change(SwapLoras(unload=("a",)))


def test_a_new_core_has_the_adapters_of_the_one_before_and_tells_of_those_that_are_gone(llama: Setting, tmp_path: Path):
    import shutil

    core = llama.core("a")
    shutil.copytree(llama.files["b"], tmp_path / "b")
    lost = load(core, "b", tmp_path / "b")
    state = core.adapters.state
    shutil.rmtree(tmp_path / "b")
    fresh = llama.core()
    fresh.adapters.change(RestoreLora(state=state))
    assert fresh.adapters.state.loaded == state.loaded
    heard = answer(
        fresh,
        ask("a", PROMPTS[0], TOKENS, adapter=digest(core, "a")),
        ask("b", PROMPTS[0], TOKENS, adapter=lost),
    )
    assert heard.ids("a") == llama.said["a"][0]
    assert heard.failed["b"].code == "adapter_unavailable"
    load(fresh, "b", llama.files["b"])
    assert not fresh.adapters.state.missing
    assert answer(fresh, ask("b", PROMPTS[0], TOKENS, adapter=lost)).ids("b") == llama.said["b"][0]


def test_sleep_and_wake_keep_the_adapters(llama: Setting):
    core = open_core(llama.folder)  # with a model of its own
    load(core, "a", llama.files["a"])
    before = answer(core, ask("1", PROMPTS[0], TOKENS, adapter=digest(core, "a"))).ids("1")
    core.sleep()
    assert core.adapters.nbytes == 0
    core.wake()
    assert answer(core, ask("2", PROMPTS[0], TOKENS, adapter=digest(core, "a"))).ids("2") == before


def test_a_source_says_which_file(llama: Setting):
    source = make_source("a", str(llama.files["a"]), None)
    assert source == AdapterSource(nickname="a", path=str(llama.files["a"] / "adapter_model.safetensors"))
