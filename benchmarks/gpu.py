"""Pictures and text on one GPU, with random weights of true shapes: ours in its ways, diffusers and transformers.

    python benchmarks/gpu.py pictures --shape 6b --size 1024
    python benchmarks/gpu.py pictures --shape 478m --size 512 --sides ours graphs diffusers
    python benchmarks/gpu.py text

Each side runs alone in a process of its own (`_gpu_side.py`), one after another. What kernels reach of the GPU's
limits is told by `mmgen bench --roofline`. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import ROOT, Numbers, environment, figure, finish, parser, record, rounded, say
from _gpu_side import OURS, THEIRS, Options

SIDE_SECONDS = 240
TOKENS, PROMPT_TOKENS = 128, 128


def main() -> None:
    """Run what the flags choose."""
    flags = _flags()
    about = record(flags.threads) | {"device": _device_name(flags.device)}
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-", dir=flags.place) as place:
        found = (pictures if flags.what == "pictures" else text)(flags, Path(place))
    finish("gpu", about, found)


def _flags() -> argparse.Namespace:
    made = parser(__doc__ or "", repeats=3, max_seconds=600)
    made.add_argument("what", choices=("pictures", "text"))
    made.add_argument("--device", default="cuda")
    made.add_argument("--place", help="folder for the models (6b: 13 GB); default: that for temporary files")
    made.add_argument("--shape", default="6b", choices=("6b", "478m", "tiny"), help="default %(default)s")
    made.add_argument("--model", help="a folder that was made before, instead of --shape")
    made.add_argument("--size", type=int, default=1024, help="pixels; default %(default)s")
    made.add_argument("--steps", type=int, default=9, help="of the longer run; default %(default)s")
    made.add_argument("--sides", nargs="+", choices=(*OURS, *THEIRS), default=("ours", "graphs", "fp8", *THEIRS))
    made.add_argument("--texts", nargs="+", type=int, default=(1, 8, 32, 128), help="at once; default %(default)s")
    made.add_argument("--layers", type=int, default=28, help="of the text model; default %(default)s, Qwen3-0.6B's")
    made.add_argument("--peer", action="store_true", help="text: transformers, too")
    return made.parse_args()


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def pictures(flags: argparse.Namespace, place: Path) -> Numbers:
    """Seconds of a step and of decoding, of each side."""
    from _gpu_models import make_picture_model

    model = flags.model or str(make_picture_model(place / "model", flags.shape, flags.device))
    found: Numbers = {}
    for kind in flags.sides:
        options = Options(kind, model, flags.size, flags.steps, flags.device, (0.0, 3.0))
        answer = _side(options)
        found[kind] = answer
        if "failed" in answer:
            say(f"{kind:18} {answer['failed']}")
            continue
        steps = {name.partition(" ")[2]: values for name, values in answer.items() if name.startswith("step_s")}
        words = [f"{name} {1e3 * statistics.median(values):.1f} ms" for name, values in steps.items()]
        others = f"decode {1e3 * answer['decode_s']:.0f} ms; load {answer['load_s']:.1f} s; peak {answer['peak_gb']} GB"
        say(f"{kind:18} step: {', '.join(words)}; first run {answer['first_run_s']:.1f} s; {others}")
    return {
        "what": "pictures",
        "shape": flags.shape,
        "size": flags.size,
        "sides": found,
        "figures": _figures(found, f"Z-Image {flags.shape}, {flags.size} x {flags.size}"),
    }


def _figures(sides: Numbers, what: str) -> list[Numbers]:
    """Steps of the sides that ran, beside ours."""
    ran = {kind: answer for kind, answer in sides.items() if "failed" not in answer}
    if "ours" not in ran:
        return []
    steps = [name for name in ran["ours"] if name.startswith("step_s")]
    return [
        figure(f"{what}: one step,{name.partition(',')[2]}", {kind: answer[name] for kind, answer in ran.items()})
        for name in steps
    ]


def _side(options: Options) -> Numbers:
    script = Path(__file__).with_name("_gpu_side.py")
    command = [sys.executable, str(script), json.dumps(asdict(options))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SIDE_SECONDS, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {SIDE_SECONDS} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "it ended"}
    answer: Numbers = json.loads(done.stdout.splitlines()[-1])
    return answer


def text(flags: argparse.Namespace, place: Path) -> Numbers:
    """Tokens per second of decoding, greedily: a run of many tokens less one of few."""
    import torch
    from _gpu_models import make_text_model

    folder = make_text_model(place / "model", flags.device, flags.layers)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (max(flags.texts), PROMPT_TOKENS), generator=drawn).tolist()
    found: Numbers = {"what": "text", "ours": _ours_writes(flags, folder, ids)}
    if flags.peer:
        found["transformers"] = _transformers_writes(flags, folder, ids)
    sides = [side for side in ("ours", "transformers") if side in found]
    found["figures"] = [
        figure(f"Qwen3-0.6B's shape, {count} texts: one step", {side: [found[side][count]["step_s"]] for side in sides})
        for count in found["ours"]
    ]
    return found


def _ours_writes(flags: argparse.Namespace, folder: Path, ids: list[list[int]]) -> Numbers:
    from multimodal_gen import LLM

    found: Numbers = {}
    with LLM(
        str(folder), device=flags.device, dtype="bfloat16", max_running_requests=max(flags.texts), prefix_cache=False,
        max_context=4096,
    ) as llm:  # fmt: skip

        def write(count: int, tokens: int) -> float:
            begin = time.perf_counter()
            llm.generate(ids[:count], max_tokens=tokens, ignore_eos=True, temperature=0.0)
            return time.perf_counter() - begin

        for count in flags.texts:
            write(count, TOKENS // 2)  # kernels are compiled and graphs recorded now
            write(count, TOKENS // 2)
            found[str(count)] = _told("ours", count, lambda tokens, count=count: write(count, tokens), TOKENS)
    return found


def _transformers_writes(flags: argparse.Namespace, folder: Path, ids: list[list[int]]) -> Numbers:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(flags.device).eval()
    found: Numbers = {}
    for count in flags.texts:
        given = torch.tensor(ids[:count]).to(flags.device)

        def write(tokens: int, given: Any = given) -> float:
            begin = time.perf_counter()
            wish = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            model.generate(given, attention_mask=torch.ones_like(given), **wish).cpu()
            return time.perf_counter() - begin

        write(4)
        found[str(count)] = _told("transformers", count, write, 32)
    return found


def _told(side: str, count: int, write: Any, tokens: int) -> Numbers:
    few = write(8)
    step = (write(8 + tokens) - few) / tokens
    say(f"{side:12} {count:4} texts: {count / step:8.0f} tokens/s, {1e3 * step:.2f} ms a step; to 8 tokens {few:.2f} s")
    return {"step_s": rounded(step), "tokens_per_s": rounded(count / step), "to_8_tokens_s": rounded(few)}


if __name__ == "__main__":
    main()
