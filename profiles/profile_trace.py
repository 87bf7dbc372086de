"""Where the time of one compiled step goes, by shape class and pass, and how far each class is from the machine's bandwidth.

The steps run under torch's profiler, in which the package names its shape classes and compiled passes. The bytes that a class
must move (of a matrix, parameter and gradient read twice and the parameter written; of a vector, read once and written; state
read and written) over its time stand beside what the machine reaches in a copy and in a read. A matrix that fits in the last
cache is read from memory once and the second time from there, so that it may exceed the memory's bandwidth.

The last step is also written as a trace, NAME.trace.json.gz, for https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, make_params
from _networks import NETWORKS, by_shape
from _shared import COLORS, compare, figures, markdown_table, parser, run_profile
from adafactor_compiled._ranges import CLASS, PASS
from adafactor_compiled._shape_class import JOINED_NUMEL
from step_time import ROWS, Row
from torch.autograd.profiler_util import FunctionEvent

DEFAULT = ["gpt2", "lora-8b", "resnet50"]
SHOWN = 10  # classes of a list that are shown on their own
BETWEEN = "between passes"
MACHINE = {"read_memory": "-", "copy_memory": "--", "read_cache": ":"}  # bandwidths, and their lines in the picture
OUTSIDE = "outside of the classes"
MEMORY_NUMEL, CACHE_NUMEL = 1 << 27, 1 << 20  # 512 MB and 4 MB of float32


def bandwidth(rounds: int) -> dict[str, float]:
    """GB/s that torch reaches on this machine: the best of its ways to read, and a copy (both its read and its write count)."""
    result = {}
    for name, numel, calls in (("memory", MEMORY_NUMEL, 1), ("cache", CACHE_NUMEL, 50)):
        x, y = torch.ones(numel), torch.zeros(numel)
        ways = {"sum": x.sum, "dot": lambda x=x: torch.dot(x, x), "max": x.max, "copy": lambda x=x, y=y: y.copy_(x)}
        ms = {way: timing.median for way, timing in compare(ways, rounds, calls=calls).items()}
        result[f"copy_{name}"] = 2 * x.nbytes / ms.pop("copy") / 1e6
        result[f"read_{name}"] = x.nbytes / min(ms.values()) / 1e6
    return result


def bytes_of_class(name: str, row: Row) -> int:
    """What a step must move for a range "Adafactor class: 12 x 768x3072 float32 compiled": see the top of this script."""
    members, _, text, *_ = name.removeprefix(CLASS).split()
    if text == "vectors":  # all short ones of the list
        sizes = [math.prod(shape) for shape in NETWORKS[row.network]() if len(shape) < 2]
        members, text = "1", str(sum(size for size in sizes if size <= JOINED_NUMEL))
    shape = [] if text == "scalar" else [int(size) for size in text.split("x")]
    numel, state_size = math.prod(shape), 4  # the lists' state is float32
    if len(shape) >= 2:
        moved = 5 * numel * row.dtype.itemsize
        second_moments = numel // shape[-1] + numel // shape[-2]
    else:
        moved = 3 * numel * row.dtype.itemsize
        second_moments = numel
    momentum = numel if row.beta1 is not None else 0
    return int(members) * (moved + 2 * state_size * (second_moments + momentum))


def times_of_step(events: list[FunctionEvent]) -> dict[str, dict[str, float]]:
    """Milliseconds by class and pass; what is in no class under OUTSIDE, in no pass under BETWEEN."""
    whole = next(event for event in events if event.name.startswith("Optimizer.step#"))
    result: dict[str, dict[str, float]] = {OUTSIDE: {BETWEEN: whole.time_range.elapsed_us() / 1e3}}
    classes = [event for event in events if event.name.startswith(CLASS)]
    passes = [event for event in events if event.name.startswith(PASS)]
    for of_class in classes:
        start, end = of_class.time_range.start, of_class.time_range.end
        elapsed = of_class.time_range.elapsed_us() / 1e3
        times = result.setdefault(of_class.name, {BETWEEN: 0.0})
        times[BETWEEN] += elapsed
        result[OUTSIDE][BETWEEN] -= elapsed
        for event in passes:
            if start <= event.time_range.start and event.time_range.end <= end:
                name, ms = event.name.removeprefix(PASS), event.time_range.elapsed_us() / 1e3
                times[name] = times.get(name, 0.0) + ms
                times[BETWEEN] -= ms
    return result


def export(profiler: torch.profiler.profile, path: Path) -> Path:
    """Write a trace, compressed, without the names of the machine and of temporary files that are in it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        trace = json.loads(raw.read_text(encoding="utf-8"))
    kept = {key: trace[key] for key in ("schemaVersion", "displayTimeUnit", "traceEvents") if key in trace}
    path.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), mtime=0))
    return path


def measure_row(name: str, row: Row, rounds: int, directory: Path) -> dict[str, Any]:
    shapes = NETWORKS[row.network]()
    optimizer = CONTENDERS["compiled"].make(make_params(shapes, row.dtype), row.beta1)
    plain = compare({"step": optimizer.step}, rounds)["step"]
    steps = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            optimizer.step()
        steps.append(times_of_step(list(profiler.events())))
    classes = {}
    for key, passes in steps[0].items():
        ms = {name: statistics.median(step[key].get(name, 0.0) for step in steps) for name in passes}
        moved = 0 if key == OUTSIDE else bytes_of_class(key, row)
        classes[key.removeprefix(CLASS)] = {"ms": sum(ms.values()), "passes_ms": ms, "bytes": moved}
    trace = export(profiler, directory / f"{name}.trace.json.gz")
    print(f"{row.title}: {plain} a step; wrote {trace}, {trace.stat().st_size / 1e3:.0f} KB", flush=True)
    return {
        "title": row.title,
        "shapes": by_shape(shapes),
        "dtype": row.dtype,
        "beta1": row.beta1,
        "step_ms": plain,
        "profiled_step_ms": sum(times["ms"] for times in classes.values()),
        "classes": classes,
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rounds = min(3, options.rounds) if options.quick else options.rounds
    reached = bandwidth(rounds)
    rows = {}
    for name in options.networks or (["widths24"] if options.quick else DEFAULT):
        rows[name] = measure_row(name, ROWS[name], rounds, options.traces or options.results)
        gc.collect()
        yield {"rounds": rounds, "gigabytes_per_second": reached, "rows": rows}


def shown(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The classes that take longest, the others together, and what is outside of the classes."""
    classes = dict(row["classes"])
    outside = (OUTSIDE, classes.pop(OUTSIDE))
    ranked = sorted(classes.items(), key=lambda item: -item[1]["ms"])
    rest = [measured for _, measured in ranked[SHOWN:]]
    if not rest:
        return [*ranked, outside]
    passes: dict[str, float] = {}
    for measured in rest:
        for name, ms in measured["passes_ms"].items():
            passes[name] = passes.get(name, 0.0) + ms
    together = {"ms": sum(passes.values()), "passes_ms": passes, "bytes": sum(measured["bytes"] for measured in rest)}
    return [*ranked[:SHOWN], (f"{len(rest)} other classes", together), outside]


def rate(measured: dict[str, Any]) -> float | None:
    """GB/s of the bytes that a class must move; None outside of the classes."""
    return measured["bytes"] / measured["ms"] / 1e6 if measured["bytes"] else None


def table(result: dict[str, Any]) -> str:
    """Bandwidths, then for each list its classes, with a line for each pass of a class."""
    reached = result["gigabytes_per_second"]
    text = [
        "GB/s of this machine: "
        + ", ".join(f"{name.split('_')[0]} in {name.split('_')[1]} {value:.1f}" for name, value in reached.items())
    ]
    for row in result["rows"].values():
        lines = []
        whole = row["profiled_step_ms"]
        for name, measured in shown(row):
            passes = measured["passes_ms"] if measured["bytes"] else {}
            gigabytes = rate(measured)
            cells = [f"{measured['ms']:.2f}", f"{100 * measured['ms'] / whole:.1f}", f"{gigabytes:.1f}" if gigabytes else "-"]
            lines.append([name, "all", *cells])
            lines += [["", key, f"{ms:.2f}", f"{100 * ms / whole:.1f}", ""] for key, ms in passes.items()]
        text.append(f"{row['title']}: {row['step_ms']['median']:.1f} ms a step, {whole:.1f} under the profiler")
        text.append(markdown_table(["members x shape", "pass", "ms", "%", "GB/s"], lines))
    return "\n\n".join(text)


def draw(result: dict[str, Any]) -> Any:
    """Left: time of each class, by pass. Right: bytes that it must move over that time, beside the machine's bandwidths."""
    rows = list(result["rows"].values())
    heights = [len(shown(row)) for row in rows]
    figure, axes = figures().subplots(
        len(rows), 2, figsize=(12, 1.2 + 0.34 * sum(heights) + 0.7 * len(rows)), height_ratios=heights, squeeze=False
    )
    names = list(dict.fromkeys(p for row in rows for measured in row["classes"].values() for p in measured["passes_ms"]))
    palette = dict(zip((name for name in names if name != BETWEEN), COLORS.values(), strict=False))
    for (left, right), row in zip(axes, rows, strict=True):
        classes = shown(row)
        at = range(len(classes))
        for y, (_, measured) in enumerate(classes):
            start = 0.0
            for name, ms in measured["passes_ms"].items():
                left.barh(y, ms, 0.75, left=start, color=palette.get(name, "#c8c8c8"))
                start += ms
            gigabytes = rate(measured)
            if gigabytes is not None:
                right.barh(y, gigabytes, 0.75, color=COLORS["compiled"])
                right.annotate(f"{gigabytes:.1f}", (gigabytes, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_yticks(at, [name.removesuffix(" compiled") for name, _ in classes], fontsize=8)
        right.set_yticks([])
        left.set(xlabel="ms of a step", title=f"{row['title']}, {row['profiled_step_ms']:.1f} ms under the profiler")
        right.set(xlabel="GB/s of the bytes that a class must move", title="Bandwidth reached")
        lines = [
            right.axvline(result["gigabytes_per_second"][name], color="black", linewidth=1.2, linestyle=style, zorder=0)
            for name, style in MACHINE.items()
        ]
        for ax in (left, right):
            ax.set_ylim(len(classes) - 0.5, -0.5)
            ax.grid(visible=False, axis="y")
    handles = [figures().Rectangle((0, 0), 1, 1, color=palette.get(name, "#c8c8c8")) for name in names]
    reached = [f"torch's best {name.replace('_', ' in ')}" for name in MACHINE]
    figure.legend([*handles, *lines], [*names, *reached], loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument("--networks", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)}")
    options.add_argument(
        "--traces", type=Path, metavar="DIRECTORY", help="directory for the traces (default: that of the JSON)"
    )
    run_profile("profile_trace", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
