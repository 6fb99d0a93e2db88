"""Every kernel against torch's way of the same, on this processor: times, and the share of what the machine can do.

Operations that move numbers are held against a copy of as many bytes, in the same cache or memory; products against the
best rate that a product of large matrices reaches here in the dtype. Both sides take turns in one process; times are
minima over the rounds, ratios those of the medians. Rows are in `_kernel_rows.py`. The last line of stdout is JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from _common import Numbers, figure, finish, parser, ratio, record, rounded, say

LEAST_S = 0.004  # of one measurement: short calls are repeated


def main() -> None:
    """Measure what the flags choose."""
    made = parser(__doc__ or "", repeats=15, max_seconds=100)
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s")
    made.add_argument("--only", help="ops whose name has this in it")
    flags = made.parse_args()
    about = record(flags.threads)
    import torch

    from multimodal_gen.memory.host import keep_freed_memory

    torch.set_num_threads(flags.threads)
    keep_freed_memory()
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[flags.dtype]
    with torch.inference_mode():
        peak = _products_per_s(dtype, flags.repeats)
        found, figures = _rows(dtype, flags, peak)
    finish(
        "kernels",
        about,
        {"dtype": flags.dtype, "products_tflop_per_s": rounded(peak / 1e12), "rows": found, "figures": figures},
    )


def _rows(dtype: object, flags: object, peak: float) -> tuple[list[Numbers], list[Numbers]]:
    from _kernel_rows import rows

    found, figures, begin = [], [], time.monotonic()
    for row in rows(dtype):
        if flags.only and flags.only not in row.op:
            continue
        copy = _copier(row.moved) if not row.flops else None
        calls = {"ours": row.ours, "torch": row.reference, **({"copy": copy} if copy else {})}
        took = _interleaved(calls, flags.repeats)
        best = {name: min(values) for name, values in took.items()}
        share = row.flops / best["ours"] / peak if row.flops else best["copy"] / best["ours"]
        found.append(
            {
                "op": row.op,
                "shape": row.shape,
                "reference_us": rounded(1e6 * best["torch"]),
                "ours_us": rounded(1e6 * best["ours"]),
                "times_faster": ratio(took["torch"], took["ours"]),
                "share": rounded(share),
                "of": "products" if row.flops else "copy",
            }
        )
        figures.append(figure(f"{row.op} {row.shape}", {"ours": took["ours"], "torch": took["torch"]}))
        say(
            f"{row.op:28} {row.shape:40} torch {1e6 * best['torch']:9.1f} us  ours {1e6 * best['ours']:9.1f} us  "
            f"{median(took['torch']) / median(took['ours']):5.2f} times  {100 * share:4.0f} % of {found[-1]['of']}"
        )
        if time.monotonic() - begin > flags.max_seconds:
            say("stopped: --max-seconds is over")
            break
    return found, figures


def _interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each, round by round."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(LEAST_S / max(_seconds(call, 1), 1e-7)))
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            took[name].append(_seconds(call, counts[name]))
    return took


def _seconds(call: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _copier(moved: int) -> Callable[[], object]:
    """A copy that moves so many bytes: half are read, half are written."""
    import torch

    source = torch.ones(moved // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _products_per_s(dtype: object, rounds: int) -> float:
    """The rate of large products with a packed weight."""
    import torch

    from multimodal_gen.kernels.packed_linear import PackedWeight, unavailable

    size = 2048
    x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    packed = PackedWeight(w) if not unavailable(dtype) else lambda x, _bias: torch.nn.functional.linear(x, w)
    packed(x, None)
    return max(2 * size**3 / _seconds(lambda: packed(x, None), 1) for _ in range(rounds))


if __name__ == "__main__":
    main()
