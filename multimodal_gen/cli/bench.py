"""`mmgen bench`: the repository's benchmarks, one after another; their records as JSON, a table and a plot."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from multimodal_gen.cli import bench_report, roofline
from multimodal_gen.cli.flags import Arguments, Parser
from multimodal_gen.cli.text import as_json, columns
from multimodal_gen.errors import ConfigError, did_you_mean

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


class Benchmark(NamedTuple):
    """One row of the table of benchmarks: `benchmarks/NAME.py`."""

    summary: str
    quick: tuple[str, ...] = ("--repeats", "1")
    """flags of a run that only shows that it works: `--quick`"""
    suite: bool = True
    """whether `mmgen bench` without names runs it"""


BENCHMARKS = {
    "startup": Benchmark("from the start of `mmgen serve` to its first byte, readiness and first picture"),
    "image_latency": Benchmark(
        "one picture at a time: ours, diffusers, diffusers compiled, OpenVINO",
        ("--repeats", "1", "--only", "emoji", "--steps", "3", "--without", "compiled", "openvino"),
    ),
    "kernels": Benchmark("every kernel against torch, and its share of what the processor can do"),
    "image_throughput": Benchmark(
        "eight mixed requests at once over HTTP",
        ("--repeats", "1", "--steps", "3", "--overhead-requests", "5", "--skip-deterministic"),
    ),
    "video": Benchmark(
        "steps and decoding of a Wan slice", ("--repeats", "1", "--steps", "3", "--size", "128x128", "--frames", "5")
    ),
    "vae": Benchmark("latents to pixels", ("--repeats", "1", "--side", "128")),
    "lora": Benchmark("three adapters: switches, steps, memory", ("--repeats", "1", "--step-repeats", "1")),
    "llm_decode": Benchmark("writing text", ("--repeats", "1", "--batches", "1", "--without", "openvino-q4", "vllm")),
    "quantize": Benchmark(
        "fewer bits: speed and how far pictures are off", ("--repeats", "1", "--model", "emoji-image")
    ),
    "step_cache": Benchmark("step caches: speed and how far pictures are off", ("--repeats", "1", "--only", "emoji")),
    "interleave": Benchmark("chats and pictures on one server, alone and together"),
    "offload": Benchmark("models larger than the memory", ("--repeats", "1", "--only", "fits"), suite=False),
    "parallel": Benchmark("what ranks send one another", (), suite=False),
    "host_allocator": Benchmark("what keeping freed memory is worth", suite=False),
    "gpu": Benchmark(
        "pictures or text on a GPU: ours in its ways, diffusers, transformers",
        (
            "pictures",
            "--device",
            "cpu",
            "--shape",
            "tiny",
            "--size",
            "64",
            "--steps",
            "5",
            "--sides",
            "ours",
            "diffusers",
        ),
        suite=False,
    ),
    "survival": Benchmark("video jobs through kill -9", (), suite=False),
}


def add_arguments(parser: Parser) -> None:
    """Flags of `mmgen bench`."""
    parser.usage = "mmgen bench [NAME ...] [flags]"
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks; default: the suite")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and end")
    parser.add_argument("--out", metavar="FOLDER", default="bench", help="where records go (default: bench)")
    parser.add_argument("--flags", metavar="TEXT", default="", help="flags of the one benchmark, as in '--repeats 3'")
    parser.add_argument("--roofline", action="store_true", help="what steps cost at least on GPUs, and calls here")
    parser.add_argument("--quick", action="store_true", help="one small round of each, to see that it works")


def run(arguments: Arguments) -> int:
    """Run what is asked for; the exit code is 1 where a benchmark failed."""
    if arguments.list:
        print(_table())
        return 0
    if arguments.roofline:
        return _roofline(arguments)
    names, passed = _names(arguments.names), shlex.split(arguments.flags)
    if passed and len(arguments.names) != 1:
        raise ConfigError("--flags are those of one benchmark: name it, as in `mmgen bench video --flags='--help'`.")
    if not SCRIPTS.is_dir():
        raise ConfigError(
            "The benchmarks come with the repository, not with the installed package: run `mmgen bench` from a "
            "checkout that is installed with `pip install -e '.[test]'`."
        )
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    records, failed = [], []
    for name in names:
        flags = [*(BENCHMARKS[name].quick if arguments.quick else ()), *passed]
        print(f"== {name} {' '.join(flags)}".rstrip(), file=sys.stderr, flush=True)
        found = measure(name, flags)
        if found is None:
            failed.append(name)
            continue
        records.append(found)
        (folder / f"{name}.json").write_text(as_json(found) + "\n")
        if passed:
            print(json.dumps(found))  # as the script itself ends
    bench_report.write(folder, records)
    print(bench_report.table(records) or "no figures")
    print(f"records, table and plot: {folder}/")
    if failed:
        print(f"failed: {', '.join(failed)}; their words are above", file=sys.stderr)
    return 1 if failed else 0


def _roofline(arguments: Arguments) -> int:
    if arguments.names or arguments.flags or arguments.quick:
        raise ConfigError("--roofline runs alone: leave out names, --flags and --quick.")
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "roofline.json").write_text(as_json(roofline.run()) + "\n")
    print(f"record: {folder / 'roofline.json'}")
    return 0


def measure(name: str, flags: list[str]) -> dict[str, Any] | None:
    """Run one benchmark in a process of its own; its record, or None where it failed."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    try:
        record: dict[str, Any] = json.loads(lines[-1] if lines else "")
    except ValueError:  # --help, or a script that ended in the middle
        print(done.stdout, end="")
        return None
    if done.returncode:
        return None
    return {
        "command": " ".join(["mmgen", "bench", name, *([f"--flags={shlex.join(flags)!r}"] if flags else [])]),
        **record,
    }


def _names(given: list[str]) -> list[str]:
    """What to run. Raises: ConfigError."""
    for name in given:
        if name not in BENCHMARKS:
            raise ConfigError(
                f"There is no benchmark {name!r}.{did_you_mean(name, BENCHMARKS)} `mmgen bench --list` lists them."
            )
    return given or [name for name, row in BENCHMARKS.items() if row.suite]


def _table() -> str:
    return columns([(name, row.summary, "" if row.suite else "(by name only)") for name, row in BENCHMARKS.items()])
