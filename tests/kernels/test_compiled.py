"""The table of what Triton kernels take (kernels/gpu/compiled.md) is true, complete, and without spilled registers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import ahead

pytest.importorskip("triton")
pytestmark = [pytest.mark.kernels]

AGAIN = "make the table anew: python -m tests.kernels.ahead --write"
VERSION, ROWS = ahead.read_table()


def test_every_file_with_a_triton_kernel_has_launches_that_are_compiled() -> None:
    folder = ahead.ROOT / "kernels"
    jitted = {file.stem for file in folder.rglob("*.py") if _launches(ast.parse(file.read_text()))}
    assert jitted == set(ahead.ops()), "each has a file of launches: tests/kernels/launches/NAME.py"


def _launches(tree: ast.AST) -> bool:
    """Whether kernel[grid](...) is in there."""
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.slice, ast.Tuple)
        for node in ast.walk(tree)
    )


def test_only_one_place_chooses_triton() -> None:
    """So that --kernels torch, a missing Triton and --compile mean the same for every operation."""
    folder = ahead.ROOT / "kernels"
    gpu = {file.stem: file for file in (folder / "gpu").glob("*.py") if (folder / file.name).exists()}
    choosing = {name for name in gpu if "by_triton(" in (folder / f"{name}.py").read_text()}
    assert choosing == set(gpu)


def test_the_table_has_all_launches_as_they_are_now() -> None:
    written = {(row.op, row.case, row.digest) for row in ROWS}
    assert written == {(op, case, ahead.digest(op)) for op in ahead.ops() for case in ahead.cases_of(op)}, AGAIN


def test_no_kernel_spills_registers() -> None:
    assert ROWS
    spilling = [row.line for row in ROWS if any("spilled" in cell for cell in row.taken)]
    assert not spilling, "\n".join(spilling)


def test_one_launch_of_each_op_compiles_to_what_the_table_says(tmp_path: Path) -> None:
    import triton

    jobs = []
    for number, op in enumerate(ahead.ops()):
        of = int(ahead.digest(op), 16)  # another one when the op has changed
        cases = list(ahead.cases_of(op))
        jobs.append((op, cases[of % len(cases)], ahead.CAPABILITIES[number % 3]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead", "--json", *(str(part) for job in jobs for part in job)],
        **{"capture_output": True, "text": True, "cwd": ahead.ROOT, "timeout": 240},
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ahead.ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (op, case, capability), kernels in zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert not any(taken["stack"] for taken in kernels), (op, case, capability, kernels)
        if triton.__version__ == VERSION:
            place = ahead.CAPABILITIES.index(capability)
            written = {row.kernel: row.taken[place] for row in ROWS if (row.op, row.case) == (op, case)}
            assert written == {taken["kernel"]: ahead.cell(kernels, taken["kernel"]) for taken in kernels}, AGAIN
