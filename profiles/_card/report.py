"""The tables and the picture of what gpu.py has written, as far as it came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import train_loop
from _contenders import CONTENDERS
from _shared import dots, markdown_table

from _card.steps import ADAMW, FEW, LISTS, OTHERS, OURS

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
    card, parts = result["card"], result["parts"]
    name = card.get("name", "no GPU: a trial of this script")
    torch_version, seconds = result["machine"]["torch"], result.get("seconds", 0)
    shown = [f"{name}, driver {card['driver']}, CUDA {card['cuda']}, torch {torch_version}, {seconds:.0f} s", _checks(parts)]
    if "steps" in parts or "first_steps" in parts:
        shown += [_costs(parts), _everyone(parts.get("steps", {}))]
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
        lines.append([f"pytest -m {tests.get('marker', 'cuda')}", counts or "-"])
    if syncs := parts.get("syncs"):
        lines.append(["20 steps that wait for nothing", syncs.get("skipped") or _counted(syncs.get("paths", {}))])
    return markdown_table(["check", "result"], lines)


def _counted(paths: Mapping[str, Any]) -> str:
    failed = [name for name, x in paths.items() if not x.get("ok")]
    return f"{len(paths) - len(failed)} of {len(paths)}" + "".join(f"; not {name}" for name in failed)


def _costs(parts: Result) -> str:
    """A row a network: what a step takes of the device and the host, what the first one takes, what it holds."""
    rows = []
    for network in dict.fromkeys([*parts.get("steps", {}), *parts.get("first_steps", {})]):
        row = parts.get("steps", {}).get(network, {})
        times = [median(row, "few", key, what) for what in ("device_ms", "host_ms") for key in FEW]
        speedup = median(row, "all", "transformers") / median(row, "all", OURS)
        first = [number(parts.get("first_steps"), network, "first_step_s"), number(row, "first_step", "first_step_s")]
        peaks = [100 * number(row, "peak_bytes", key) / number(row, "parameter_bytes") for key in FEW]
        numbers = [*times, times[0] / times[1], speedup, *first, *peaks]
        rows.append([LISTS[network].title, *map(show, numbers)])
    header = ["", "fused, device ms", "fused AdamW", "fused, host ms", "fused AdamW", "fused / fused AdamW, device"]
    header += ["times faster than transformers", "first step cold, s", "warm, s", "peak, % of the parameters", "fused AdamW"]
    return markdown_table(header, rows)


def _everyone(steps: Result) -> str:
    lines = []
    for key in [*FEW, *OTHERS]:
        times = [(median(row, "all", key), median(row, "all", key, "host_ms")) for row in steps.values()]
        lines.append([CONTENDERS[key].name, *(f"{show(device)} / {show(host)}" for device, host in times)])
    return markdown_table(["all in turn, device / host ms", *(LISTS[network].title for network in steps)], lines)


def draw(result: Result) -> Any:
    """For each network the contenders' times on the device over that of fused AdamW; and the training step."""
    rows: dict[str, Any] = {}
    for network, row in result["parts"].get("steps", {}).items():
        ratios = {
            key: median(row, group, key) / median(row, group, ADAMW)
            for group, keys in (("all", OTHERS), ("few", FEW))
            for key in keys
        }
        rows[LISTS[network].title] = [(CONTENDERS[key].name, x) for key, x in ratios.items() if not math.isnan(x)]
    training = result["parts"].get("training", {}).get("timings", {})
    modes = {mode: [(name, x["median"]) for name, x in timings.items()] for mode, timings in training.items()}
    panels = {"One optimizer step, device time / fused AdamW's": rows, "A training step, ms": modes}
    return dots(panels, "logarithmic")
