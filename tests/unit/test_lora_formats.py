"""Adapter files of every program and kind: names that real files have, and numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from multimodal_gen.errors import AdapterError, AdapterMismatch, CorruptAdapter
from multimodal_gen.lora.adapter import Adapter
from multimodal_gen.lora.bind import Bound, Spellings, bind
from multimodal_gen.lora.file import AdapterFile, read_adapter
from multimodal_gen.lora.formats.registry import parse
from multimodal_gen.lora.names import TreeLayout
from multimodal_gen.pipelines.zimage.spec import SPEC
from multimodal_gen.weights.header import read_header
from multimodal_gen.weights.hub import ASSETS
from tests.support.adapters import write_adapter

pytestmark = [pytest.mark.unit]

KEYS = Path(__file__).parents[1] / "fixtures" / "lora_keys"
FILES = {"transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
TREES = {
    target.tree: Spellings(
        TreeLayout(
            target,
            {
                name.removeprefix("model."): info.shape
                for name, info in read_header(ASSETS / "emoji-image" / target.folder / FILES[target.tree], "").items()
            },
        )
    )
    for target in SPEC.adapters
}
SHAPES = {tree: spellings.layout.shapes for tree, spellings in TREES.items()}
Q = "layers.0.attention.to_q"
RANK = 3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(
    tensors: dict[str, Tensor], tmp_path: Path, *, partial: bool = False, alpha: float | None = None, **meta: str
) -> Bound:
    file = read_adapter(write_adapter(tmp_path / "a.safetensors", tensors, meta or None), 1 << 30)
    return bind(parse(file, alpha), TREES, allow_partial=partial, name=file.name)


def delta(adapter: Adapter, name: str, tree: str = "transformer", base: Tensor | None = None) -> Tensor:
    """The dense change of one weight at strength 1."""
    (update,) = adapter.trees[tree][name]
    shape = SHAPES[tree][name]
    assert update.shape == shape
    base = torch.zeros(shape) if base is None else base
    total = torch.zeros(shape)
    for start in range(0, shape[0], 100):  # in blocks, as merging does it
        rows = slice(start, min(start + 100, shape[0]))
        update.on(torch.device("cpu")).add_(total[rows], base[rows], rows, 1.0)
    return total


def of_keys(keys: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors for a list of real keys, and what they add up to: canonical weight → Δ."""
    tensors: dict[str, Tensor] = {}
    for key in keys:
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(1.5)
    wanted: dict[str, Tensor] = {}
    downs = [key for key in keys if "lora_A" in key or "down.weight" in key]
    for number, key in enumerate(downs):
        up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up").replace("lora.down", "lora.up")
        assert up in keys
        module = key.partition(".lora_")[0].partition(".lora.")[0]
        tree, parts = canonical(module)
        heights = [SHAPES[tree][f"{part}.weight"][0] for part in parts]
        tensors[key] = numbers(RANK, SHAPES[tree][f"{parts[0]}.weight"][1], seed=number)
        tensors[up] = numbers(sum(heights), RANK, seed=1000 + number)
        scale = 1.5 / RANK if f"{module}.alpha" in keys else 1.0
        whole = scale * tensors[up] @ tensors[key]
        for part, rows in zip(parts, whole.split(heights), strict=True):
            wanted[f"{tree}/{part}.weight"] = rows
    return tensors, wanted


def canonical(module: str) -> tuple[str, tuple[str, ...]]:
    """The meaning of a real file's module, by another way than the code's: undo every program's habits by hand."""
    prefixes = (
        "transformer.",
        "diffusion_model.",
        "base_model.model.",
        "lora_unet_",
        "lora_te_",
        "text_encoder.model.",
    )
    tree = "text_encoder" if module.startswith(("text_encoder", "lora_te_")) else "transformer"
    module = module.removeprefix("text_encoders.qwen3_4b.transformer.model.")
    for prefix in prefixes:
        module = module.removeprefix(prefix)
    flat = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in SHAPES[tree]}
    module = flat.get(module, module)
    for fused, plain in {"to.q": "to_q", "to.k": "to_k", "to.v": "to_v", "attention_": "attention."}.items():
        module = module.replace(fused, plain)
    if module.endswith("qkv"):
        start = module.removesuffix("qkv").replace("layers_5_", "layers.5.")
        return tree, tuple(f"{start}to_{x}" for x in "qkv")
    if module.endswith("attention.out"):
        module = module.removesuffix("out").replace("layers_5_", "layers.5.") + "to_out.0"
    for short, long in {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}.items():
        if module.startswith(short):
            module = long + module.removeprefix(short)
    return tree, (module,)


@pytest.mark.parametrize("fixture", sorted(KEYS.glob("*.txt")), ids=lambda path: path.stem)
def test_real_key_names(fixture: Path, tmp_path: Path) -> None:
    keys = [line for line in fixture.read_text().splitlines() if not line.startswith("#")]
    tensors, wanted = of_keys(keys)
    bound = load(tensors, tmp_path)
    assert not bound.skipped
    got = {
        f"{tree}/{name}": delta(bound.adapter, name, tree)
        for tree, found in bound.adapter.trees.items()
        for name in found
    }
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert torch.allclose(got[name], want, rtol=1e-5, atol=1e-5), name


def lora(module: str = Q, rank: int = RANK, prefix: str = "transformer.", seed: int = 0) -> dict[str, Tensor]:
    out, width = SHAPES["transformer"][f"{module}.weight"]
    return {
        f"{prefix}{module}.lora_A.weight": numbers(rank, width, seed=seed),
        f"{prefix}{module}.lora_B.weight": numbers(out, rank, seed=seed + 1),
    }


def product(tensors: dict[str, Tensor]) -> Tensor:
    down, up = tensors.values()
    return up @ down


def test_a_fused_module_beside_its_parts_counts_once(tmp_path: Path) -> None:
    """Anime-Z files say the same twice; a file whose two versions differ is refused."""
    parts = {x: lora(f"layers.0.attention.to_{x}", seed=ord(x)) for x in "qkv"}
    width = SHAPES["transformer"]["layers.0.attention.to_q.weight"][1]
    tensors = {key: tensor for part in parts.values() for key, tensor in part.items()}
    fused_down = torch.cat([next(iter(part.values())) for part in parts.values()])
    fused_up = torch.block_diag(*(list(part.values())[1] for part in parts.values()))
    same = {
        "transformer.layers.0.attention.qkv.lora_A.weight": fused_down,
        "transformer.layers.0.attention.qkv.lora_B.weight": fused_up,
    }
    bound = load({**tensors, **same}, tmp_path)
    for x, part in parts.items():
        assert torch.allclose(delta(bound.adapter, f"layers.0.attention.to_{x}.weight"), product(part), atol=1e-4)
    other = {**same, "transformer.layers.0.attention.qkv.lora_A.weight": numbers(3 * RANK, width, seed=99)}
    with pytest.raises(AdapterMismatch, match="each in its own way"):
        load({**tensors, **other}, tmp_path)


@pytest.mark.parametrize(
    ("metadata", "config", "scale"),
    [
        ({}, {}, 1.0),
        ({"ss_network_alpha": "1.5"}, {}, 0.5),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6})}, {}, 2.0),
        (
            {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.use_rslora": True})},
            {},
            6 / 3**0.5,
        ),
        ({}, {"peft_type": "LORA", "lora_alpha": 4.5}, 1.5),
        ({}, {"lora_alpha": 4.5, "alpha_pattern": {"to_q": 1.2}}, 0.4),
        ({}, {"lora_alpha": 4.5, "alpha_pattern": {"to_k": 1.2}}, 1.5),
        ({}, {"lora_alpha": 4.5, "alpha_pattern": {r"^layers\.0\.attention\.to_q": 0.6}}, 0.2),
    ],
    ids=str,
)
def test_the_scale_comes_from_where_the_file_keeps_it(
    tmp_path: Path, metadata: dict[str, str], config: dict[str, object], scale: float
) -> None:
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = lora()
    bound = load(tensors, tmp_path, **metadata)
    assert torch.allclose(delta(bound.adapter, f"{Q}.weight"), scale * product(tensors), atol=1e-5)
    own = load({**tensors, f"transformer.{Q}.alpha": torch.tensor(0.75)}, tmp_path, **metadata)
    if "use_rslora" not in str(metadata):
        assert torch.allclose(delta(own.adapter, f"{Q}.weight"), 0.25 * product(tensors), atol=1e-5)
    forced = load(tensors, tmp_path, alpha=0.3, **metadata)
    if "use_rslora" not in str(metadata):
        assert torch.allclose(delta(forced.adapter, f"{Q}.weight"), 0.1 * product(tensors), atol=1e-5)


def test_bias_of_lora_b_is_scaled_as_its_product(tmp_path: Path) -> None:
    module = "cap_embedder.1"
    tensors = lora(module)
    out = SHAPES["transformer"][f"{module}.bias"][0]
    extra = {f"transformer.{module}.lora_B.bias": numbers(out), f"transformer.{module}.alpha": torch.tensor(6.0)}
    bound = load({**tensors, **extra}, tmp_path)
    assert torch.allclose(delta(bound.adapter, f"{module}.bias"), 2 * numbers(out))
    assert bound.modules == {"transformer": 1}
    with pytest.raises(AdapterMismatch, match="has no bias"):
        load({**lora(), f"transformer.{Q}.lora_B.bias": numbers(320)}, tmp_path)


def test_whole_differences(tmp_path: Path) -> None:
    shape = SHAPES["transformer"][f"{Q}.weight"]
    norm = "layers.0.attention_norm1"
    tensors = {
        f"diffusion_model.{Q}.diff": numbers(*shape),
        f"diffusion_model.{norm}.diff": numbers(320, seed=1),
        "diffusion_model.cap_embedder.1.diff_b": numbers(320, seed=2),
        f"diffusion_model.{norm.replace('norm1', 'norm2')}.w_norm": numbers(320, seed=3),
    }
    adapter = load(tensors, tmp_path).adapter
    assert torch.equal(delta(adapter, f"{Q}.weight"), numbers(*shape))
    assert torch.equal(delta(adapter, f"{norm}.weight"), numbers(320, seed=1))
    assert torch.equal(delta(adapter, "cap_embedder.1.bias"), numbers(320, seed=2))
    assert torch.equal(delta(adapter, "layers.0.attention_norm2.weight"), numbers(320, seed=3))
    assert ".diff" in adapter.merge_only()


def test_loha(tmp_path: Path) -> None:
    out, width = SHAPES["transformer"][f"{Q}.weight"]
    name = f"lycoris_{Q.replace('.', '_')}"
    parts = {
        f"{name}.hada_w1_a": numbers(out, RANK, seed=1),
        f"{name}.hada_w1_b": numbers(RANK, width, seed=2),
        f"{name}.hada_w2_a": numbers(out, RANK, seed=3),
        f"{name}.hada_w2_b": numbers(RANK, width, seed=4),
    }
    a1, b1, a2, b2 = parts.values()
    adapter = load({**parts, f"{name}.alpha": torch.tensor(1.5)}, tmp_path).adapter
    assert torch.allclose(delta(adapter, f"{Q}.weight"), 0.5 * (a1 @ b1) * (a2 @ b2), atol=1e-4)
    assert "LoHa" in adapter.merge_only()


@pytest.mark.parametrize("whole", ["both", "outer", "neither"])
def test_lokr(tmp_path: Path, whole: str) -> None:
    out, width = SHAPES["transformer"][f"{Q}.weight"]
    name = f"lycoris_{Q.replace('.', '_')}"
    outer, inner = numbers(8, 10, seed=1), numbers(out // 8, width // 10, seed=2)
    a, b = numbers(out // 8, RANK, seed=3), numbers(RANK, width // 10, seed=4)
    c, d = numbers(8, 2, seed=5), numbers(2, 10, seed=6)
    tensors = {
        "both": {"lokr_w1": outer, "lokr_w2": inner},
        "outer": {"lokr_w1": outer, "lokr_w2_a": a, "lokr_w2_b": b},
        "neither": {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b},
    }[whole]
    want = {
        "both": torch.kron(outer, inner),  # no rank: alpha has nothing to be divided by
        "outer": 0.5 * torch.kron(outer, a @ b),
        "neither": 0.5 * torch.kron(c @ d, a @ b),
    }[whole]
    given = {f"{name}.{role}": tensor for role, tensor in tensors.items()}
    adapter = load({**given, f"{name}.alpha": torch.tensor(1.5)}, tmp_path).adapter
    assert torch.allclose(delta(adapter, f"{Q}.weight"), want, atol=1e-4)
    assert "LoKr" in adapter.merge_only()


def test_lokr_of_a_fused_layer_is_shared_out_by_rows(tmp_path: Path) -> None:
    out, width = SHAPES["transformer"][f"{Q}.weight"]
    outer, inner = numbers(6, 10, seed=1), numbers(3 * out // 6, width // 10, seed=2)
    name = "lora_unet_layers_0_attention_qkv"
    adapter = load({f"{name}.lokr_w1": outer, f"{name}.lokr_w2": inner}, tmp_path).adapter
    for x, want in zip("qkv", torch.kron(outer, inner).chunk(3), strict=True):
        assert torch.allclose(delta(adapter, f"layers.0.attention.to_{x}.weight"), want, atol=1e-5)


@pytest.mark.parametrize("ending", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora(tmp_path: Path, ending: str) -> None:
    """W = m · V / ‖V‖, rows normed (Liu et al., 2024, eq. 5)."""
    tensors, shape = lora(), SHAPES["transformer"][f"{Q}.weight"]
    magnitude, base = numbers(shape[0], seed=7).abs() + 0.5, numbers(*shape, seed=8)
    stored = magnitude[:, None] if ending == "dora_scale" else magnitude
    adapter = load({**tensors, f"transformer.{Q}.{ending}": stored}, tmp_path).adapter
    v = base + product(tensors)
    want = magnitude[:, None] * v / v.norm(dim=1, keepdim=True) - base
    assert torch.allclose(delta(adapter, f"{Q}.weight", base=base), want, atol=1e-4)
    assert "DoRA" in adapter.merge_only()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_layers_0_attention_to_q.lora_mid.weight": numbers(2, 2)}, "Tucker decomposition"),
        ({f"base_model.model.{Q}.modules_to_save.weight": numbers(2)}, "whole weight"),
        ({"base_model.model.embed.lora_embedding_A": numbers(2, 2)}, "an embedding"),
        ({f"transformer.{Q}.mystery": numbers(2)}, "not a known kind"),
        ({f"transformer.{Q}.alpha": torch.tensor(1.0)}, "an alpha without factors"),
        (
            lora("layers.0.attention.to_q")
            | {
                "transformer.layers.99.attention.to_q.lora_A.weight": numbers(3, 320),
                "transformer.layers.99.attention.to_q.lora_B.weight": numbers(320, 3),
            },
            "1 of 2 modules have no place",
        ),
        ({"unet.down.lora_A.weight": numbers(3, 4), "unet.down.lora_B.weight": numbers(4, 3)}, "fits no module"),
        (
            {f"transformer.{Q}.lora_A.weight": numbers(3, 64), f"transformer.{Q}.lora_B.weight": numbers(320, 3)},
            r"shape \[320, 64\]",
        ),
    ],
    ids=["tucker", "modules_to_save", "embedding", "unknown", "lone alpha", "partly", "nothing", "shape"],
)
def test_what_has_no_place_is_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterMismatch, match=message):
        load(tensors, tmp_path)


def test_the_rest_of_a_partly_fitting_file_can_be_asked_for(tmp_path: Path) -> None:
    foreign = {"transformer.nowhere.lora_A.weight": numbers(3, 4), "transformer.nowhere.lora_B.weight": numbers(4, 3)}
    bound = load({**lora(), **foreign}, tmp_path, partial=True)
    assert bound.skipped == ("transformer.nowhere",)
    assert list(bound.adapter.trees["transformer"]) == [f"{Q}.weight"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({f"transformer.{Q}.lora_B.weight": numbers(320, 4)}, CorruptAdapter, "ranks 3 and 4"),
        ({f"transformer.{Q}.lora_B.weight": None}, CorruptAdapter, "lacks its tensor 'up'"),
        ({f"transformer.{Q}.lora_A.weight": torch.ones(3, 320, dtype=torch.int64)}, CorruptAdapter, "matrix of floats"),
        ({f"transformer.{Q}.lora_A.weight": numbers(3)}, CorruptAdapter, "must be a matrix"),
        ({f"transformer.{Q}.alpha": numbers(2)}, CorruptAdapter, "alpha of .* has 2 numbers"),
        ({f"transformer.{Q}.lora_A.default.weight": numbers(3, 320)}, CorruptAdapter, "two tensors for one role"),
        ({f"transformer.{Q}.dora_scale": numbers(1, 320)}, AdapterError, "along inputs"),
    ],
    ids=["ranks", "missing", "integers", "vector", "alpha", "twice", "dora"],
)
def test_broken_modules_are_named(
    tmp_path: Path, change: dict[str, Tensor | None], error: type[Exception], message: str
) -> None:
    tensors = {name: tensor for name, tensor in {**lora(), **change}.items() if tensor is not None}
    with pytest.raises(error, match=message):
        load(tensors, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VERA"}, "VERA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "no plain module name"),
        ({"alpha_pattern": 5}, "alpha_pattern must map"),
        ({"lora_alpha": "many"}, "no number between"),
        ({"lora_alpha": 10**400}, "no number between"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_configurations_that_cannot_be_honoured(tmp_path: Path, config: dict[str, object], message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        load(lora(), tmp_path)


def test_a_stranger_without_tensors_is_an_adapter_file_too() -> None:
    empty = AdapterFile("a", {}, {}, {}, "", "", 0)
    with pytest.raises(AdapterMismatch, match="holds no adapter"):
        bind(parse(empty), TREES, allow_partial=True, name="a")


def test_peft_lokr_divides_by_the_rank_that_was_asked_for(tmp_path: Path) -> None:
    out, width = SHAPES["transformer"][f"{Q}.weight"]
    outer, inner = numbers(8, 10, seed=1), numbers(out // 8, width // 10, seed=2)
    tensors = {f"base_model.model.{Q}.lokr_w1": outer, f"base_model.model.{Q}.lokr_w2": inner}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 64, "alpha": 8}))
    adapter = load(tensors, tmp_path).adapter
    assert torch.allclose(delta(adapter, f"{Q}.weight"), 8 / 64 * torch.kron(outer, inner), atol=1e-5)


def test_a_small_file_cannot_ask_for_a_large_matrix(tmp_path: Path) -> None:
    """The shape is checked before a factor is multiplied out: 40 GB here."""
    name = f"lycoris_{Q.replace('.', '_')}"
    tensors = {
        f"{name}.lokr_w1": numbers(1, 1),
        f"{name}.lokr_w2_a": numbers(10**5, 1),
        f"{name}.lokr_w2_b": numbers(1, 10**5),
    }
    with pytest.raises(AdapterMismatch, match="shape"):
        load(tensors, tmp_path)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_length_that_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    tensors = lora()
    path = write_adapter(tmp_path / "a.safetensors", tensors, {"pad": ""})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = (
        data[8 : 8 + size]
        .rstrip()
        .replace(b'"pad":""', b'"pad":"' + b"x" * (length - len(data[8 : 8 + size].rstrip())) + b'"')
    )
    assert len(header) == length
    path.write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    assert read_adapter(path, 1 << 30).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("key", ["\ud800x", "a\nb", "k" * 600])
def test_names_that_cannot_be_told_are_refused(tmp_path: Path, key: str) -> None:
    header = json.dumps({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CorruptAdapter, match="names a tensor"):
        read_adapter(path, 1 << 30)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": [], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**3000, 10**3000], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        [],
    ],
    ids=["dtype", "giant", "dimensions", "word", "negative", "list"],
)
def test_hostile_headers(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CorruptAdapter):
        read_adapter(path, 1 << 30)


def test_numbers_beyond_float32_are_refused(tmp_path: Path) -> None:
    path = write_adapter(
        tmp_path / "a.safetensors", {"x.lora_A.weight": torch.full((2, 2), 1e300, dtype=torch.float64)}
    )
    with pytest.raises(CorruptAdapter, match="NaN or infinity"):
        read_adapter(path, 1 << 30)


def test_a_configuration_belongs_to_one_file(tmp_path: Path) -> None:
    """In a folder of several adapters nobody knows whose it is; peft's own file name says so."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    tensors = lora()
    write_adapter(tmp_path / "other.safetensors", tensors)
    assert torch.allclose(delta(load(tensors, tmp_path).adapter, f"{Q}.weight"), product(tensors), atol=1e-5)
    file = read_adapter(write_adapter(tmp_path / "adapter_model.safetensors", tensors), 1 << 30)
    bound = bind(parse(file), TREES, allow_partial=False, name="a")
    assert torch.allclose(delta(bound.adapter, f"{Q}.weight"), 2 * product(tensors), atol=1e-5)
