"""What users write about adapters: lists that broadcast, paths that are allowed, flags, names of families."""

from __future__ import annotations

from pathlib import Path

import pytest

from multimodal_gen.adapters import AdapterUse, broadcast, read_uses
from multimodal_gen.errors import (
    AdapterMismatch,
    AdapterNotFound,
    InvalidValue,
    PathNotAllowed,
    UnknownParameter,
    UnsafeFormat,
)
from multimodal_gen.lora.names import fits
from multimodal_gen.lora.sources import parse_flag, resolve_path, server_roots, set_change
from multimodal_gen.pipelines.zimage.spec import TEXT_ENCODER, TRANSFORMER

pytestmark = [pytest.mark.unit]


def use(nickname: str, strength: float = 1.0, target: str = "all") -> AdapterUse:
    return AdapterUse(nickname=nickname, strength=strength, target=target)  # type: ignore[arg-type]


def test_scalars_broadcast_and_lists_pair_up():
    assert broadcast("a") == ((use("a"),), {})
    assert broadcast(["a", "b"], None, "transformer", 0.5) == (
        (use("a", 0.5, "transformer"), use("b", 0.5, "transformer")),
        {},
    )
    uses, files = broadcast(
        ["a", "b", "a"], ["x", None, None], ["all", "text_encoder", "all"], [1, 2, 3], [4.5, None, None]
    )
    assert uses == (use("a", 1.0), use("b", 2.0, "text_encoder"), use("a", 3.0))
    assert files == {"a": ("x", 4.5)}
    assert broadcast([]) == ((), {})


@pytest.mark.parametrize(
    ("arguments", "param", "words"),
    [
        ((["a", "b"], ["x"]), "lora_path", "1 values for 2"),
        ((["a"], "x", ["all", "all"]), "target", "2 values for 1"),
        ((["a", "b"], None, "all", [1.0]), "strength", "1 values for 2"),
        ((["a", "a"], ["x", "y"]), "lora_path", "twice"),
        (("a", 5), "lora_path", "string or null"),
        (("a", None, "all", float("nan")), "strength", "between"),
        (("a", None, "all", True), "strength", "a number"),
        (("a", None, "vae"), "target", "one of all"),
        (("a", None, "all", 1.0, 2.0), "lora_alpha", "lora_path"),
        (("a", "x", "all", 1.0, -1.0), "lora_alpha", "above 0"),
        (("a", "x", "all", 1.0, 10**400), "lora_alpha", "above 0"),
        (([], "x"), "lora_path", "name nothing"),
        (([], None, "bogus"), "target", "one of all"),
        (([], None, "all", "x"), "strength", "a number"),
        ((["a", "a"], ["x", None], "all", 1.0, [2.0, 3.0]), "lora_alpha", "lora_path"),
        ((["a"] * 33,), "lora_nickname", "33"),
        ((7,), "lora_nickname", "letters"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_what_does_not_pair_up_is_named(arguments, param, words):
    with pytest.raises(InvalidValue, match=words) as caught:
        broadcast(*arguments)
    assert caught.value.param == param


def test_lists_of_requests():
    assert read_uses([{"nickname": "a"}, {"nickname": "b", "strength": -2, "target": "transformer"}]) == (
        use("a"),
        use("b", -2.0, "transformer"),
    )
    assert read_uses([]) == ()
    with pytest.raises(UnknownParameter, match="Did you mean 'strength'"):
        read_uses([{"nickname": "a", "strenght": 1}])
    with pytest.raises(InvalidValue, match=r"loras\[1\]"):
        read_uses([{"nickname": "a"}, "b"])


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, ...]:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "one" / "a.safetensors").touch()
    (tmp_path / "two" / "sub" / "b.safetensors").touch()
    (tmp_path / "secret").touch()
    (tmp_path / "one" / "inside").symlink_to(tmp_path / "two" / "sub")
    (tmp_path / "one" / "outside").symlink_to(tmp_path)
    (tmp_path / "one" / "loop").symlink_to(tmp_path / "one" / "loop")
    return tmp_path / "one", tmp_path / "two"


def test_paths_inside_the_roots(roots: tuple[Path, ...], tmp_path: Path):
    one, two = roots
    assert resolve_path("a.safetensors", roots) == one / "a.safetensors"
    assert resolve_path("sub/b.safetensors", roots) == two / "sub" / "b.safetensors"
    assert resolve_path(str(one / "a.safetensors"), roots) == one / "a.safetensors"
    assert resolve_path("inside/b.safetensors", roots) == two / "sub" / "b.safetensors"
    assert resolve_path("sub/../a.safetensors", roots) == one / "a.safetensors"
    with pytest.raises(AdapterNotFound):
        resolve_path("none", roots)
    with pytest.raises((AdapterNotFound, PathNotAllowed)):
        resolve_path("loop", roots)
    assert resolve_path(str(tmp_path / "secret"), None) == tmp_path / "secret"


@pytest.mark.parametrize(
    "path", ["../secret", "outside/secret", "/etc/passwd", "sub/../../secret", "https://a/b", "\\\\a\\b", "~root/x"]
)
def test_paths_outside_are_refused_whether_they_exist_or_not(roots: tuple[Path, ...], path: str):
    for tail in ("", "-that-is-not-there"):
        with pytest.raises(PathNotAllowed, match="--lora-root"):
            resolve_path(path + tail, roots)


def test_folders_mean_the_one_file_inside(roots: tuple[Path, ...], tmp_path: Path):
    one, two = roots
    assert resolve_path("sub", (two,)) == two / "sub" / "b.safetensors"
    with pytest.raises(AdapterNotFound, match="no safetensors"):
        resolve_path("sub", (one,))
    (two / "sub" / "c.safetensors").touch()
    with pytest.raises(AdapterMismatch, match="holds 2 adapters"):
        resolve_path("sub", (two,))
    (two / "sub" / "adapter_model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(PathNotAllowed):
        resolve_path("sub", (two,))
    (one / "sub" / "adapter_model.bin").touch()
    with pytest.raises(UnsafeFormat):
        resolve_path("sub", (one,))
    # A link inside the roots keeps its name: adapter_config.json stands beside it (as in the hub's cache).
    (one / "sub" / "pytorch_lora_weights.safetensors").symlink_to(one / "a.safetensors")
    assert resolve_path("sub", (one,)) == one / "sub" / "pytorch_lora_weights.safetensors"


def test_roots_of_a_server():
    assert server_roots([]) == (Path("loras"),)
    assert server_roots(["/a", "b"]) == (Path("/a"), Path("b"))


@pytest.mark.parametrize(
    ("text", "wanted", "path"),
    [
        ("a=x.safetensors", use("a"), "x.safetensors"),
        ("a=x.safetensors:0.8", use("a", 0.8), "x.safetensors"),
        ("a=x:-1e-1:transformer", use("a", -0.1, "transformer"), "x"),
        ("a=x:text_encoder", use("a", 1.0, "text_encoder"), "x"),
        ("a=dir:with:colons/x.safetensors:2", use("a", 2.0), "dir:with:colons/x.safetensors"),
    ],
)
def test_flags(text: str, wanted: AdapterUse, path: str):
    flag = parse_flag(text)
    assert (flag.use, flag.path) == (wanted, path)
    assert (flag.alpha, flag.allow_partial) == (None, False)


@pytest.mark.parametrize(
    ("text", "alpha", "partial"),
    [
        ("a=x:0.5:transformer:alpha=16:partial", 16.0, True),
        ("a=x:0.5:transformer:alpha=1.5", 1.5, False),
        ("a=x:0.5:transformer:partial", None, True),
    ],
)
def test_flags_with_options(text: str, alpha: float | None, partial: bool):
    flag = parse_flag(text)
    assert (flag.use, flag.path) == (use("a", 0.5, "transformer"), "x")
    assert (flag.alpha, flag.allow_partial) == (alpha, partial)


@pytest.mark.parametrize(
    "text", ["a", "=x", "a=", "a=x:strong", "a=x:1000", "a=x:0.5:vae", "a b=x", "a=x:alpha=", "a=x:alpha=0"]
)
def test_flags_that_say_nothing_clear(text: str):
    with pytest.raises(InvalidValue):
        parse_flag(text)


def test_the_change_of_a_call(roots: tuple[Path, ...]):
    change = set_change("a", "a.safetensors", merge_mode=None, roots=roots, default_mode="dynamic", allow_partial=True)
    assert change.mode == "dynamic"
    assert change.sources[0].path == str(roots[0] / "a.safetensors")
    assert change.sources[0].allow_partial


def test_a_family_knows_its_adapters():
    modules = [
        ("layers.17.attention.to_q", False),
        ("layers_29_attention_qkv", True),
        ("noise_refiner.1.attention.out", False),
        ("x_embedder", False),
        ("t_embedder.mlp.2", False),
        ("context_refiner_1_feed_forward_w2", True),
    ]
    assert fits(TRANSFORMER, modules) == len(modules)
    assert fits(TEXT_ENCODER, modules) == 0
    assert fits(TEXT_ENCODER, [("model.layers.30.mlp.gate_proj", False), ("layers_3_self_attn_q_proj", True)]) == 2
    assert fits(TRANSFORMER, [("down_blocks.0.attentions.0", False)]) == 0
