"""Time of a step over the size of one matrix and over the number of matrices of one shape: what is fixed, what is linear.

One square matrix of 10^4 to 10^8 elements, and 1 to 4,096 matrices of 64 x 64. What a step takes of the least is what it takes
however little there is to do; what it takes of the most, over how much that is, is what is linear.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator
from typing import Any

from _contenders import CONTENDERS, make_optimizers, make_params
from _shared import compare, dots, markdown_table, parser, run_profile

SIDES = [100, 178, 316, 562, 1000, 1778, 3162, 5623, 10000]  # half a decade of elements from one to the next
COUNTS = [1 << i for i in range(13)]
SIDE = 64
DEFAULT = ["fused", "adamw-fused", "transformers"]
SWEEPS = {"size": "elements of one matrix", "count": f"matrices of {SIDE} x {SIDE}"}


def measure_point(x: int, shapes: list[tuple[int, ...]], keys: list[str], rounds: int) -> dict[str, Any]:
    numel = sum(map(math.prod, shapes))
    optimizers, _ = make_optimizers(keys, make_params(shapes), None)
    # A measurement of at least some milliseconds, by as many calls.
    calls = max(1, min(20, 2_000_000 // numel, 64 // len(shapes)))
    timings = compare({key: optimizer.step for key, optimizer in optimizers.items()}, rounds, calls=calls)
    print(f"{x:,}: " + ", ".join(f"{key} {timing}" for key, timing in timings.items()), flush=True)
    return {"x": x, "elements": numel, "calls": calls, "ms": timings}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sides, counts = (SIDES[:4], COUNTS[:5]) if options.quick else (SIDES, COUNTS)
    points: dict[str, list[dict[str, Any]]] = {sweep: [] for sweep in SWEEPS}
    cases = [("size", side * side, [(side, side)]) for side in sides]
    cases += [("count", count, [(SIDE, SIDE)] * count) for count in counts]
    for sweep, x, shapes in cases:
        points[sweep].append(measure_point(x, shapes, options.contenders or DEFAULT, options.rounds))
        gc.collect()
        yield {"rounds": options.rounds, "side": SIDE, "points": points}


def table(result: dict[str, Any]) -> str:
    """What each contender takes of the least, and in proportion of the most, in both sweeps."""
    rows = []
    for sweep, unit, scale in (("size", "10^6 elements", 1e6), ("count", "matrix", 1)):
        points = result["points"][sweep]
        for key in points[0]["ms"] if points else ():
            times = [(point["x"], point["ms"][key]["median"]) for point in points if key in point["ms"]]
            (least, ms), (most, most_ms) = times[0], times[-1]
            costs = [f"{ms * 1e3:.0f} us at {least:,}", f"{most_ms / most * scale * 1e3:.1f} us for each {unit}"]
            rows.append([f"{CONTENDERS[key].name}, {SWEEPS[sweep]}", *costs, f"{most_ms:.1f} ms at {most:,}"])
    return markdown_table(["", "least measured", "in proportion", "most measured"], rows)


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
