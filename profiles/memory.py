"""What one optimizer step holds in memory beyond parameters, gradients and state, and what the state holds.

The figure is the peak of all that is allocated during a step, over the bytes of the parameters: from the events of torch's
allocator as its profiler records them, and, in another step, of Python's, from which the scratch of the fused step comes. What
one kernel of Inductor has within, a vector for each thread, is in neither.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _contenders import CONTENDERS, make_optimizers, make_params
from _networks import NETWORKS, Shapes, by_shape
from _shared import color_of, figures, markdown_table, parser, run_profile
from step_time import ROWS, Row
from torch import Tensor
from torch.optim import Optimizer

MOST_PERCENT = 1.0
OURS = "fused"
DEFAULT = [OURS, "compiled", "multi-tensor", "reference", "transformers", "adamw-fused", "adamw-foreach"]


def allocations_of(step: Callable[[], object]) -> list[int]:
    """Bytes allocated (above zero) and freed (below) by a call, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def python_bytes_of(step: Callable[[], object]) -> int:
    """The most that a call has of Python's memory at a time."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before


def bytes_by_name(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the tensors of the state, by their name in it."""
    result: dict[str, int] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                result[name] = result.get(name, 0) + value.nbytes
    return result


def second_moment_bytes(shapes: Shapes) -> int:
    """A row and a column of float32 for each matrix, vectors in full."""
    return 4 * sum(
        math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:]) if len(shape) >= 2 else math.prod(shape) for shape in shapes
    )


def measure_contender(key: str, row: Row, params: list[Tensor]) -> dict[str, Any] | str:
    made, missing = make_optimizers([key], params, row.beta1)
    if key in missing:
        return missing[key]
    optimizer = made[key]
    for _ in range(2):
        optimizer.step()
    state = bytes_by_name(optimizer)
    changes = allocations_of(optimizer.step)
    peak = max(itertools.accumulate(changes), default=0) + python_bytes_of(optimizer.step)
    params_bytes = sum(param.nbytes for param in params)
    return {
        "peak_bytes": peak,
        "percent_of_parameters": 100 * peak / params_bytes,
        "largest_allocation_bytes": max(changes, default=0),
        "allocations": sum(change > 0 for change in changes),
        "state_bytes": state,
    }


def measure_row(row: Row, keys: list[str]) -> dict[str, Any]:
    shapes = NETWORKS[row.network]()
    params = make_params(shapes, row.dtype)
    contenders, missing = {}, {}
    for key in keys:
        measured = measure_contender(key, row, params)
        if isinstance(measured, str):
            missing[key] = measured
        else:
            contenders[key] = measured
        gc.collect()
    percents = ", ".join(f"{key} {x['percent_of_parameters']:.1f} %" for key, x in contenders.items())
    print(f"{row.title}: {percents}", flush=True)
    return {
        "title": row.title,
        "shapes": by_shape(shapes),
        "dtype": row.dtype,
        "beta1": row.beta1,
        "parameter_bytes": sum(param.nbytes for param in params),
        "rows_and_columns_bytes": second_moment_bytes(shapes),
        "not_measured": missing,
        "contenders": contenders,
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = options.networks or (["widths24"] if options.quick else list(ROWS))
    rows = {}
    for name in names:
        rows[name] = measure_row(ROWS[name], options.contenders or DEFAULT)
        gc.collect()
        yield {"rounds": 1, "most_percent": MOST_PERCENT, "rows": rows}


def second_moments_of(row: dict[str, Any]) -> str:
    """What the state of the fused optimizer holds, and whether that is rows and columns to the byte."""
    if OURS not in row["contenders"]:
        return "-"
    state = row["contenders"][OURS]["state_bytes"]
    held = sum(count for name, count in state.items() if name.startswith("exp_avg_sq"))
    exact = "=" if held == row["rows_and_columns_bytes"] else "not"
    return f"{held:,} {exact} rows + columns"


def table(result: dict[str, Any]) -> str:
    """Peak of a step in percent of the parameters' bytes, by contender; and the second moments' bytes."""
    rows = list(result["rows"].values())
    keys = [key for key in CONTENDERS if any(key in row["contenders"] for row in rows)]
    header = ["% of the parameters, held by one step", *(CONTENDERS[key].name for key in keys), "second moments, bytes"]
    lines = [
        [
            row["title"],
            *(f"{row['contenders'][key]['percent_of_parameters']:.1f}" if key in row["contenders"] else "-" for key in keys),
            second_moments_of(row),
        ]
        for row in rows
    ]
    return markdown_table(header, lines) + f"\n\nThe goal of the fused step: at most {result['most_percent']:g} %."


def draw(result: dict[str, Any]) -> Any:
    """A dot for each contender and list, linear up to 1 %."""
    rows = list(result["rows"].values())
    figure, axes = figures().subplots(figsize=(10, 1.8 + 0.5 * len(rows)))
    labelled = set()
    for y, row in enumerate(rows):
        for key, measured in row["contenders"].items():
            name = CONTENDERS[key].name
            axes.plot(
                measured["percent_of_parameters"],
                y,
                "D" if key == OURS else "o",
                color=color_of(name),
                markerfacecolor="white" if "foreach" in name else None,
                markersize=8 if key == OURS else 6,
                zorder=3 if key == OURS else 2,
                clip_on=False,
                label=None if key in labelled else name,
            )
            labelled.add(key)
    axes.axvline(result["most_percent"], color="black", linewidth=2, label="goal of the fused step")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=1)
    ticks = [0, 1, 5, 10, 50, 100, 200, 500]
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.set_xlim(left=0)
    axes.minorticks_off()
    axes.set(
        xlabel="of the parameters' bytes, logarithmic beyond 1 %",
        title="Held by one step beyond parameters, gradients and state",
    )
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument("--networks", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)} (default all)")
    options.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)} (default: seven)"
    )
    run_profile("memory", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
