"""The tables and the picture of what gpu.py has written, as far as it came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import train_loop
from _contenders import CONTENDERS
from _shared import dots, markdown_table

from _card.steps import ADAMW, LISTS, OURS

Result = dict[str, Any]


def number(record: Any, *keys: str) -> float:
    """The number at a path of keys; NaN where there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return math.nan if record is None else float(record)


def show(value: float, form: str = ".2f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def median(row: Result, group: str, key: str, what: str = "device_ms") -> float:
    return number(row, group, key, what, "median")


def table(result: Result) -> str:
    """Checks, what a step takes beside fused AdamW's, all contenders, and the training step, as far as it came to them."""
    card, parts, versions = result["card"], result["parts"], f"torch {result['machine']['torch']}"
    versions += f", driver {result['card']['driver']}, CUDA {result['card']['cuda']}, {result.get('seconds', 0):.0f} s"
    shown = [f"{card.get('name', 'no GPU: a trial of this script')}, {versions}", _checks(parts)]
    if "steps" in parts or "first_steps" in parts:
        shown.append(_costs(parts))
    if "timings" in parts.get("training", {}):
        shown.append(train_loop.table(parts["training"]))
    errors = [f"- {place}: {error.strip().splitlines()[-1]}" for place, error in _errors(parts)]
    if errors:
        shown.append("Errors, which the JSON has at length:\n\n" + "\n".join(errors))
    return "\n\n".join(shown)


def _errors(record: Any, place: str = "", within: bool = False) -> Iterator[tuple[str, str]]:
    """(where, error) of all errors in the record."""
    for key, value in record.items() if isinstance(record, Mapping) else ():
        where = place if key == "error" else f"{place}, {key}".removeprefix(", ")
        if isinstance(value, str) and (within or key == "error"):
            yield where, value
        yield from _errors(value, where, key in ("errors", "failures"))


def _checks(parts: Result) -> str:
    lines = []
    if "sanity" in parts:
        paths = {name: x for name, x in parts["sanity"].items() if isinstance(x, Mapping)}
        lines.append(["one step of every path", _counted(paths)])
        errors = ", ".join(f"{name} {show(number(x, 'error'), '.1e')}" for name, x in paths.items() if "ok" in x)
        lines.append(["its error / its change", errors])
    if tests := parts.get("tests"):
        counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped") if key in tests)
        lines.append(["pytest -m cuda", counts or "-"])
    if syncs := parts.get("syncs"):
        lines.append(["20 steps that wait for nothing", syncs.get("skipped") or _counted(syncs.get("paths", {}))])
    return markdown_table(["check", "result"], lines)


def _counted(paths: Mapping[str, Any]) -> str:
    failed = [name for name, x in paths.items() if not x.get("ok")]
    return f"{len(paths) - len(failed)} of {len(paths)}" + "".join(f"; not {name}" for name in failed)


def groups_of(row: Result) -> dict[str, str]:
    """The contenders, and whether they were measured among few or among all."""
    few = row.get("few", {})
    return {key: "few" if key in few else "all" for key in [*few, *row.get("all", {})]}


def _costs(parts: Result) -> str:
    """For each network what a step of every contender takes and holds, and what our first one takes."""
    header = ["a step, all in turn", "device, ms", "/ fused AdamW", "host, ms", "peak, % of the parameters"]
    rows, first_steps = [], []
    for network, row in parts.get("steps", {}).items():
        for key, group in groups_of(row).items():
            times = [median(row, group, key), median(row, group, key) / median(row, group, ADAMW)]
            peak = 100 * number(row, "peak_bytes", key) / number(row, "parameter_bytes")
            shown = [show(x) for x in (*times, median(row, group, key, "host_ms"), peak)]
            rows.append([f"{LISTS[network].title}: {CONTENDERS[key].name}", *shown])
    for network in parts.get("first_steps", {}):
        warm = number(parts, "steps", network, "first", OURS, "first_step_s")
        first_steps.append([LISTS[network].title, show(number(parts, "first_steps", network, "first_step_s")), show(warm)])
    return f"{markdown_table(header, rows)}\n\n{markdown_table(['first step, s', 'cold', 'warm'], first_steps)}"


def draw(result: Result) -> Any:
    """For each network the contenders' times on the device over that of fused AdamW; and the training step."""
    rows: dict[str, Any] = {}
    for network, row in result["parts"].get("steps", {}).items():
        ratios = [(key, median(row, group, key) / median(row, group, ADAMW)) for key, group in groups_of(row).items()]
        rows[LISTS[network].title] = [(CONTENDERS[key].name, x) for key, x in ratios if not math.isnan(x)]
    training = result["parts"].get("training", {}).get("timings", {})
    modes = {mode: [(name, x["median"]) for name, x in timings.items()] for mode, timings in training.items()}
    panels = {"One optimizer step, device time / fused AdamW's": rows, "A training step, ms": modes}
    return dots(panels, "logarithmic")
