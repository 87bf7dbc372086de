"""Where the time of one step goes, by call, and how far the calls are from the machine's bandwidth.

The steps run under torch's profiler, in which the package names its calls for the first of their members: "50257x768 float32
fused", the launch of all that a fused step takes, or "64x64 float32 compiled", one of the calls of a compiled step.
Calls of one name are summed. The bytes that their members must move (of a matrix, parameter and gradient read twice and the
parameter written; of a vector, read once and written; state read and written) over their time stand beside what torch reaches
in memory. A matrix that fits in the last cache is read from there the second time, so that it may exceed that.

The last step is also written as a trace, NAME.trace.json.gz, for https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, make_params
from _networks import ROWS, Row, rows_of
from _shared import compare, dots, markdown_table, parser, run_profile
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import Optimizer

from adafactor_compiled._step.ranges import NAME

OUTSIDE = "outside of the calls"
MEMORY_NUMEL = 1 << 27  # 512 MB of float32


def bandwidth(rounds: int) -> dict[str, float]:
    """GB/s that torch reaches in memory: the best of its ways to read, and a copy (both its read and its write count)."""
    x, y = torch.ones(MEMORY_NUMEL), torch.zeros(MEMORY_NUMEL)
    ways = {"sum": x.sum, "dot": lambda: torch.dot(x, x), "max": x.max, "copy": lambda: y.copy_(x)}
    ms = {way: timing.median for way, timing in compare(ways, rounds).items()}
    return {"copy_memory": 2 * x.nbytes / ms.pop("copy") / 1e6, "read_memory": x.nbytes / min(ms.values()) / 1e6}


def bytes_of(param: Tensor, state: dict[str, Any]) -> int:
    """What a step must move for a parameter: see the top of this script."""
    kept = sum(x.nbytes for name, x in state.items() if name.startswith("exp_avg"))
    return (5 if param.ndim >= 2 else 3) * param.nbytes + 2 * kept


def calls_of(events: list[FunctionEvent]) -> dict[str, dict[str, float]]:
    """The calls of a step by name: how many they are, of how many members, how long; what is in none under OUTSIDE."""
    whole = next(event for event in events if event.name.startswith("Optimizer.step#"))
    result = {OUTSIDE: {"ms": whole.time_range.elapsed_us() / 1e3, "calls": 0, "members": 0}}
    for event in events:
        if event.name.startswith(NAME):
            members, _, name = event.name.removeprefix(NAME).split(" ", 2)
            ms, of_name = event.time_range.elapsed_us() / 1e3, result.setdefault(name, {"ms": 0.0, "calls": 0, "members": 0})
            of_name.update(ms=of_name["ms"] + ms, calls=of_name["calls"] + 1, members=of_name["members"] + int(members))
            result[OUTSIDE]["ms"] -= ms
    return result


def bytes_by_name(names: Iterable[str], optimizer: Optimizer) -> dict[str, int]:
    """What the members of calls must move."""
    result = dict.fromkeys(names, 0)
    *_, others = (name for name in result if not name.endswith(" compiled"))
    for param, state in optimizer.state.items():
        # Members of a compiled call have one shape; a fused or an eager step is named for the first of all that it takes.
        of_shape = f"{'x'.join(map(str, param.shape))} {str(param.dtype).removeprefix('torch.')} compiled"
        result[of_shape if of_shape in result else others] += bytes_of(param, state)
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
    optimizer = CONTENDERS[path].make(make_params(row.shapes(), row.dtype), row.beta1)
    plain = compare({"step": optimizer.step}, rounds)["step"]
    steps = []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            optimizer.step()
        steps.append(calls_of(list(profiler.events())))
    moved = bytes_by_name(steps[-1], optimizer)
    measured = {
        name: {**of_name, "ms": statistics.median(step[name]["ms"] for step in steps), "bytes": moved[name]}
        for name, of_name in steps[-1].items()
    }
    trace = export(profiler, directory / f"{name}.trace.json.gz")
    print(f"{row.title}: {plain} a step; wrote {trace}, {trace.stat().st_size / 1e3:.0f} KB", flush=True)
    profiled = sum(of_name["ms"] for of_name in measured.values())
    return {**row.described(), "step_ms": plain, "profiled_step_ms": profiled, "calls": measured}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    reached, rows = bandwidth(options.rounds), {}
    for name, row in rows_of(options).items():
        rows[name] = measure_row(name, row, options.path, options.rounds, options.results)
        gc.collect()
        yield {"rounds": options.rounds, "path": options.path, "gigabytes_per_second": reached, "rows": rows}


def rate(measured: dict[str, Any]) -> float:
    """GB/s of the bytes that calls must move."""
    return measured["bytes"] / measured["ms"] / 1e6


def table(result: dict[str, Any]) -> str:
    """Bandwidths, then for each list a line for each name."""
    reached = (f"{name.replace('_', ' in ')} {value:.1f}" for name, value in result["gigabytes_per_second"].items())
    text = [f"GB/s of this machine: {', '.join(reached)}"]
    for row in result["rows"].values():
        whole, lines = row["profiled_step_ms"], []
        for name, measured in sorted(row["calls"].items(), key=lambda call: -call[1]["ms"]):
            counts = [str(measured[key] or "-") for key in ("calls", "members")]
            times = [f"{measured['ms']:.2f}", f"{100 * measured['ms'] / whole:.1f}"]
            lines.append([name, *counts, *times, f"{rate(measured):.1f}" if measured["bytes"] else "-"])
        text.append(f"{row['title']}: {row['step_ms']['median']:.1f} ms a step, {whole:.1f} under the profiler")
        text.append(markdown_table(["first member and function", "calls", "members", "ms", "%", "GB/s"], lines))
    return "\n\n".join(text)


def draw(result: dict[str, Any]) -> Any:
    """Bytes that calls must move over their time, beside what torch reads from memory; the longest calls first."""
    path, reached = result.get("path", "fused"), ("torch reads memory", result["gigabytes_per_second"]["read_memory"])
    rows = {
        f"{row['title']}: {name}": [reached, (path, rate(measured))]
        for row in result["rows"].values()
        for name, measured in sorted(row["calls"].items(), key=lambda call: -call[1]["ms"])
        if measured["bytes"]
    }
    return dots({"GB/s of the bytes that calls must move": rows}, "logarithmic")


if __name__ == "__main__":
    options = parser(__doc__, networks=ROWS)
    options.add_argument("--path", choices=["fused", "compiled"], default="fused", help="how to step (default %(default)s)")
    run_profile("profile_trace", options.parse_args(), measure, table, draw)
