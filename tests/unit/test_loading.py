"""Weights reach their places, and whatever is wrong with them is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from multimodal_gen.errors import ConfigError, CorruptModel
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.nn.norm import AcrossHeadsRMSNorm
from multimodal_gen.parallel.group import Group
from multimodal_gen.parallel.tensor import COLUMN, HEADS, ROW, Rule, shard
from multimodal_gen.weights.loading import Rename, allocate, construction
from tests.support.weights import load_weights

pytestmark = [pytest.mark.unit]

RENAMES = (Rename(r"(.*)to_(q|k)\.weight", r"\1qk.weight", r"\2"), Rename(r"out\.0\.(\w+)", r"out.\1"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk = FusedLinear(4, {"q": 3, "k": 3}, multiple=8)
        self.out = Linear(4, 4, bias=True, stored_in=6)
        self.scale = nn.Parameter(torch.zeros(4))


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"to_q.weight": (3, 4), "to_k.weight": (3, 4), "out.0.weight": (4, 4), "out.0.bias": (4,), "scale": (4,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def load(tmp_path, *shards: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Model:
    files = []
    for number, part in enumerate(shards):
        files.append(tmp_path / f"shard-{number}.safetensors")
        save_file(part, files[-1])
    with construction(torch.device("cpu"), dtype):
        model = Model()
    load_weights(model, files, RENAMES, ignored=(r"unused\..*",))
    return model


def test_tensors_of_several_shards_reach_their_places(tmp_path):
    given = tensors()
    names = list(given)
    first, second = {n: given[n] for n in names[:2]}, {n: given[n] for n in names[2:]}
    model = load(tmp_path, first, {**second, "unused.thing": torch.zeros(1)})
    assert torch.equal(model.qk.slot("q"), given["to_q.weight"])
    assert torch.equal(model.qk.slot("k"), given["to_k.weight"])
    assert torch.equal(model.out.weight[:, :4], given["out.0.weight"])
    assert model.out.weight[:, 4:].abs().max() == 0
    assert torch.equal(model.scale, given["scale"])


def test_weights_are_cast_on_the_way(tmp_path):
    model = load(tmp_path, tensors(), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.scale, tensors()["scale"].bfloat16())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("to_k.weight"), "1 tensors are missing.*'qk.weight'"),
        (lambda t: t.update(stranger=torch.zeros(2)), "'stranger' has no place in Model"),
        (lambda t: t.update(scale=torch.zeros(5)), r"'scale' has shape \(5,\).*\(4,\)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    given = tensors()
    change(given)
    with pytest.raises(CorruptModel, match=message):
        load(tmp_path, given)


def test_a_tensor_that_comes_twice_is_named(tmp_path):
    with pytest.raises(CorruptModel, match=r"'scale' is doubled"):
        load(tmp_path, tensors(), {"scale": torch.zeros(4)})


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CorruptModel, match=r"cut\.safetensors is truncated|cut\.safetensors"):
        load_weights(Model(), [tmp_path / "cut.safetensors"], RENAMES)


# --- shares of several ranks ----------------------------------------------------------------------------------------


class Pretended(Group):
    """A rank of a group that is not there: loading needs no communication."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(0, 1, None, torch.device("cpu"))
        self.rank, self.size = rank, size


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk = FusedLinear(4, {"q": 6, "k": 12}, multiple=16)
        self.up = Linear(4, 12, bias=True)
        self.down = Linear(12, 4, bias=True, stored_in=16)
        self.norm = AcrossHeadsRMSNorm(("q", "k"), 12, 1e-6)
        self.foreign = nn.Linear(4, 12)
        self.entries, self.widths = nn.Embedding(12, 4), nn.Embedding(4, 12)
        self.scale = nn.Parameter(torch.zeros(4))


TABLE = (
    Rule("qk", COLUMN),
    Rule("up", COLUMN),
    Rule("down", ROW),
    Rule("norm", HEADS),
    Rule("foreign", COLUMN),
    Rule("entries", ROW),
    Rule("widths", COLUMN),
)
SHARED_RENAMES = (*RENAMES, Rename(r"norm_(q|k)\.weight", "norm.weight", r"\1"))
SHAPES = {
    **{"to_q.weight": (6, 4), "to_k.weight": (12, 4), "up.weight": (12, 4), "up.bias": (12,), "down.weight": (4, 12)},
    **{"down.bias": (4,), "norm_q.weight": (12,), "norm_k.weight": (12,), "scale": (4,)},
    **{"foreign.weight": (12, 4), "foreign.bias": (12,), "entries.weight": (12, 4), "widths.weight": (4, 12)},
}
CUT_ALONG = {
    "down.weight": 1,
    "widths.weight": 1,
    "down.bias": None,
    "scale": None,
}  # the others along their first dimension


def shared(rank: int, size: int) -> Shared:
    with construction(torch.device("meta"), torch.float32):
        model = Shared()
    shard(model, TABLE, Pretended(rank, size))
    allocate(model, torch.device("cpu"))
    return model


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(given, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", given


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_together_hold_every_number_once(checkpoint, size):
    file, given = checkpoint
    models = [shared(rank, size) for rank in range(size)]
    trees = [load_weights(model, [file], SHARED_RENAMES) for model in models]
    for key, whole in given.items():
        held = [tree.places[key].view() for tree in trees]
        along = CUT_ALONG.get(key, 0)
        if along is None or size == 1:
            assert all(torch.equal(view, whole) for view in held)
        else:
            assert all(view.shape[along] == whole.shape[along] // size for view in held)
            assert torch.equal(torch.cat(held, dim=along), whole)
        assert trees[0].places[key].shape == whole.shape
    for model in models:
        assert float(model.qk.weight[6 // size : 16].abs().max()) == 0  # padding up to the next multiple
        assert float(model.down.weight[:, 12 // size :].abs().max()) == 0
    assert trees[0].parameters == sum(tensor.numel() for tensor in given.values())


def test_only_the_share_is_read_from_the_file(checkpoint):
    file, _ = checkpoint
    tree = load_weights(shared(1, 3), [file], SHARED_RENAMES)
    whole = [key for key in SHAPES if CUT_ALONG.get(key, 0) is None]
    assert {key for key, tensor in tree.read(SHAPES) if tensor.shape == SHAPES[key]} == set(whole)
    assert {key for key, tensor in tree.read(SHAPES, set(SHAPES)) if tensor.shape == SHAPES[key]} == set(SHAPES)


def test_a_wrong_shape_is_told_whole(checkpoint, tmp_path):
    _, given = checkpoint
    for key, wrong in (("up.weight", (10, 4)), ("down.weight", (4, 14)), ("to_k.weight", (6, 4))):
        save_file({**given, key: torch.zeros(wrong)}, tmp_path / "wrong.safetensors")
        with pytest.raises(CorruptModel) as caught:
            load_weights(shared(0, 2), [tmp_path / "wrong.safetensors"], SHARED_RENAMES)
        assert f"{key!r} has shape {wrong} and the model's configuration wants {SHAPES[key]}" in caught.value.message


def test_a_width_that_ranks_cannot_share_is_told_with_both_numbers():
    with pytest.raises(ConfigError, match=r"qk: a width of 6 cannot be shared out equally over --tp-size 4 ranks"):
        shared(0, 4)


def test_a_table_must_match_the_model():
    with construction(torch.device("meta"), torch.float32):
        model = Shared()
    with pytest.raises(AssertionError, match="'nothing' matches no layer of Shared"):
        shard(model, (Rule("nothing", ROW),), Pretended(0, 2))
    with pytest.raises(AssertionError, match="two rows of the table match up"):
        shard(model, (Rule("up", COLUMN), Rule("u.", ROW)), Pretended(0, 2))
    with pytest.raises(AssertionError, match="qk: fused layers are shared out by column"):
        shard(model, (Rule("qk", ROW),), Pretended(0, 2))
    with pytest.raises(AssertionError, match="Shared cannot be shared out"):
        shard(model, (Rule("", ROW),), Pretended(0, 2))
