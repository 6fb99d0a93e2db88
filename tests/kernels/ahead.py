"""All Triton kernels, compiled for GPUs that are not here, and what they take of them (kernels/gpu/compiled.md).

    python -m tests.kernels.ahead --write            compile everything, write the table
    python -m tests.kernels.ahead --write NAME ...   only these ops
    python -m tests.kernels.ahead --json OP CASE SM ...   print what these take

An op's launches are in `tests/kernels/launches/NAME.py`: `CASES`, name → a function that calls the op's launcher with
tensors of real sizes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parents[2]
LAUNCHES = Path(__file__).parent / "launches"
TABLE = ROOT / "kernels" / "gpu" / "compiled.md"
CAPABILITIES = (80, 90, 100)
BEGIN = "<!-- rows: begin. `python -m tests.kernels.ahead --write` -->"
END = "<!-- rows: end -->"
VERSION = re.compile(r"by Triton ([\w.+]+),")


class Empty(Protocol):
    """Makes a tensor of this shape that has no memory; bfloat16 where nothing is said."""

    def __call__(self, *shape: int, dtype: Any = ...) -> Any: ...


Cases = dict[str, Callable[[Empty], object]]
Job = tuple[str, str, int]  # op, case, capability


@dataclass(frozen=True)
class Row:
    """One kernel of one case."""

    op: str
    case: str
    kernel: str
    digest: str  # of the op's sources
    taken: tuple[str, ...]  # per capability, as `cell` writes it

    @property
    def line(self) -> str:
        return "| " + " | ".join((self.op, self.case, self.kernel, *self.taken, self.digest)) + " |"


def ops() -> list[str]:
    """Ops whose launches are written down."""
    return sorted(file.stem for file in LAUNCHES.glob("*.py"))


def cases_of(op: str) -> Cases:
    """The launches of an op."""
    return importlib.import_module(f"tests.kernels.launches.{op}").CASES


def digest(op: str) -> str:
    """Of the code that decides what is compiled, comments left out: launches and the Triton code they import."""
    seen: dict[str, str] = {}
    _gather(LAUNCHES / f"{op}.py", seen)
    return hashlib.sha256("".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:8]


def _gather(file: Path, seen: dict[str, str]) -> None:
    if str(file) in seen or not file.exists():
        return
    text = file.read_text()
    if file.parent != LAUNCHES and "import triton\n" not in text:
        return
    tree = ast.parse(text)
    seen[str(file)] = _words(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("multimodal_gen.kernels"):
            base = ROOT.joinpath(*(node.module or "").split(".")[1:])
            for name in (base, *(base / alias.name for alias in node.names)):
                _gather(name.with_suffix(".py"), seen)


def _words(text: str) -> str:
    """Source without comments and layout. Not `ast`'s, whose trees and texts differ between versions of Python."""
    layout = {tokenize.COMMENT: "", tokenize.NL: "", tokenize.INDENT: ">", tokenize.DEDENT: "<"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "".join(layout.get(token.type, token.string) for token in tokens)


def compile_one(job: Job) -> list[dict[str, Any]]:
    """What the kernels of (op, case, capability) take."""
    import torch

    from tests.support.absent_gpu import launch_on

    op, case, capability = job

    def empty(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    launch, gpu = cases_of(op)[case], launch_on(capability)
    launch(empty)
    assert gpu.taken, f"{op}, {case}: nothing was launched"
    return [asdict(taken) for taken in gpu.taken]


def compile_all(jobs: Sequence[Job]) -> list[list[dict[str, Any]]]:
    """The same of many, in two processes."""
    import torch
    import triton  # noqa: F401  (imported once, before the forks)

    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        return list(pool.map(compile_one, jobs))


def cell(kernels: list[dict[str, Any]], kernel: str) -> str:
    """The most that any launch of a kernel takes."""
    of = [taken for taken in kernels if taken["kernel"] == kernel]
    assert of, f"{kernel} is launched on some GPUs and not on others"
    most = {name: max(taken[name] for taken in of) for name in ("registers", "shared", "stack")}
    spilled = f" / {most['stack']} spilled" if most["stack"] else ""
    return f"{most['registers']} / {most['shared']}{spilled}"


def rows(wanted: Iterable[str]) -> list[Row]:
    """Compiles these ops."""
    places = [(op, case) for op in wanted for case in cases_of(op)]
    jobs = [(op, case, capability) for op, case in places for capability in CAPABILITIES]
    found = dict(zip(jobs, compile_all(jobs), strict=True))
    made = []
    for op, case in places:
        each = [found[op, case, capability] for capability in CAPABILITIES]
        for kernel in dict.fromkeys(taken["kernel"] for taken in each[0]):
            made.append(Row(op, case, kernel, digest(op), tuple(cell(kernels, kernel) for kernels in each)))
    return made


def read_table() -> tuple[str, list[Row]]:
    """(version of Triton, rows) of the table in the repository."""
    text = TABLE.read_text()
    version = VERSION.findall(text)[0]
    body = text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    made = []
    for line in body:
        op, case, kernel, *taken, of = (cell.strip() for cell in line.strip("|").split("|"))
        made.append(Row(op, case, kernel, of, tuple(taken)))
    return version, made


def write(wanted: list[str]) -> None:
    """Compile these ops (none named: all) and put them into the table."""
    import triton

    kept = [row for row in read_table()[1] if wanted and row.op not in wanted and row.op in ops()]
    lines = [
        row.line for row in sorted([*kept, *rows(wanted or ops())], key=lambda row: (row.op, row.case, row.kernel))
    ]
    names = ("op", "case", "kernel", *(f"sm_{capability}" for capability in CAPABILITIES), "sources")
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    before, after = TABLE.read_text().split(BEGIN)[0], TABLE.read_text().split(END)[1]
    before = VERSION.sub(f"by Triton {triton.__version__},", before)
    TABLE.write_text("\n".join([before + BEGIN, "", *head, *lines, "", END + after]))


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write(sys.argv[2:])
    else:
        named = sys.argv[2:]
        chosen = [(named[i], named[i + 1], int(named[i + 2])) for i in range(0, len(named), 3)]
        print(json.dumps(compile_all(chosen)))
