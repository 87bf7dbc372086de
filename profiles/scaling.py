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
from _shared import compare, dots, markdown_table, parser, run_profile

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
    optimizers, _ = make_optimizers(keys, make_params(shapes), None)
    # A measurement of at least some milliseconds, by as many calls.
    calls = max(1, min(20, 2_000_000 // numel, 64 // len(shapes)))
    timings = compare({key: optimizer.step for key, optimizer in optimizers.items()}, rounds, calls=calls)
    return {"elements": numel, "calls": calls, "ms": timings}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sides, counts = (SIDES[:4], COUNTS[:5]) if options.quick else (SIDES, COUNTS)
    points: dict[str, list[dict[str, Any]]] = {"size": [], "count": []}
    cases = [("size", side * side, [(side, side)]) for side in sides]
    cases += [("count", count, [(SIDE, SIDE)] * count) for count in counts]
    for sweep, x, shapes in cases:
        point = {"x": x, **measure_point(shapes, options.contenders or DEFAULT, options.rounds)}
        points[sweep].append(point)
        gc.collect()
        times = ", ".join(f"{key} {timing}" for key, timing in point["ms"].items())
        print(f"{x:,} {SWEEPS[sweep]}: {times or 'no memory for it'}", flush=True)
        yield {"rounds": options.rounds, "side": SIDE, "points": points}


def medians(points: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """For each contender its (x, milliseconds), of the content of the JSON."""
    result: dict[str, list[tuple[int, float]]] = {}
    for point in points:
        for key, timing in point["ms"].items():
            result.setdefault(key, []).append((point["x"], timing["median"]))
    return result


def fit(times: list[tuple[int, float]]) -> tuple[float, float, float]:
    """The fixed milliseconds and those for each x that fit best, relative errors weighing alike; and the largest of these."""
    weighted = torch.tensor([[1 / ms, x / ms] for x, ms in times], dtype=torch.float64)
    fixed_and_slope = torch.linalg.lstsq(weighted, torch.ones(len(times), 1, dtype=torch.float64)).solution
    fixed, slope = fixed_and_slope.flatten().tolist()
    return fixed, slope, (weighted @ fixed_and_slope - 1).abs().max().item()


def table(result: dict[str, Any]) -> str:
    """The fixed cost and the slope of each contender, in both sweeps."""
    rows = []
    for sweep, unit, scale in (("size", "10^6 elements", 1e6), ("count", "matrix", 1)):
        for key, times in medians(result["points"][sweep]).items():
            fixed, slope, off = fit(times)
            last, ms = times[-1]
            costs = [f"{fixed * 1e3:.0f} us", f"{slope * scale * 1e3:.1f} us for each {unit}", f"{100 * off:.0f} %"]
            rows.append([f"{CONTENDERS[key].name}, {SWEEPS[sweep]}", *costs, f"{ms:.1f} ms at {last:,}"])
    return markdown_table(["", "fixed cost", "slope", "furthest from that line", "largest measured"], rows)


def draw(result: dict[str, Any]) -> Any:
    """Time over size and over count, which grow by the same factor from line to line."""
    panels = {
        f"{unit}; ms of a step": {
            f"{point['x']:,}": [(CONTENDERS[key].name, timing["median"]) for key, timing in point["ms"].items()]
            for point in result["points"][sweep]
        }
        for sweep, unit in SWEEPS.items()
    }
    return dots(panels, "logarithmic")


if __name__ == "__main__":
    run_profile("scaling", parser(__doc__, contenders=CONTENDERS).parse_args(), measure, table, draw)
