"""Part `peers` of `offload.py`: our streaming and residency against diffusers' group offload, one process at a time.

Every mode has a process of its own in every round, alone on the machine: mapped files would be shared out among
processes that map the same ones. A mode loads, denoises, takes an adapter, denoises again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _common import Numbers, Side, SideEnded, interleave, ratio, rounded, say, spread
from _models import prompt
from _watch import Watch

STREAMED: Numbers = {"offload": "layerwise", "prefetch_layers": "1", "resident_layers": 0}
RESIDENT: Numbers = {"offload": "none"}
BLOCK: Numbers = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAF: Numbers = {"offload_type": "leaf_level"}
# Name → (side, mode). Streams are missing: diffusers has them on accelerators only, which `streams` shows.
MODES: dict[str, tuple[str, Numbers]] = {
    "ours_streamed": ("ours", STREAMED),
    "ours_resident": ("ours", RESIDENT),
    "diffusers_resident": ("diffusers", {}),
    "diffusers_leaf": ("diffusers", LEAF),
    "diffusers_block": ("diffusers", BLOCK),
    "diffusers_leaf_disk": ("diffusers", {**LEAF, "disk": True}),
    "diffusers_block_disk": ("diffusers", {**BLOCK, "disk": True}),
}
STREAMS: Numbers = {**LEAF, "use_stream": True}
STATES = ("base", "adapter")  # what a process does first, loading included, and after the switch
MEMORY = ("anon_mb", "file_mb", "pss_mb")
WITH_ADAPTER_BOUND = 0.1  # relative; diffusers runs adapters beside the weights, we may merge: bf16 rounds elsewhere


def compare(model: str, adapter: str, flags: argparse.Namespace, folder: Path) -> Numbers:
    """Rounds over all modes."""
    options = {"model": model, "adapter": adapter, "threads": flags.threads, "dtype": flags.dtype}
    runs = {name: partial(_run, name, options, flags, folder) for name in MODES}
    took = interleave(runs, flags.repeats, flags.max_seconds)
    found: Numbers = {name: _summary(name, answers, folder) for name, answers in took.items()}
    say("asking diffusers for streams")
    return {
        "side": flags.side,
        "dtype": flags.dtype,
        "modes": found,
        "streams": _streams(options, folder),
        "over_ours_streamed": {name: _over(took[name], took["ours_streamed"]) for name in MODES},
    }


def _run(name: str, options: Numbers, flags: argparse.Namespace, folder: Path, number: int) -> Numbers:
    """One process from its start to its end: seconds, peaks and what failed."""
    kind, mode = MODES[name]
    place = folder / "groups"
    place.mkdir()
    found: Numbers = {"errors": {}, "memory": {}, "step_s": [], "swapped_step_s": []}
    request = {"width": flags.side, "height": flags.side, "num_inference_steps": flags.steps, "guidance_scale": 3.0}

    def ask(what: str, side: Side, **command: Any) -> Numbers:
        answer = side.run(**command)
        if "error" in answer:
            found["errors"][what] = answer["error"]
        return answer

    try:
        with (
            Watch() as watch,
            Side(
                script="_offload_side.py", watch=watch.start, kind=kind, mode=mode, place=str(place), **options
            ) as side,
        ):
            if "error" in side.hello:
                return {**found, "errors": {"load": side.hello["error"]}}
            for state in STATES:
                if state == "adapter":
                    found["swap_s"] = ask("swap", side, do="swap").get("seconds")
                if found["errors"]:
                    break
                save = str(_latents(folder, name, state)) if number == 0 else None
                answer = ask(
                    f"steps with {state}", side, do="steps", save=save, prompt=prompt(number), seed=1, **request
                )
                ends = answer.get("ends", [])
                if ends and state == "base":
                    found["first_step_s"] = ends[0] - side.started
                found["step_s" if state == "base" else "swapped_step_s"] = [b - a for a, b in pairwise(ends)][:-1]
                found["memory"][state] = watch.since()
            found["written_mb"] = rounded(sum(file.stat().st_size for file in place.rglob("*.safetensors")) / 1e6)
    except SideEnded as ended:
        found["errors"]["process"] = str(ended)
    finally:
        shutil.rmtree(place)
    return found


def _latents(folder: Path, name: str, state: str) -> Path:
    return folder / f"{name}-{state}.npy"


def _summary(name: str, answers: list[Numbers], folder: Path) -> Numbers:
    """Of one mode over the rounds; only what it could do is there."""
    found: Numbers = {}
    for part in ("first_step_s", "swap_s"):
        values = [answer[part] for answer in answers if answer.get(part) is not None]
        found |= {part: spread(values)} if values else {}
    for part in ("step_s", "swapped_step_s"):
        values = [value for answer in answers for value in answer[part]]
        found |= {part: spread(values)} if values else {}
    for state in STATES:
        peaks = [answer["memory"][state] for answer in answers if state in answer["memory"]]
        found |= {f"peak_{state}": {part: spread([peak[part] for peak in peaks]) for part in MEMORY}} if peaks else {}
    written = max((answer.get("written_mb", 0) for answer in answers), default=0)
    found |= {"written_mb": written} if written else {}
    errors = {what: text for answer in answers for what, text in answer["errors"].items()}
    found |= {"failed": errors} if errors else {}
    found["right"] = {state: _right(name, state, folder) for state in STATES}
    return found


def _right(name: str, state: str, folder: Path) -> Any:
    """Whether a mode made the latents of its own program without offload: "bit-equal", their distance, or why not.

    Raises: SystemExit where the two programs without offload do other work, for then nothing can be compared.
    """
    reference = "ours_resident" if name.startswith("ours") else "diffusers_resident"
    path = _latents(folder, name, state)
    if not path.exists():
        return "nothing made"
    made, wanted = np.load(path), np.load(_latents(folder, reference, state))
    if name == "ours_resident":
        other = np.load(_latents(folder, "diffusers_resident", state))
        distance = _distance(made, other)
        if not distance < (0.05 if state == "base" else WITH_ADAPTER_BOUND):
            raise SystemExit(
                f"ours and diffusers do not make the same latents ({state}): they are {distance:.2g} apart"
            )
        return f"{distance:.2g} from diffusers_resident"
    if not np.isfinite(made).all():
        return "not finite"
    return "bit-equal" if np.array_equal(made, wanted) else f"{_distance(made, wanted):.2g} off"


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _over(theirs: list[Numbers], ours: list[Numbers]) -> Numbers:
    """How many times our streaming's seconds and megabytes another mode takes, medians of rounds."""
    found: Numbers = {}
    pairs = [(a, b) for a, b in zip(theirs, ours, strict=True)]
    for part in ("first_step_s", "swap_s"):
        both = [(a[part], b[part]) for a, b in pairs if a.get(part) is not None and b.get(part) is not None]
        found |= {part: _ratio(both)} if both else {}
    for part in ("step_s", "swapped_step_s"):
        both = [pair for a, b in pairs for pair in zip(a[part], b[part], strict=False)]
        found |= {part: _ratio(both)} if both else {}
    for state in STATES:
        peaks = [(a["memory"][state], b["memory"][state]) for a, b in pairs if state in a["memory"]]
        found |= (
            {f"peak_{state}": {part: _ratio([(a[part], b[part]) for a, b in peaks]) for part in ("anon_mb", "pss_mb")}}
            if peaks
            else {}
        )
    return found


def _ratio(both: Iterable[tuple[float, float]]) -> Numbers:
    theirs, ours = zip(*both, strict=True)
    return ratio(theirs, ours)


def _streams(options: Numbers, folder: Path) -> str:
    """What diffusers says to use_stream on a CPU."""
    with Side(script="_offload_side.py", kind="diffusers", mode=STREAMS, place=str(folder), **options) as side:
        return str(side.hello.get("error", "works"))
