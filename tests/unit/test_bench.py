"""`mmgen bench`: its table, its report, and what it does with a benchmark that fails."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from multimodal_gen.cli import bench, bench_report
from multimodal_gen.cli.main import main

pytestmark = [pytest.mark.unit]

ENVIRONMENT = {
    "cpu": "A <fast> one",
    "threads": 2,
    "multimodal_gen": "0.1.0",
    "torch": "2",
    "diffusers": "0",
    "date": "2026-01-01",
}


def spread(median: float) -> dict[str, Any]:
    return {"median": median, "min": median, "max": median, "n": 1}


def record(*times: float, goal: float = 2.0) -> dict[str, Any]:
    """Figures that are so many times faster than a peer."""
    return {
        "benchmark": "fake",
        "environment": ENVIRONMENT,
        "figures": [
            {
                "name": f"figure & {number}",
                "sides": {"ours": spread(0.05), "peer": spread(0.05 * faster)},
                "times_faster": {"peer": {"of_medians": faster, "min": faster - 0.1, "max": faster + 0.1}},
                "goals": {"peer": goal},
            }
            for number, faster in enumerate(times)
        ],
    }


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks: one that works and says more than its record, one that fails."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    good = f"""
        import json, sys
        print("talk")
        print(json.dumps({{**{record(2.5)!r}, "flags": sys.argv[1:]}}))
        """
    (folder / "good.py").write_text(textwrap.dedent(good))
    (folder / "bad.py").write_text("raise SystemExit('no such model')")
    monkeypatch.setattr(bench, "SCRIPTS", folder)
    rows = {
        "bad": bench.Benchmark("fails"),
        "good": bench.Benchmark("works", ("--small",)),
        "rare": bench.Benchmark("by name", suite=False),
    }
    monkeypatch.setattr(bench, "BENCHMARKS", rows)
    return folder


def test_every_script_has_its_row() -> None:
    scripts = {file.stem for file in bench.SCRIPTS.glob("[!_]*.py")}
    assert scripts == set(bench.BENCHMARKS)


def test_the_suite_goes_on_after_a_failure_and_tells_it(scripts: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    assert main(["bench", "--quick", "--out", str(out)]) == 1
    told = capfd.readouterr()
    assert "failed: bad" in told.err
    assert "no such model" in told.err
    (found,) = json.loads((out / "bench.json").read_text())["records"]
    assert found["flags"] == ["--small"]
    assert found["command"] == "mmgen bench good --flags='--small'"
    assert json.loads((out / "good.json").read_text()) == found
    assert "figure & 0" in (out / "bench.md").read_text()
    ElementTree.parse(out / "bench.svg")


def test_flags_reach_the_one_benchmark(scripts: Path, tmp_path: Path, capfd: Any) -> None:
    assert main(["bench", "good", "--out", str(tmp_path), "--flags", "--repeats 7"]) == 0
    assert json.loads((tmp_path / "good.json").read_text())["flags"] == ["--repeats", "7"]
    assert main(["bench", "--out", str(tmp_path), "--flags", "--repeats 7"]) == 2
    assert "name it" in capfd.readouterr().err


def test_an_unknown_benchmark_is_told_with_a_guess(scripts: Path, capfd: Any) -> None:
    assert main(["bench", "goood"]) == 2
    assert "did you mean 'good'" in capfd.readouterr().err.lower()


def test_an_installed_package_without_the_repository_says_so(scripts: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(bench, "SCRIPTS", scripts / "nowhere")
    assert main(["bench", "good"]) == 2
    assert "checkout" in capfd.readouterr().err


def test_the_table_says_what_was_missed() -> None:
    lines = bench_report.table([record(2.5, 1.5)]).splitlines()
    assert lines[2] == "| figure & 0 | 50 ms | peer | 0.125 s | 2.50 (2.40 to 2.60) | 2 |"
    assert lines[3].endswith("| 1.50 (1.40 to 1.60) | 2, missed |")


def test_the_plot_has_a_bar_as_long_as_each_ratio() -> None:
    root = ElementTree.fromstring(bench_report.plot([record(4.0, 1.0)]))
    name = "{http://www.w3.org/2000/svg}"
    bars = [each for each in root.iter(f"{name}rect") if each.get("x") is not None]
    assert [each.get("fill") for each in bars] == [bench_report.COLOURS["met"], bench_report.COLOURS["missed"]]
    long, short = (float(each.get("width", "0")) for each in bars)
    assert long == pytest.approx(4 * short, rel=0.01)
    assert "A <fast> one" in "".join(root.itertext())


def test_operations_are_told_with_their_share_of_what_the_machine_can_do() -> None:
    row = {"op": "norm", "shape": "[2, 3]", "reference_us": 30.0, "ours_us": 10.0, "share": 0.8, "of": "copy"}
    lines = bench_report.operations([{"benchmark": "kernels", "rows": [row]}, record(1.0)]).splitlines()
    assert lines[2:] == ["| `norm` | [2, 3] | 0.03 ms | 0.01 ms | 3.00 | 80 % of copy |"]
    assert bench_report.operations([record(1.0)]) == ""


def test_a_run_without_figures_still_writes_its_files(tmp_path: Path) -> None:
    bench_report.write(tmp_path, [{"benchmark": "parallel", "environment": ENVIRONMENT}])
    assert bench_report.table([]) == ""
    ElementTree.parse(tmp_path / "bench.svg")
