"""Time of one optimizer step on the parameter lists of networks that people train, beside every other Adafactor and AdamW.

Contenders of a row step the same parameters in one process, in turn: first those that are compared most, then all of them, the
slow ones in every third round. Everything is measured twice, each time in a fresh process, since how transformers does depends
on the heap that others leave. Only the step is timed: no forward, no backward. What Python takes of a fused step is its
processor time on one thread without the kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from _contenders import CONTENDERS, make_optimizers, make_params
from _networks import ROWS, Row, rows_of
from _shared import compare, dots, in_fresh_process, markdown_table, parser, run_profile
from torch.optim import Optimizer

from adafactor_compiled._fused.cpu.launches import Launch

MEASUREMENTS = 2
HOST_STEPS = 50  # to a measurement of Python alone
OURS, ADAMW, TRANSFORMERS = FEW = ["fused", "adamw-fused", "transformers"]


def measure_once(name: str, keys: list[str], rounds: int) -> dict[str, Any]:
    """Timings by contender: of FEW among themselves, and of all; those that cannot step the parameters, and why."""
    row = ROWS[name]
    params = make_params(row.shapes(), row.dtype)
    optimizers, missing = make_optimizers([key for key in keys if key in FEW], params, row.beta1)
    few = compare({key: optimizer.step for key, optimizer in optimizers.items()}, rounds)
    others, missing_others = make_optimizers([key for key in keys if key not in FEW], params, row.beta1)
    optimizers |= others
    every = {key: CONTENDERS[key].every for key in optimizers}
    steps = {key: optimizer.step for key, optimizer in optimizers.items()}
    everyone = compare(steps, rounds, every=every) if others else few
    host_us = host_time(optimizers[OURS], len(params), rounds) if OURS in optimizers else None
    return {"few": few, "all": everyone, "missing": missing | missing_others, "host_us": host_us}


def host_time(optimizer: Optimizer, tensors: int, rounds: int) -> float:
    """Microseconds a tensor that a fused step takes on one thread beside its kernels, which do nothing here."""

    def skips_none(launch: Launch, *arguments: Any) -> array[int]:
        return array("q", bytes(8 * len(launch.positions)))

    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.object(Launch, "run", skips_none):
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(HOST_STEPS):
                optimizer.step()
            times.append((time.process_time() - start) * 1e6 / HOST_STEPS / tensors)
    torch.set_num_threads(threads)
    return statistics.median(times)


def measure_row(name: str, row: Row, keys: list[str], rounds: int) -> dict[str, Any]:
    measurements: list[dict[str, Any]] = []
    for _ in range(MEASUREMENTS):
        measurements.append(in_fresh_process(measure_once, name, keys, rounds))
        for timings in (measurements[-1][group] for group in ("few", "all")):
            print(f"{row.title}: " + ", ".join(f"{key} {timing.median:.2f} ms" for key, timing in timings.items()), flush=True)
    return {
        **row.described(),
        "not_measured": measurements[0]["missing"],
        "ms_of_few": [measurement["few"] for measurement in measurements],
        "ms": [measurement["all"] for measurement in measurements],
        "host_us_a_tensor": [measurement["host_us"] for measurement in measurements],
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows: dict[str, Any] = {}
    for name, row in rows_of(options).items():
        rows[name] = measure_row(name, row, options.contenders or list(CONTENDERS), options.rounds)
        yield {"rounds": options.rounds, "rows": rows}


def ratios(measurements: list[dict[str, Any]], over: str, under: str) -> list[float]:
    """median of one contender / that of another, for each measurement; empty where one was not measured."""
    return [ms[over]["median"] / ms[under]["median"] for ms in measurements if over in ms and under in ms]


def each(values: list[float], form: str = ".2f") -> str:
    return ", ".join(format(value, form) for value in values) or "-"


def medians(measurements: list[dict[str, Any]], key: str) -> str:
    return each([ms[key]["median"] for ms in measurements if key in ms], ".1f")


def table(result: dict[str, Any]) -> str:
    """The few, each measured twice, and their ratios; then the milliseconds among all."""
    rows = result["rows"].values()
    few = [
        [
            f"{row['title']} ({row['tensors']} tensors)",
            *(medians(row["ms_of_few"], key) for key in FEW),
            each(ratios(row["ms_of_few"], OURS, ADAMW)),
            each(ratios(row["ms_of_few"], TRANSFORMERS, OURS), ".1f"),
            each([us for us in row["host_us_a_tensor"] if us is not None], ".1f"),
        ]
        for row in rows
    ]
    header = ["", "fused, ms", "fused AdamW, ms", "transformers, ms", "fused / fused AdamW", "transformers / fused"]
    keys = [key for key in CONTENDERS if any(key in row["ms"][0] for row in rows)]
    every = [[CONTENDERS[key].name, *(medians(row["ms"], key) for row in rows)] for key in keys]
    names = ["ms of a step, all in turn", *(row["title"] for row in rows)]
    return f"{markdown_table([*header, 'Python of a fused step, us a tensor'], few)}\n\n{markdown_table(names, every)}"


def draw(result: dict[str, Any]) -> Any:
    """For each list the contenders' times over that of fused AdamW: a dot a measurement."""
    rows = {
        row["title"]: [
            (contender.name, value)
            for key, contender in CONTENDERS.items()
            for value in ratios(row["ms_of_few"], key, ADAMW) + ratios(row["ms"], key, ADAMW)
        ]
        for row in result["rows"].values()
    }
    return dots({"One optimizer step": rows}, "time of a step / fused AdamW's, logarithmic")


if __name__ == "__main__":
    run_profile("step_time", parser(__doc__, networks=ROWS, contenders=CONTENDERS).parse_args(), measure, table, draw)
