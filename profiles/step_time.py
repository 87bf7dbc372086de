"""Time of one optimizer step on the parameter lists of networks that people train, beside every other Adafactor and AdamW.

Contenders of a row step the same parameters in one process, in turn: first those that the goals are about, then all of them,
the slow ones in every third round. Everything is measured twice, each time in a fresh process, since how transformers does
depends on the heap that others leave. Only the step is timed: no forward, no backward. What Python takes of a fused step is its
processor time on one thread without the kernels.

    python profiles/step_time.py --networks gpt2 t5-small --contenders fused adamw-fused transformers
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from array import array
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

import torch
from _contenders import CONTENDERS, make_optimizers, make_params
from _networks import NETWORKS, by_shape
from _shared import Timing, color_of, compare, figures, markdown_table, parser, run_profile
from torch.optim import Optimizer

from adafactor_compiled._fused.cpu.launches import Launch

MEASUREMENTS = 2
HOST_STEPS = 50  # to a measurement of Python alone
OURS, ADAMW, TRANSFORMERS = "fused", "adamw-fused", "transformers"
OF_GOALS = (OURS, ADAMW, TRANSFORMERS)


class Row(NamedTuple):
    """A parameter list, how it is stepped, and what the fused step is to reach on it."""

    title: str
    network: str
    most_of_adamw: float  # time over that of fused AdamW, at most
    least_speedup: float | None  # times faster than transformers, at least
    dtype: torch.dtype = torch.float32
    beta1: float | None = None


ROWS = {
    "gpt2": Row("GPT-2 124M", "gpt2", 0.9, 8),
    "t5-small": Row("T5-small", "t5-small", 0.9, 9),
    "vit-b16": Row("ViT-B/16", "vit-b16", 0.9, 9),
    "lora-8b": Row("LoRA r=16 on an 8B decoder", "lora-8b", 0.8, 3.3),
    "resnet50": Row("ResNet-50", "resnet50", 1.3, 10),
    "decoder-600m": Row("600M decoder, bfloat16", "decoder-600m", 0.8, 18, dtype=torch.bfloat16),
    "gpt2-beta1": Row("GPT-2 with beta1=0.9", "gpt2", 1.2, 6, beta1=0.9),
    "widths24": Row("24 layers of 24 widths", "widths24", 0.6, 2.7),
    "train": Row("The main job, train.py", "train", 0.5, None),
}


class Measurement(NamedTuple):
    """Timings by contender."""

    few: dict[str, Timing]  # of those that the goals are about, among themselves
    all: dict[str, Timing]
    missing: dict[str, str]  # those that cannot step the row's parameters, and why
    host_us: float | None  # of Python, a tensor of a fused step, where that takes part


def measure_once(row: Row, keys: list[str], rounds: int) -> Measurement:
    params = make_params(NETWORKS[row.network](), row.dtype)
    few, _ = make_optimizers([key for key in keys if key in OF_GOALS], params, row.beta1)
    timings = compare({key: optimizer.step for key, optimizer in few.items()}, rounds)
    others, missing = make_optimizers([key for key in keys if key not in few], params, row.beta1)
    optimizers = {**few, **others}
    steps = {key: optimizers[key].step for key in keys if key in optimizers}
    every = {key: CONTENDERS[key].every for key in steps}
    of_all = compare(steps, rounds, every=every) if others else timings
    host_us = host_time(optimizers[OURS], len(params), rounds) if OURS in optimizers else None
    return Measurement(timings, of_all, missing, host_us)


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


def measure_and_send(row: Row, keys: list[str], rounds: int, threads: int, to: Connection) -> None:
    torch.set_num_threads(threads)
    to.send(measure_once(row, keys, rounds))


def measure_in_fresh_process(row: Row, keys: list[str], rounds: int) -> Measurement:
    spawn = multiprocessing.get_context("spawn")
    connection, to = spawn.Pipe(duplex=False)
    process = spawn.Process(target=measure_and_send, args=(row, keys, rounds, torch.get_num_threads(), to))
    process.start()
    to.close()
    try:
        measurement: Measurement = connection.recv()
    except EOFError:
        raise SystemExit(f"the measurement of {row.title} failed, see above") from None
    finally:
        process.join()
    return measurement


def measure_row(row: Row, keys: list[str], rounds: int) -> dict[str, Any]:
    measurements = []
    for _ in range(MEASUREMENTS):
        measurements.append(measure_in_fresh_process(row, keys, rounds))
        for timings in measurements[-1][:2]:
            print(f"{row.title}: " + ", ".join(f"{key} {timing.median:.2f} ms" for key, timing in timings.items()), flush=True)
    shapes = NETWORKS[row.network]()
    return {
        "title": row.title,
        "shapes": by_shape(shapes),
        "tensors": len(shapes),
        "parameters": sum(map(math.prod, shapes)),
        "dtype": row.dtype,
        "beta1": row.beta1,
        "rounds_among_all": {key: -(-rounds // CONTENDERS[key].every) for key in measurements[0].all},
        "not_measured": measurements[0].missing,
        "target": {"over_fused_adamw_at_most": row.most_of_adamw, "faster_than_transformers_at_least": row.least_speedup},
        "ms_of_few": [measurement.few for measurement in measurements],
        "ms": [measurement.all for measurement in measurements],
        "host_us_a_tensor": [measurement.host_us for measurement in measurements],
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = options.networks or (["widths24"] if options.quick else list(ROWS))
    rounds = min(3, options.rounds) if options.quick else options.rounds
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = measure_row(ROWS[name], options.contenders or list(CONTENDERS), rounds)
        yield {"rounds": rounds, "rows": rows}


def ratio(measurements: list[dict[str, Any]], over: str, under: str) -> list[float]:
    """median of one contender / that of another, for each measurement; empty where one was not measured."""
    return [ms[over]["median"] / ms[under]["median"] for ms in measurements if over in ms and under in ms]


def both(values: list[float], form: str = ".2f") -> str:
    return ", ".join(format(value, form) for value in values) or "-"


def medians(measurements: list[dict[str, Any]], key: str) -> str:
    return both([ms[key]["median"] for ms in measurements if key in ms], ".1f")


def table(result: dict[str, Any]) -> str:
    """Each row's goals beside what was reached among few, each measured twice; then the milliseconds among all."""
    goals = [
        [
            row["title"],
            *(medians(few, key) for key in OF_GOALS),
            both(ratio(few, OURS, ADAMW)),
            f"<= {row['target']['over_fused_adamw_at_most']:g}",
            both(ratio(few, TRANSFORMERS, OURS), ".1f"),
            "-" if least is None else f">= {least:g}",
            both(ratio(few, TRANSFORMERS, ADAMW), ".1f"),
            both(ratio(row["ms"], TRANSFORMERS, "multi-tensor")),
            both(ratio(row["ms"], "reference", "multi-tensor")),
            both([us for us in row["host_us_a_tensor"] if us is not None]),
        ]
        for row in result["rows"].values()
        for few, least in [(row["ms_of_few"], row["target"]["faster_than_transformers_at_least"])]
    ]
    header = [
        "",
        "fused, ms",
        "fused AdamW, ms",
        "transformers, ms",
        "fused / fused AdamW",
        "goal",
        "transformers / fused",
        "goal",
        "transformers / fused AdamW",
        "transformers / multi-tensor",
        "reference / multi-tensor",
        "Python of a fused step, us a tensor",
    ]
    times = [[CONTENDERS[key].name] + [medians(row["ms"], key) for row in result["rows"].values()] for key in CONTENDERS]
    names = ["ms of a step, all in turn", *(row["title"] for row in result["rows"].values())]
    return f"{markdown_table(header, goals)}\n\n{markdown_table(names, times)}"


def draw(result: dict[str, Any]) -> Any:
    """For each list the contenders' times over that of fused AdamW: a dot a measurement, a black line for the goal."""
    rows = [row for row in result["rows"].values() if any(ADAMW in ms for ms in row["ms"])]
    figure, axes = figures().subplots(figsize=(10, 1.5 + 0.75 * len(rows)))
    labelled = set()
    for y, row in enumerate(rows):
        for key, contender in CONTENDERS.items():
            values = [*ratio(row["ms_of_few"], key, ADAMW), *ratio(row["ms"], key, ADAMW)]
            if values:
                hollow = any(word in contender.name for word in ("foreach", "stochastic", "bfloat16"))
                axes.plot(
                    values,
                    [y] * len(values),
                    "D" if key == OURS else "o",
                    color=color_of(contender.name),
                    markerfacecolor="white" if hollow else None,
                    markersize=8 if key == OURS else 6,
                    zorder=3 if key == OURS else 2,
                    label=None if key in labelled else contender.name,
                )
                labelled.add(key)
        goal = row["target"]["over_fused_adamw_at_most"]
        axes.plot([goal, goal], [y - 0.32, y + 0.32], color="black", linewidth=2, label=None if y else "goal of the fused step")
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time of a step / fused AdamW's, logarithmic", title="One optimizer step")
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument("--networks", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)} (default all)")
    options.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)} (default all)"
    )
    run_profile("step_time", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
