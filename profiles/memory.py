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
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _contenders import CONTENDERS, make_optimizers, make_params
from _networks import ROWS, Row, Shapes, rows_of
from _shared import dots, markdown_table, parser, run_profile
from torch import Tensor
from torch.optim import Optimizer

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
    result: Counter[str] = Counter()
    for state in optimizer.state.values():
        result.update({name: value.nbytes for name, value in state.items() if isinstance(value, Tensor)})
    return dict(result)


def second_moment_bytes(shapes: Shapes) -> int:
    """A row and a column of float32 for each matrix, vectors in full."""
    return 4 * sum(
        math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:]) if len(shape) >= 2 else math.prod(shape) for shape in shapes
    )


def measure_contender(optimizer: Optimizer, params: list[Tensor]) -> dict[str, Any]:
    for _ in range(2):
        optimizer.step()
    changes = allocations_of(optimizer.step)
    peak = max(itertools.accumulate(changes), default=0) + python_bytes_of(optimizer.step)
    return {
        "peak_bytes": peak,
        "percent_of_parameters": 100 * peak / sum(param.nbytes for param in params),
        "largest_allocation_bytes": max(changes, default=0),
        "state_bytes": bytes_by_name(optimizer),
    }


def measure_row(row: Row, keys: list[str]) -> dict[str, Any]:
    params = make_params(row.shapes(), row.dtype)
    contenders: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for key in keys:
        made, why = make_optimizers([key], params, row.beta1)
        missing |= why
        contenders |= {key: measure_contender(optimizer, params) for key, optimizer in made.items()}
        del made
        gc.collect()
    percents = ", ".join(f"{key} {x['percent_of_parameters']:.1f} %" for key, x in contenders.items())
    print(f"{row.title}: {percents}", flush=True)
    of_parameters, least = sum(param.nbytes for param in params), second_moment_bytes(row.shapes())
    sizes = {"parameter_bytes": of_parameters, "rows_and_columns_bytes": least}
    return {**row.described(), **sizes, "not_measured": missing, "contenders": contenders}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows = {}
    for name, row in rows_of(options).items():
        rows[name] = measure_row(row, options.contenders or DEFAULT)
        yield {"rows": rows}


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
    percents = [
        [f"{row['contenders'][key]['percent_of_parameters']:.1f}" if key in row["contenders"] else "-" for key in keys]
        for row in rows
    ]
    lines = [[row["title"], *of_row, second_moments_of(row)] for row, of_row in zip(rows, percents, strict=True)]
    header = ["% of the parameters, held by one step", *(CONTENDERS[key].name for key in keys), "second moments, bytes"]
    return markdown_table(header, lines)


def draw(result: dict[str, Any]) -> Any:
    """A dot for each contender and list, linear up to 1 %."""
    rows = {
        row["title"]: [(CONTENDERS[key].name, x["percent_of_parameters"]) for key, x in row["contenders"].items()]
        for row in result["rows"].values()
    }
    title = "Held by one step beyond parameters, gradients and state"
    return dots({title: rows}, "% of the parameters' bytes, logarithmic beyond 1", linear_to=1)


if __name__ == "__main__":
    run_profile("memory", parser(__doc__, networks=ROWS, contenders=CONTENDERS).parse_args(), measure, table, draw)
