"""Where the time of one step goes, by call, and how far the calls are from the machine's bandwidth.

The steps run under torch's profiler, in which the package names its calls for the first of their members: "50257x768 float32
fused", the launch of all that a fused step takes, or "64x64 float32 compiled", one of the calls of a compiled step.
Calls of one name are summed. The bytes that their members must move (of a matrix, parameter and gradient
read twice and the parameter written; of a vector, read once and written; state read and written) over their time stand beside
what the machine reaches in a copy and in a read. A matrix that fits in the last cache is read from memory once and the second
time from there, so that it may exceed the memory's bandwidth.

The last step is also written as a trace, NAME.trace.json.gz, for https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, make_params
from _networks import NETWORKS, by_shape
from _shared import COLORS, compare, figures, markdown_table, parser, run_profile
from step_time import ROWS, Row
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import Optimizer

from adafactor_compiled._state.entries import Entry, entries_of
from adafactor_compiled._step.plan import plan_of
from adafactor_compiled._step.ranges import NAME, name_of

PATHS = ["fused", "compiled"]
SHOWN = 10  # names of a list that are shown on their own
MACHINE = {"read_memory": "-", "copy_memory": "--", "read_cache": ":"}  # bandwidths, and their lines in the picture
OUTSIDE = "outside of the calls"
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


def without_count(of_range: str) -> str:
    """`64x64 float32 compiled` of `Adafactor: 8 x 64x64 float32 compiled`."""
    return of_range.removeprefix(NAME).split(" ", 2)[2]


def bytes_of(entry: Entry) -> int:
    """What a step must move for a parameter: see the top of this script."""
    state = sum(x.nbytes for name, x in entry.state.items() if name.startswith("exp_avg"))
    return (5 if entry.param.ndim >= 2 else 3) * entry.param.nbytes + 2 * state


def calls_by_name(optimizer: Optimizer) -> dict[str, dict[str, int]]:
    """How many calls of a name a step makes, the number of their members, and the bytes that these must move."""
    entries = entries_of(optimizer.param_groups, optimizer.state)
    plan = plan_of(entries, None)
    ranges = [] if plan.table is None else [(plan.table.members[0].of, plan.fused, "fused")]
    ranges += [(call.shape_class, list(call.positions), "compiled") for call in plan.calls]
    if plan.uncompiled:
        positions = [i for part in plan.uncompiled for i in part.positions]
        ranges.append((plan.uncompiled[0].shape_class, positions, plan.uncompiled[0].path))
    result: dict[str, dict[str, int]] = {}
    for of, positions, how in ranges:
        name = without_count(name_of(of, len(positions), how))
        total = result.setdefault(name, {"calls": 0, "members": 0, "bytes": 0})
        total["calls"] += 1
        total["members"] += len(positions)
        total["bytes"] += sum(bytes_of(entries[i]) for i in positions)
    return result


def times_of_step(events: list[FunctionEvent]) -> dict[str, float]:
    """Milliseconds by name; what is in no call under OUTSIDE."""
    whole = next(event for event in events if event.name.startswith("Optimizer.step#"))
    result = {OUTSIDE: whole.time_range.elapsed_us() / 1e3}
    for event in events:
        if event.name.startswith(NAME):
            name, ms = without_count(event.name), event.time_range.elapsed_us() / 1e3
            result[name] = result.get(name, 0.0) + ms
            result[OUTSIDE] -= ms
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


def measure_row(name: str, row: Row, path: str, rounds: int, directory: Path) -> dict[str, Any]:
    shapes = NETWORKS[row.network]()
    optimizer = CONTENDERS[path].make(make_params(shapes, row.dtype), row.beta1)
    plain = compare({"step": optimizer.step}, rounds)["step"]
    steps = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            optimizer.step()
        steps.append(times_of_step(list(profiler.events())))
    calls = {OUTSIDE: {"calls": 0, "members": 0, "bytes": 0}, **calls_by_name(optimizer)}
    measured = {name: {"ms": statistics.median(step[name] for step in steps), **of_name} for name, of_name in calls.items()}
    trace = export(profiler, directory / f"{name}.trace.json.gz")
    print(f"{row.title}: {plain} a step; wrote {trace}, {trace.stat().st_size / 1e3:.0f} KB", flush=True)
    return {
        "title": row.title,
        "shapes": by_shape(shapes),
        "dtype": row.dtype,
        "beta1": row.beta1,
        "step_ms": plain,
        "profiled_step_ms": sum(of_name["ms"] for of_name in measured.values()),
        "calls": measured,
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rounds = min(3, options.rounds) if options.quick else options.rounds
    reached = bandwidth(rounds)
    rows = {}
    for name in options.networks or (["widths24"] if options.quick else ROWS):
        rows[name] = measure_row(name, ROWS[name], options.path, rounds, options.traces or options.results)
        gc.collect()
        yield {"rounds": rounds, "path": options.path, "gigabytes_per_second": reached, "rows": rows}


def shown(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The names that take longest, the others together, and what is outside of the calls."""
    calls = dict(row["calls"])
    outside = (OUTSIDE, calls.pop(OUTSIDE))
    ranked = sorted(calls.items(), key=lambda item: -item[1]["ms"])
    rest = [measured for _, measured in ranked[SHOWN:]]
    together = {key: sum(measured[key] for measured in rest) for key in outside[1]}
    return [*ranked[:SHOWN], *([(f"{len(rest)} other names", together)] if rest else []), outside]


def rate(measured: dict[str, Any]) -> float | None:
    """GB/s of the bytes that calls must move; None outside of the calls."""
    return measured["bytes"] / measured["ms"] / 1e6 if measured["bytes"] else None


def table(result: dict[str, Any]) -> str:
    """Bandwidths, then for each list a line for each name."""
    reached = result["gigabytes_per_second"]
    text = [
        "GB/s of this machine: "
        + ", ".join(f"{name.split('_')[0]} in {name.split('_')[1]} {value:.1f}" for name, value in reached.items())
    ]
    for row in result["rows"].values():
        lines = []
        whole = row["profiled_step_ms"]
        for name, measured in shown(row):
            gigabytes = rate(measured)
            counts = [str(measured[key] or "-") for key in ("calls", "members")]
            times = [f"{measured['ms']:.2f}", f"{100 * measured['ms'] / whole:.1f}"]
            lines.append([name, *counts, *times, f"{gigabytes:.1f}" if gigabytes else "-"])
        text.append(f"{row['title']}: {row['step_ms']['median']:.1f} ms a step, {whole:.1f} under the profiler")
        text.append(markdown_table(["first member and function", "calls", "members", "ms", "%", "GB/s"], lines))
    return "\n\n".join(text)


def draw(result: dict[str, Any]) -> Any:
    """Left: time by name. Right: bytes that must be moved over that time, beside the machine's bandwidths."""
    rows = list(result["rows"].values())
    heights = [len(shown(row)) for row in rows]
    figure, axes = figures().subplots(
        len(rows), 2, figsize=(12, 1.2 + 0.34 * sum(heights) + 0.7 * len(rows)), height_ratios=heights, squeeze=False
    )
    for (left, right), row in zip(axes, rows, strict=True):
        calls = shown(row)
        for y, (name, measured) in enumerate(calls):
            left.barh(y, measured["ms"], 0.75, color="#c8c8c8" if name == OUTSIDE else COLORS[result["path"]])
            gigabytes = rate(measured)
            if gigabytes is not None:
                right.barh(y, gigabytes, 0.75, color=COLORS[result["path"]])
                right.annotate(f"{gigabytes:.1f}", (gigabytes, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        left.set_yticks(range(len(calls)), [name for name, _ in calls], fontsize=8)
        right.set_yticks([])
        left.set(xlabel="ms of a step", title=f"{row['title']}, {row['profiled_step_ms']:.1f} ms under the profiler")
        right.set(xlabel="GB/s of the bytes that calls must move", title="Bandwidth reached")
        lines = [
            right.axvline(result["gigabytes_per_second"][name], color="black", linewidth=1.2, linestyle=style, zorder=0)
            for name, style in MACHINE.items()
        ]
        for ax in (left, right):
            ax.set_ylim(len(calls) - 0.5, -0.5)
            ax.grid(visible=False, axis="y")
    reached = [f"torch's best {name.replace('_', ' in ')}" for name in MACHINE]
    figure.legend(lines, reached, loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument("--networks", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)} (default all)")
    options.add_argument("--path", choices=PATHS, default=PATHS[0], help="how to step (default %(default)s)")
    options.add_argument(
        "--traces", type=Path, metavar="DIRECTORY", help="directory for the traces (default: that of the JSON)"
    )
    run_profile("profile_trace", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
