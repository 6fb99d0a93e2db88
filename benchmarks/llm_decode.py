"""Writing text on the CPU: ours against transformers, and openvino-genai and vllm where they are installed.

The same token ids go in, 128 per text, and 128 come out, greedily, whatever end tokens come; 1, 8 and 32 texts at once.
transformers, vllm and ours compute with the same bfloat16 weights (those of the GGUF file, dequantised). openvino reads
the GGUF file itself, whose weights have four bits: it stands beside ours with `--llm-quantize int4-weights`. Figures of
different precision are not comparable, and ratios are not made of them, but for the one that is named so.

The bound is the time in which the machine, measured in the same round, reads what a step must read: the weights,
and the keys and values of 192 tokens (the mean) of each text. `share` is bound / measured. Where the matrix products of
a step take longer than that, `roofline` says the share of the larger of the two.

Peers in other environments: --vllm-python and --openvino-python name their interpreters. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from _common import Numbers, Side, figure, finish, interleave, parser, ratio, record, rounded, say, spread
from _llm_models import Sizes, dequantized, prompts

TOKENS = 128
BATCHES = (1, 8, 32)
SAME_WEIGHTS = ("ours", "transformers", "transformers-static", "vllm")


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    environment = record(flags.threads)
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as place, ExitStack() as stack:
        folder, sizes = dequantized(Path(place))
        sides = _start(flags, folder, sizes, stack)
        results: Numbers = {"facts": {name: side.hello for name, side in sides.items()}}
        for batch in flags.batches:
            say(f"batch {batch}")
            results[f"batch_{batch}"] = _measure(sides, sizes, batch, flags)
    results["figures"] = [results[f"batch_{batch}"].pop("figure") for batch in flags.batches]
    finish("llm_decode", environment, results)


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=5, max_seconds=900)
    made.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="texts at once; default: %(default)s")
    made.add_argument("--vllm-python", default=sys.executable, help="the Python that has vllm; default: this one")
    made.add_argument("--openvino-python", default=sys.executable, help="the same for openvino-genai")
    made.add_argument("--without", nargs="+", default=(), help="sides that are left out")
    return made.parse_args()


def _start(flags: argparse.Namespace, folder: Path, sizes: Sizes, stack: ExitStack) -> dict[str, Side]:
    chosen: dict[str, Numbers] = {
        "speed": {"kind": "speed"},
        "ours": {"kind": "ours", "model": str(folder)},
        "ours-int8": {"kind": "ours", "model": str(folder), "quantization": "int8"},
        "ours-int4": {"kind": "ours", "model": str(folder), "quantization": "int4-weights"},
        "transformers": {"kind": "transformers", "model": str(folder)},
        "transformers-static": {"kind": "transformers-static", "model": str(folder)},
    }
    if _has(flags.openvino_python, "openvino_genai"):
        chosen["openvino-q4"] = {"kind": "openvino", "model": str(sizes.gguf), "python": flags.openvino_python}
    if _has(flags.vllm_python, "vllm"):
        chosen["vllm"] = {"kind": "vllm", "model": str(folder), "python": flags.vllm_python}
    sides = {}
    for name, options in chosen.items():
        if name not in flags.without:
            say(f"loading {name}")
            calm = name.startswith(("ours", "speed"))
            side = Side(script="_llm_side.py", calm=calm, threads=flags.threads, **options)
            sides[name] = stack.enter_context(side)
    return sides


def _has(python: str, package: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(package) is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def _measure(sides: dict[str, Side], sizes: Sizes, batch: int, flags: argparse.Namespace) -> Numbers:
    ids = prompts(batch, TOKENS)
    for name, side in sides.items():  # kernels are chosen and compiled now
        say(f"warming {name}")
        side.run(prompts=ids, tokens=TOKENS if name == "vllm" else 8)
    runs = {name: _runner(side, ids) for name, side in sides.items()}
    rounds = interleave(runs, flags.repeats, flags.max_seconds)
    speed = rounds.pop("speed")
    found: Numbers = {"machine": _machine(speed, sizes, batch)}
    for name, answers in rounds.items():
        found[name] = _figures(answers, batch)
        if name in SAME_WEIGHTS:  # the bound is that of bfloat16 weights
            found[name] |= _shares(found[name], found["machine"])
    found["same_tokens_as_transformers"] = {
        name: _agreement(answers[0]["ids"], rounds["transformers"][0]["ids"])
        for name, answers in rounds.items()
        if name in SAME_WEIGHTS and "transformers" in rounds
    }
    found["times_as_fast_as"] = {
        name: ratio(_seconds(answers), _seconds(rounds["ours"]))
        for name, answers in rounds.items()
        if name in SAME_WEIGHTS and name != "ours"
    }
    seconds = {name: _seconds(answers) for name, answers in rounds.items() if name in SAME_WEIGHTS}
    goals = {name: goal for name, goal in _goals(batch).items() if name in seconds}
    found["figure"] = figure(f"SmolLM2-135M, {batch} text(s), {TOKENS} tokens each", seconds, goals)
    if "openvino-q4" in rounds and "ours-int4" in rounds:
        found["four_bits_times_as_fast_as_openvino"] = ratio(
            _seconds(rounds["openvino-q4"]), _seconds(rounds["ours-int4"])
        )
        found["bfloat16_times_as_fast_as_openvino_with_four_bits"] = ratio(
            _seconds(rounds["openvino-q4"]), _seconds(rounds["ours"])
        )
    return found


def _goals(batch: int) -> dict[str, float]:
    """How many times faster than each peer ours is to be."""
    return {"vllm": 1.0, **({"transformers": 5.0} if batch == 32 else {})}


def _runner(side: Side, ids: list[list[int]]) -> object:
    return lambda _round: side.run(prompts=ids, tokens=TOKENS)


def _seconds(answers: list[Numbers]) -> list[float]:
    return [answer["seconds"] for answer in answers]


def _machine(speed: list[Numbers], sizes: Sizes, batch: int) -> Numbers:
    read = statistics.median(answer["ends"][0] for answer in speed)
    flops = statistics.median(answer["ends"][1] for answer in speed)
    kv = sizes.kv_bytes_per_token * batch * (TOKENS + TOKENS // 2)
    return {
        "read_gb_per_s": rounded(read / 1e9),
        "bfloat16_tflop_per_s": rounded(flops / 1e12),
        "bytes_per_step": sizes.weight_bytes + kv,
        "bound_ms": rounded(1e3 * (sizes.weight_bytes + kv) / read),
        "products_ms": rounded(1e3 * 2 * sizes.parameters * batch / flops),
    }


def _figures(answers: list[Numbers], batch: int) -> Numbers:
    found: Numbers = {
        "tokens_per_s": spread([batch * TOKENS / answer["seconds"] for answer in answers]),
        "seconds": spread(_seconds(answers)),
    }
    gaps = [1e3 * (b - a) for answer in answers for a, b in pairwise(answer["ends"][-TOKENS + 8 :])]
    if gaps:
        gaps.sort()
        found["ms_per_token_p50"] = rounded(statistics.median(gaps))
        found["ms_per_token_p99"] = rounded(gaps[int(0.99 * (len(gaps) - 1))])
    else:
        found["ms_per_token_mean"] = rounded(statistics.median(answer["gap_ms"] for answer in answers))
    return found


def _shares(figures: Numbers, machine: Numbers) -> Numbers:
    step = figures["ms_per_token_p50"]
    return {
        "share": rounded(machine["bound_ms"] / step),
        "roofline": rounded(max(machine["bound_ms"], machine["products_ms"]) / step),
    }


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> Numbers:
    """Texts that are equal, and tokens until the first difference of the others."""
    firsts = [
        next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        for one, other in zip(ours, theirs, strict=True)
    ]
    apart = [first for first in firsts if first is not None]
    return {"equal": firsts.count(None), "of": len(firsts), "apart_after": sorted(apart)}


if __name__ == "__main__":
    main()
