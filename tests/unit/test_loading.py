"""Weights reach their places, and whatever is wrong with them is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from multimodal_gen.errors import CorruptModel
from multimodal_gen.nn.linear import FusedLinear, Linear
from multimodal_gen.weights.loading import Rename, construction, load_weights

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
    for number, shard in enumerate(shards):
        files.append(tmp_path / f"shard-{number}.safetensors")
        save_file(shard, files[-1])
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
