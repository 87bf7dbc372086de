"""Time of a step over the size of one matrix and over the number of matrices of one shape: what is fixed, what is linear.

Left: one square matrix of 10^4 to 10^9 elements, as far as memory allows. Right: 1 to 4,096 matrices of 64 x 64. A line with a
fixed cost is fitted to each contender, relative errors weighing alike; the fixed cost is what a step takes however little there
is to do.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, make_optimizers, make_params
from _shared import color_of, compare, figures, markdown_table, parser, run_profile

SIDES = [100, 178, 316, 562, 1000, 1778, 3162, 5623, 10000, 17783, 31623]  # half a decade of elements from one to the next
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
SIDE = 64
DEFAULT = ["fused", "adamw-fused", "transformers"]
# Bytes for each element beyond parameter and gradient: state, and what a step allocates for itself.
EXTRA_BYTES = {"adamw-fused": 8, "adamw-foreach": 16, "fused": 0.1, "compiled": 0.5}
OTHER_EXTRA_BYTES = 20
SWEEPS = {"size": "elements of one matrix", "count": f"matrices of {SIDE} x {SIDE}"}


def free_bytes() -> float:
    """Memory that can be had without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def that_fit(keys: list[str], numel: int) -> list[str]:
    """The contenders for which there is memory, the first ones first, with a tenth of it left over."""
    free = 0.9 * free_bytes() - 8.0 * numel
    chosen = []
    for key in keys:
        needed = EXTRA_BYTES.get(key, OTHER_EXTRA_BYTES) * numel
        if needed <= free:
            chosen.append(key)
            free -= needed
    return chosen


def measure_point(shapes: list[tuple[int, ...]], keys: list[str], rounds: int) -> dict[str, Any]:
    numel = sum(map(math.prod, shapes))
    keys = that_fit(keys, numel)
    if not keys:
        return {"elements": numel, "ms": {}}
    params = make_params(shapes)
    optimizers, _ = make_optimizers(keys, params, None)
    # A measurement of at least some milliseconds, by as many calls.
    calls = max(1, min(20, 2_000_000 // numel, 64 // len(shapes)))
    timings = compare({key: optimizer.step for key, optimizer in optimizers.items()}, rounds, calls=calls)
    return {"elements": numel, "calls": calls, "ms": timings}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    keys = options.contenders or DEFAULT
    sides, counts = (SIDES[:4], COUNTS[:5]) if options.quick else (SIDES, COUNTS)
    points: dict[str, list[dict[str, Any]]] = {"size": [], "count": []}
    sweeps = {
        "size": [(side * side, [(side, side)]) for side in sides],
        "count": [(count, [(SIDE, SIDE)] * count) for count in counts],
    }
    for sweep, cases in sweeps.items():
        for x, shapes in cases:
            point = {"x": x, **measure_point(shapes, keys, options.rounds)}
            points[sweep].append(point)
            gc.collect()
            times = ", ".join(f"{key} {timing}" for key, timing in point["ms"].items())
            print(f"{x:,} {SWEEPS[sweep]}: {times or 'no memory for it'}", flush=True)
        fits = {name: fits_of(measured, keys) for name, measured in points.items()}
        yield {"rounds": options.rounds, "side": SIDE, "points": points, "fits": fits}


def fits_of(points: list[dict[str, Any]], keys: list[str]) -> dict[str, dict[str, float]]:
    """For each contender the fixed milliseconds and those for each x that fit best, relative errors weighing alike."""
    fits = {}
    for key in keys:
        times = [(point["x"], point["ms"][key].median) for point in points if key in point["ms"]]
        if len(times) > 2:
            weighted = torch.tensor([[1 / ms, x / ms] for x, ms in times], dtype=torch.float64)
            fixed, slope = (
                torch.linalg.lstsq(weighted, torch.ones(len(times), 1, dtype=torch.float64)).solution.flatten().tolist()
            )
            off = (weighted @ torch.tensor([fixed, slope], dtype=torch.float64) - 1).abs().max().item()
            fits[key] = {"fixed_ms": fixed, "ms_for_each": slope, "largest_relative_error": off}
    return fits


def table(result: dict[str, Any]) -> str:
    """The fixed cost and the slope of each contender, in both sweeps."""
    rows = []
    for sweep, unit in (("size", "10^6 elements"), ("count", "matrix")):
        scale = 1e6 if sweep == "size" else 1
        for key, found in result["fits"][sweep].items():
            last = max((point for point in result["points"][sweep] if key in point["ms"]), key=lambda point: point["x"])
            rows.append(
                [
                    f"{CONTENDERS[key].name}, {SWEEPS[sweep]}",
                    f"{found['fixed_ms'] * 1e3:.0f} us",
                    f"{found['ms_for_each'] * scale * 1e3:.1f} us for each {unit}",
                    f"{100 * found['largest_relative_error']:.0f} %",
                    f"{last['ms'][key]['median']:.1f} ms at {last['x']:,}",
                ]
            )
    return markdown_table(["", "fixed cost", "slope", "furthest from that line", "largest measured"], rows)


def draw(result: dict[str, Any]) -> Any:
    """Time over size and over count, both axes logarithmic; thin lines are the fits."""
    figure, axes = figures().subplots(1, 2, figsize=(11, 4.6))
    for ax, sweep in zip(axes, SWEEPS, strict=True):
        for key in dict.fromkeys(key for point in result["points"][sweep] for key in point["ms"]):
            points = [(point["x"], point["ms"][key]) for point in result["points"][sweep] if key in point["ms"]]
            name = CONTENDERS[key].name
            x = [at for at, _ in points]
            ax.plot(x, [ms["median"] for _, ms in points], "o", color=color_of(name), markersize=4, label=name)
            ax.vlines(x, [ms["low"] for _, ms in points], [ms["high"] for _, ms in points], color=color_of(name), linewidth=1)
            found = result["fits"][sweep].get(key)
            if found is not None:
                grid = torch.logspace(math.log10(x[0]), math.log10(x[-1]), 60).tolist()
                line = [found["fixed_ms"] + found["ms_for_each"] * at for at in grid]
                fixed = f"fixed {found['fixed_ms'] * 1e3:.0f} us"
                ax.plot(grid, line, color=color_of(name), linewidth=1, alpha=0.7, label=f"    {fixed}, then linear")
        ax.set(xscale="log", yscale="log", xlabel=SWEEPS[sweep], ylabel="ms of a step")
        ax.legend(fontsize=8, loc="upper left")
    axes[0].set_title("One matrix of growing size")
    axes[1].set_title("A growing number of small matrices")
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help=f"of {', '.join(CONTENDERS)} (default: {' '.join(DEFAULT)})",
    )
    run_profile("scaling", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
