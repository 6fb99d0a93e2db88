"""Three rank-16 adapters on a random-weight Z-Image of 478 M parameters, ours against diffusers with peft.

switch   from files to merged weights (cold: parsed anew; warm: already in memory), and back to the base weights
step     one denoising step at 512 x 512 on the base model, merged, and with the adapters beside the weights
memory   peak resident memory above that of the loaded model; whether the base weights come back bit for bit

diffusers' switch is load_lora_weights three times, set_adapters, fuse_lora; its way back is unfuse_lora. The last line
of stdout is JSON.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from _common import Numbers, Side, figure, finish, interleave, parser, ratio, record, say, spread
from _models import RANK, make_adapters, make_medium

SWITCHES = ("load", "unmerge", "merge", "unmerge")


def main() -> None:
    """Make the model and the files, measure, print."""
    made = parser(__doc__, repeats=5, max_seconds=400)
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s")
    made.add_argument("--steps", type=int, default=4, help="of one measurement, at least 3; default %(default)s")
    made.add_argument("--step-repeats", type=int, default=3, help="rounds of steps; default %(default)s")
    made.add_argument("--side", type=int, default=512, help="pixels; default %(default)s")
    made.add_argument("--medium-model", help="a folder made before, instead of a new one")
    flags = made.parse_args()
    environment = record(flags.threads)
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as place, ExitStack() as stack:
        folder = Path(place)
        say("making the 478 M checkpoint and the adapters")
        model = flags.medium_model or str(make_medium(folder / "medium"))
        files = make_adapters(Path(model), folder)
        options = {"model": model, "dtype": flags.dtype, "threads": flags.threads, "files": files}
        script = "_lora_side.py"
        sides = {name: stack.enter_context(Side(script=script, kind=name, **options)) for name in ("ours", "diffusers")}
        results = {
            "dtype": flags.dtype,
            "adapters": {"count": len(files), "rank": RANK},
            "switch": switches(sides, flags.repeats, flags.max_seconds),
            "step": steps(sides, flags.step_repeats, flags.max_seconds, {"side": flags.side, "steps": flags.steps}),
            "memory": {name: side.run(do="facts") for name, side in sides.items()},
        }
        results["figures"] = [*results["switch"].pop("figures"), *results["step"].pop("figures")]
        for name, side in sides.items():
            facts = results["memory"][name]
            facts["above_loaded_mb"] = facts["peak_mb"] - side.hello["loaded_mb"]
    finish("lora", environment, results)


def switches(sides: dict[str, Side], repeats: int, max_seconds: float) -> Numbers:
    """Seconds of each kind of switch, and how many times faster ours is."""

    def cycle(side: Side) -> Numbers:
        load, back, warm, again = (side.run(do=do)["seconds"] for do in SWITCHES)
        return {"cold": load, "warm": warm, "unmerge": (back + again) / 2}

    took = interleave({name: (lambda _, side=side: cycle(side)) for name, side in sides.items()}, repeats, max_seconds)
    kinds = ("cold", "warm", "unmerge")
    values = {kind: {name: [answer[kind] for answer in answers] for name, answers in took.items()} for kind in kinds}
    return {
        **{f"{kind}_s": {name: spread(found) for name, found in values[kind].items()} for kind in kinds},
        "cold_times_faster": ratio(values["cold"]["diffusers"], values["cold"]["ours"]),
        "warm_over_their_cold": ratio(values["cold"]["diffusers"], values["warm"]["ours"]),
        "warm_times_faster": ratio(values["warm"]["diffusers"], values["warm"]["ours"]),
        "unmerge_times_faster": ratio(values["unmerge"]["diffusers"], values["unmerge"]["ours"]),
        "figures": [
            figure("three adapters: switch, files parsed anew", values["cold"], {"diffusers": 5.0}),
            figure(
                "three adapters: switch, adapters in memory",
                {"ours": values["warm"]["ours"], "diffusers": values["cold"]["diffusers"]},
                {"diffusers": 5.0},
            ),
            figure("back to the base weights", values["unmerge"], {"diffusers": 3.0}),
        ],
    }


def steps(sides: dict[str, Side], repeats: int, max_seconds: float, request: Numbers) -> Numbers:
    """Seconds per step of both sides in three states, as multiples of our base step too."""
    found: dict[str, list[float]] = {}

    def measure(side: Side, name: str, state: str) -> None:
        found.setdefault(f"{name}_{state}", []).append(side.run(do="step", **request)["seconds"])

    def round_(name: str, side: Side) -> None:
        side.run(do="unmerge")
        if name == "ours":  # for diffusers the adapters are there from now on: its base step was not measured
            measure(side, name, "base")
        side.run(do="merge")
        measure(side, name, "merged")
        side.run(do="unmerge")
        side.run(do="beside")
        measure(side, name, "beside")
        side.run(do="merge")

    for side in sides.values():
        side.run(do="merge")
    interleave({name: (lambda _, n=name, s=side: round_(n, s)) for name, side in sides.items()}, repeats, max_seconds)
    for side in sides.values():
        side.run(do="unmerge")
    return {
        "seconds": {name: spread(values) for name, values in found.items()},
        "merged_over_base": ratio(found["ours_merged"], found["ours_base"]),
        "beside_over_base": ratio(found["ours_beside"], found["ours_base"]),
        "merged_times_faster": ratio(found["diffusers_merged"], found["ours_merged"]),
        "beside_times_faster": ratio(found["diffusers_beside"], found["ours_beside"]),
        "figures": [
            figure(
                f"478 M, one step, adapters {state}",
                {"ours": found[f"ours_{state}"], "diffusers": found[f"diffusers_{state}"]},
            )
            for state in ("merged", "beside")
        ],
    }


if __name__ == "__main__":
    main()
