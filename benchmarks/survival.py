"""`kill -9` of every process of a server at random moments, with jobs of all kinds waiting and running.

The jobs run twice: undisturbed, and on a server that is killed `--kills` times; each acknowledged id must resolve after
each restart, and the files must be equal byte for byte. Tiny random weights: the moments, not the pictures, are the
point. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from _common import finish, record, say

from tests.support.survival import JOBS, disturbed, undisturbed
from tests.support.wan_checkpoints import make_wan


def main() -> None:
    """Make the model, run the jobs twice, compare."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=20, help="default %(default)s")
    made.add_argument("--jobs", type=int, default=len(JOBS), help=f"up to {len(JOBS)}, the default")
    made.add_argument("--longest-s", type=float, default=1.5, help="of a server's life; default %(default)s")
    made.add_argument("--seed", type=int, default=7, help="of the moments; default %(default)s")
    flags = made.parse_args()
    jobs, environment = JOBS[: flags.jobs], record(threads=1)
    with tempfile.TemporaryDirectory(prefix="mmgen-bench-") as place:
        model = make_wan(Path(place, "model"), "t2v")
        say(f"{len(jobs)} jobs, undisturbed")
        wanted = undisturbed(model, Path(place, "calm"), jobs)
        say(f"the same on a server that is killed {flags.kills} times")
        began = time.monotonic()
        files, seen = disturbed(
            model, Path(place, "wild"), jobs, kills=flags.kills, seed=flags.seed, longest_s=flags.longest_s
        )
    different = sum(a != b for a, b in zip(files, wanted, strict=True))
    seconds = round(time.monotonic() - began)
    lost = len(jobs) - len(files)
    results = {**seen, "jobs": len(jobs), "videos": sum(map(len, files)), "lost": lost, "different": different}
    finish("survival", environment, {**results, "seconds": seconds})
    if different or lost:
        raise SystemExit(f"{lost} jobs are lost and {different} differ from undisturbed ones")


if __name__ == "__main__":
    main()
