"""The compiled kernels are there whatever surrounds them, and where they cannot be, torch computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multimodal_gen.kernels import native
from multimodal_gen.kernels.group_norm_silu import group_norm_silu
from multimodal_gen.kernels.qk_norm_rope import qk_norm_rope_, reference_
from multimodal_gen.kernels.sampling import best

pytestmark = [pytest.mark.kernels]
ROOT = Path(__file__).parents[2]
SAYS = "from multimodal_gen.kernels import native; print(native.unavailable() or 'there')"


def says(program: str = SAYS, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 100, "env": {**os.environ, **variables}},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("exit 1", "compiles nothing for torch's threads"), ("echo error: no >&2; exit 3", "error: no")],
)
def test_a_compiler_that_fails_is_told_and_torch_computes(tmp_path: Path, compiler: str, words: str) -> None:
    said = says(CXX=script(tmp_path / "cxx", compiler), XDG_CACHE_HOME=str(tmp_path))
    if native.usable_cores() > 1:
        assert words in said


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in says(CXX=str(tmp_path / "none"))


def test_a_library_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    if native.unavailable():
        pytest.skip(native.unavailable())
    target = tmp_path / "multimodal_gen" / "kernels" / native.build().name
    target.parent.mkdir(mode=0o700, parents=True)
    target.write_bytes(b"\x7fELF")
    # What stands behind the compiler here is the library that exists already: making it is not what is tested.
    made = "import shutil; from multimodal_gen.kernels import native as n; n._compile = lambda c, w: "
    made += f"__import__('pathlib').Path(shutil.copy({str(native.build())!r}, w)); print(n.unavailable() or 'there')"
    assert says(made, XDG_CACHE_HOME=str(tmp_path)) == "there"
    assert target.read_bytes() == native.build().read_bytes()


def test_sources_can_be_compiled_together_in_any_number_of_units(tmp_path: Path) -> None:
    """No name in one means another thing in another: how many share a unit depends on the machine's cores."""
    if native.unavailable():
        pytest.skip(native.unavailable())
    (everything,) = native._units(1)
    assert sorted(source for unit in native._units(4) for source in unit) == everything
    for at, sources in enumerate((everything, everything[::-1])):
        unit = tmp_path / f"{at}.cpp"
        unit.write_text("".join(f'#include "{source.name}"\n' for source in sources))
        command = [native._compiler(), *native.FLAGS, "-fsyntax-only", "-I", str(native.SOURCES), str(unit)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "multimodal_gen" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    (tmp_path / "tmp").mkdir()
    found = says(
        "from multimodal_gen.kernels import native; print(native._folder())",
        **{"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")},
    )
    assert found == str(tmp_path / "tmp" / f"mmgen-kernels-{os.getuid()}")


def test_memory_for_kernels_does_not_follow_torchs_defaults() -> None:
    """Another thread may be making a model of another dtype at the moment, or the caller may have chosen a device."""
    x, logits = torch.randn(8, 8, 64), torch.randn(4, 1000)
    weight, bias = torch.randn(64), torch.randn(64)
    wanted, tokens = group_norm_silu(x, weight, bias, 8, 1e-6), best(logits)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found, same = group_norm_silu(x, weight, bias, 8, 1e-6), best(logits)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted)
    assert torch.equal(same[0], tokens[0])
    assert torch.equal(same[1], tokens[1])


def test_one_head_of_many_on_this_rank_is_normalised_with_the_others() -> None:
    x, weight, square = torch.randn(5, 2, 1, 16), torch.randn(2, 16), torch.rand(5, 2) + 0.5
    wanted = (x[:, :, 0] * (square + 1e-6).rsqrt()[..., None] * weight)[:, :, None]
    for compute in (qk_norm_rope_, reference_):
        torch.testing.assert_close(compute(x.clone(), weight, None, 1e-6, mean_square=square), wanted)
