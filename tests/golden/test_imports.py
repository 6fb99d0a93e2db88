"""Who may import whom (docs/architecture.md), and which modules must come without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "multimodal_gen"
LINKED = ("kernels", "lora", "pipelines")  # rooms at the root of the repository, linked into the package

pytestmark = [pytest.mark.golden]

CONTRACT = {
    "adapters",
    "config",
    "cores",
    "environment",
    "errors",
    "messages",
    "offload",
    "request",
    "resolve",
    "settings",
}
CONTRACT |= {"cores", "step_cache", "text", "units", "version"}
_LAYERS = {"attention", "nn", "parallel", "weights"}
_MODELS = {"llm", "lora", "memory", "pipelines"} | _LAYERS | {"kernels"}
# Room → the rooms it may import besides itself and the contract modules.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"server", "generator", "llm_api", "engine", "media", "observe"} | _MODELS,
    "server": {"engine", "media", "observe"} | _MODELS,
    "llm_api": {"engine"} | _MODELS,
    "generator": {"engine", "media", "observe"} | _MODELS,
    "engine": {"media", "observe"} | _MODELS,
    "pipelines": _MODELS,
    "llm": _MODELS - {"pipelines"},
    "lora": _LAYERS | {"kernels", "memory"},
    "memory": _LAYERS | {"kernels"},
    **{room: _LAYERS | {"kernels"} for room in _LAYERS},
    "kernels": set(),
    "media": set(),
    "observe": set(),
    "assets": set(),
    **{room: set() for room in CONTRACT},
}
WHY = {
    "lora": "lora knows no family: put targets and renames into the family's spec.py and pass them in",
    "kernels": "a kernel stands alone: pass in what it needs",
    "media": "media turns pixels into files: pass in plain values or messages",
    "server": "the server reaches the engine through engine.client, its jobs and messages only",
    **dict.fromkeys(CONTRACT, "contract modules import one another only: move the code to the room that uses it"),
}
ENGINE_FOR_THE_SERVER = {
    f"multimodal_gen.engine.{module}"
    for module in ("cards", "client", "ticket", "jobs", "job_files", "job_runner", "text_loras")
}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft")
# `mmgen doctor` and `mmgen bench --roofline` import them when they run.
TORCH_ON_PURPOSE = {"multimodal_gen/cli/hardware.py", "multimodal_gen/cli/roofline_measured.py"}
NO_TORCH = {"cli", "server", "generator", "llm_api", "media", "observe", *CONTRACT}


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(path shown in messages, room, syntax tree) of every module of the package."""
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in LINKED]
    for room in LINKED:
        files += (ROOT / room).rglob("*.py")
    for file in sorted(files):
        base = PACKAGE if file.is_relative_to(PACKAGE) else ROOT
        shown = str(file.relative_to(ROOT))
        yield shown, file.relative_to(base).parts[0].removesuffix(".py"), ast.parse(file.read_text(), shown)


def imports(tree: ast.AST, *, at_import_time: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of the imports; `at_import_time` leaves out functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{name.name}" for name in node.names] if node.module.count(".") < 2 else []
            yield from ((node.lineno, name) for name in (whole or [node.module]))
        elif not (at_import_time and _deferred(node)):
            yield from imports(node, at_import_time=at_import_time)


def _deferred(node: ast.AST) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return True
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_rooms_import_only_to_their_right() -> None:
    wrong = []
    for shown, room, tree in modules():
        if room == "__init__":
            continue
        assert room in MAY_IMPORT, f"{shown}: add the room {room!r} to MAY_IMPORT and to docs/architecture.md"
        allowed = MAY_IMPORT[room] | CONTRACT | {room}
        for line, name in imports(tree):
            if not name.startswith("multimodal_gen."):
                continue
            other = name.split(".")[1]
            inside = room == "server" and other == "engine" and name not in ENGINE_FOR_THE_SERVER
            if inside or (other not in allowed and (PACKAGE / other).exists() | (PACKAGE / f"{other}.py").exists()):
                advice = WHY.get(
                    room, f"{room} may import {', '.join(sorted(MAY_IMPORT[room]))} and the contract modules"
                )
                wrong.append(f"{shown}:{line} imports {name}; {advice}")
    assert not wrong, "\n".join(wrong)


def test_the_front_never_imports_torch() -> None:
    wrong = [
        f"{shown}:{line} imports {name} when it is imported; move the import into the function that needs it"
        for shown, room, tree in modules()
        if room in NO_TORCH and shown not in TORCH_ON_PURPOSE
        for line, name in imports(tree, at_import_time=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import multimodal_gen, multimodal_gen.generator, multimodal_gen.cli.main",
        "import multimodal_gen.engine.client, multimodal_gen.server.app",
        "from multimodal_gen import LLM, DiffGenerator, GenerationResult, SamplingParams, TextOutput, TextParams",
        "from multimodal_gen.pipelines import registry\n"
        "from multimodal_gen.config import EngineConfig\n"
        "registry.describe(EngineConfig()), registry.families(), registry.fallback()",
        "from multimodal_gen.parallel.plan import plan\n"
        "from multimodal_gen.config import EngineConfig\n"
        "from multimodal_gen.pipelines import registry\n"
        "plan(EngineConfig(ring_degree=2), registry.describe(EngineConfig()))",
        "from multimodal_gen.memory.plan import Sizes, Wishes, plan\n"
        "plan([Sizes('transformer', 'denoise', 1, (1, 1))], Wishes(), {}, 100, 'cuda')",
        "from multimodal_gen.llm.card import describe\n"
        "from multimodal_gen.config import EngineConfig\n"
        "describe(EngineConfig(llm_path='smollm2'))",
    ],
    ids=["cli", "server", "public names", "describe", "plan", "memory plan", "describe text"],
)
def test_what_runs_without_a_model_loads_no_torch(code: str) -> None:
    loaded = run(f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])").split()
    assert not loaded, f"this pulled in {loaded}; find the import with python -X importtime"


def test_importing_the_package_is_cheap() -> None:
    code = "import time; t = time.perf_counter(); import multimodal_gen; print(time.perf_counter() - t)"
    best = min(float(run(code)) for _ in range(5))
    assert best < 0.3, f"import multimodal_gen took {best:.2f} s; load names on first use in __init__.py"
