"""What a run of benchmarks found, for people: a table in Markdown and a plot in SVG.

A record is what a benchmark printed. Its `figures` are made by `figure` of benchmarks/_common.py:
name, sides ({"ours": spread, …}, in seconds), times_faster ({peer: ratio}), goals ({peer: number}).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from multimodal_gen.cli.text import as_json

Record = dict[str, Any]

WIDTH, ROW, TOP, LABELS, RIGHT = 960, 24, 56, 440, 130  # pixels
MOST = 12.0  # times faster; longer bars are cut off there, their number is not
COLOURS = {"met": "#2a9d5c", "missed": "#c8553d", "no goal": "#4a78b0"}


class Comparison(NamedTuple):
    """One figure against one peer."""

    name: str
    peer: str
    ours_s: float
    theirs_s: float
    times: float
    """how many times ours is faster: of the medians"""
    least: float
    most: float
    goal: float | None

    @property
    def verdict(self) -> str:
        """A key of COLOURS."""
        if self.goal is None:
            return "no goal"
        return "met" if self.times >= self.goal else "missed"


def comparisons(records: Sequence[Record]) -> Iterator[Comparison]:
    """Every figure against every peer, in order."""
    for record in records:
        for figure in record.get("figures", ()):
            sides, goals = figure["sides"], figure["goals"]
            for peer, times in figure["times_faster"].items():
                yield Comparison(
                    figure["name"],
                    peer,
                    sides["ours"]["median"],
                    sides[peer]["median"],
                    times["of_medians"],
                    times["min"],
                    times["max"],
                    goals.get(peer),
                )


def write(folder: Path, records: Sequence[Record]) -> None:
    """bench.json, bench.md and bench.svg."""
    (folder / "bench.json").write_text(as_json({"records": list(records)}) + "\n")
    (folder / "bench.md").write_text("\n\n".join([table(records), operations(records)]).strip() + "\n")
    (folder / "bench.svg").write_text(plot(records))


def table(records: Sequence[Record]) -> str:
    """The comparisons as a table in Markdown; empty without any."""
    rows = [
        f"| {each.name} | {_seconds(each.ours_s)} | {each.peer} | {_seconds(each.theirs_s)} | "
        f"{each.times:.2f} ({each.least:.2f} to {each.most:.2f}) | {_goal(each)} |"
        for each in comparisons(records)
    ]
    head = ["| figure | ours | peer | theirs | times faster (min to max) | goal |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def operations(records: Sequence[Record]) -> str:
    """What benchmarks/kernels.py found as a table in Markdown; empty without it."""
    found = [row for record in records if record["benchmark"] == "kernels" for row in record["rows"]]
    rows = [
        f"| `{row['op']}` | {row['shape']} | {_seconds(row['reference_us'] / 1e6)} | {_seconds(row['ours_us'] / 1e6)} "
        f"| {row['reference_us'] / row['ours_us']:.2f} | {100 * row['share']:.0f} % of {row['of']} |"
        for row in found
    ]
    head = ["| op | shape | torch | ours | times faster | share |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def plot(records: Sequence[Record]) -> str:
    """A bar for each comparison, with the extremes of its rounds and a tick at the goal."""
    found = list(comparisons(records))
    height = TOP + ROW * len(found) + 40
    most = min(MOST, max([2.0, *(max(each.most, each.goal or 0.0) for each in found)]))
    scale = (WIDTH - LABELS - RIGHT) / most
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-size="15">times faster than the peer</text><text x="12" y="40" fill="#666">'
        f"{escape(_machine(records))}</text>",
        *(_bar(each, TOP + ROW * at, scale, most) for at, each in enumerate(found)),
        f'<line x1="{LABELS + scale:.1f}" x2="{LABELS + scale:.1f}" y1="{TOP - 4}" y2="{height - 32}" stroke="#999" '
        'stroke-dasharray="3 3"/>',
        f'<text x="12" y="{height - 12}" fill="#666">bar: ratio of the medians; line: extremes of the rounds; tick: '
        "goal; dashes: as fast as the peer</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bar(each: Comparison, y: int, scale: float, limit: float) -> str:
    times, least, most = (min(limit, value) for value in (each.times, each.least, each.most))
    middle = y + ROW // 2
    parts = [
        f'<text x="{LABELS - 8}" y="{middle + 4}" text-anchor="end">{escape(f"{each.name} / {each.peer}")}</text>',
        f'<rect x="{LABELS}" y="{y + 4}" width="{times * scale:.1f}" height="{ROW - 8}" '
        f'fill="{COLOURS[each.verdict]}"/>',
        f'<line x1="{LABELS + least * scale:.1f}" x2="{LABELS + most * scale:.1f}" y1="{middle}" '
        f'y2="{middle}" stroke="black"/>',
        f'<text x="{LABELS + max(times, most) * scale + 6:.1f}" y="{middle + 4}">{each.times:.2f} '
        f"({_seconds(each.ours_s)})</text>",
    ]
    if each.goal is not None:
        x = LABELS + min(limit, each.goal) * scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 2}" y2="{y + ROW - 2}" stroke="black" stroke-width="2"/>'
        )
    return "".join(parts)


def _machine(records: Sequence[Record]) -> str:
    if not records:
        return ""
    facts = records[0]["environment"]
    return (
        f"{facts['cpu']}, {facts['threads']} threads; multimodal_gen {facts['multimodal_gen']}, "
        f"torch {facts['torch']}, diffusers {facts['diffusers']}; {facts['date']}"
    )


def _goal(each: Comparison) -> str:
    return "" if each.goal is None else f"{each.goal:g}{', missed' if each.verdict == 'missed' else ''}"


def _seconds(value: float) -> str:
    if value < 0.0995:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s"
