"""The tables and the picture of what gpu.py has written, as far as it came."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from _contenders import CONTENDERS
from _shared import color_of, figures, markdown_table

from _card.steps import ADAMW, CAPTURED, FEW, OTHERS, OURS
from _card.training import KEYS, NONE

TITLES = {
    "gpt2": "GPT-2 124M",
    "decoder-600m": "600M decoder, bfloat16",
    "t5-small": "T5-small",
    "lora-8b": "LoRA r=16 on an 8B decoder",
    "resnet50": "ResNet-50",
}
Result = dict[str, Any]


def table(result: Result) -> str:
    """Checks, the goals beside what was reached, all contenders, and the training step; "-" where it did not come to it."""
    card, machine, parts = result["card"], result["machine"], result["parts"]
    name = card.get("name", "no GPU: a trial of this script")
    where = f"{name}, driver {card['driver']}, CUDA {card['cuda']}, torch {machine['torch']}, {result.get('seconds', 0):.0f} s"
    shown = [where, _checks(parts)] if parts else [where]
    if parts.get("steps") or parts.get("first_steps"):
        shown += [_goals(result), _everyone(parts.get("steps", {}))]
    if parts.get("training"):
        shown.append(_training(parts["training"]))
    errors = [f"- {place}: {error.strip().splitlines()[-1]}" for place, error in _errors(parts)]
    if errors:
        shown.append("Errors, which the JSON has at length:\n\n" + "\n".join(errors))
    return "\n\n".join(shown)


def _at(record: Any, *keys: str) -> Any:
    """The value at a path of keys; None where there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def _show(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _over(value: float | None, under: float | None) -> float | None:
    return None if value is None or not under else value / under


def _median(record: Any, *keys: str) -> float | None:
    return _at(record, *keys, "median")


def _errors(record: Any, place: str = "") -> list[tuple[str, str]]:
    """(where, error) of all errors in the record."""
    found: list[tuple[str, str]] = []
    if isinstance(record, Mapping):
        for key, value in record.items():
            if key == "error" and isinstance(value, str):
                found.append((place, value))
            elif key in ("errors", "replay_errors", "failures"):
                found += [(f"{place}, {name}", text) for name, text in value.items() if isinstance(text, str)]
            found += _errors(value, f"{place}, {key}".removeprefix(", "))
    return found


def _checks(parts: Result) -> str:
    lines = []
    if sanity := {name: x for name, x in parts.get("sanity", {}).items() if isinstance(x, Mapping)}:
        lines.append(["one step of every path", _counted(sanity)])
    if tests := parts.get("tests", {}):
        counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped") if key in tests)
        lines.append([f"pytest -m {tests.get('marker', 'cuda')}", counts or "-"])
    if syncs := parts.get("syncs", {}):
        lines.append(["20 steps that wait for nothing", syncs.get("skipped") or _counted(syncs.get("paths", {}))])
    for case, of_case in (_at(parts, "parity", "errors") or {}).items():
        # A number that is not finite is null in the JSON, and an exception a text.
        errors = {name: x["error"] if x["error"] is not None else math.nan for name, x in of_case.items() if "error" in x}
        errors = {name: x for name, x in errors.items() if isinstance(x, float)}
        lines.append([f"error / change after 5 steps, {case}", ", ".join(f"{name} {x:.1e}" for name, x in errors.items())])
    return markdown_table(["check", "result"], lines)


def _counted(paths: Mapping[str, Any]) -> str:
    failed = [name for name, x in paths.items() if not x.get("ok")]
    return "-" if not paths else f"{len(paths) - len(failed)} of {len(paths)}" + "".join(f"; not {name}" for name in failed)


def _goals(result: Result) -> str:
    """What a step takes, then what it costs beside time; a row a network."""
    goals, steps = result["goals"], result["parts"].get("steps", {})
    cold = result["parts"].get("first_steps", {})
    times, costs = [], []
    for network in dict.fromkeys([*steps, *cold]):
        row, title = steps.get(network, {}), TITLES.get(network, network)
        ours, adamw = (_median(row, "few", key, "device_ms") for key in FEW)
        replay, adamw_replay = (_median(row, "replay", key, "device_ms") for key in FEW)
        host = [_show(_median(row, "few", key, "host_ms")) for key in FEW]
        speedup = _over(_median(row, "all", "transformers", "device_ms"), _median(row, "all", OURS, "device_ms"))
        most = goals["over_fused_adamw_at_most"].get(network)
        times.append(
            [
                title,
                _show(_at(row, "floor_ms")),
                *(_show(x) for x in (ours, adamw, _over(ours, adamw))),
                _show(most, "g"),
                *(_show(x) for x in (replay, adamw_replay, _over(replay, adamw_replay))),
                *host,
                _show(speedup, ".1f"),
            ]
        )
        peaks = [_over(_at(row, "peak_bytes", key), _at(row, "parameter_bytes")) for key in FEW]
        costs.append(
            [
                title,
                _show(_at(cold, network, "first_step_s"), ".0f"),
                _show(_at(row, "first_step", "first_step_s"), ".1f"),
                *(_show(None if x is None else 100 * x, ".1f") for x in peaks),
                *(_show(_at(row, "kernels", key, "launches"), "d") for key in FEW),
            ]
        )
    header = ["", "floor, ms", "fused, device ms", "fused AdamW", "ratio", "goal, at most", "fused, replay ms"]
    header += ["fused AdamW", "ratio", "fused, host ms", "fused AdamW", "times faster than transformers"]
    others = [
        "",
        "first step cold, s",
        "warm, s",
        "peak of a step, % of the parameters",
        "fused AdamW",
        "launches",
        "fused AdamW",
    ]
    return (
        f"{markdown_table(header, times)}\n\n{markdown_table(others, costs)}\n\n"
        f"Goals: at least {goals['faster_than_transformers_at_least']:g} times faster than transformers, at most "
        f"{goals['peak_percent_of_parameters']:g} % at the peak, a cold first step under "
        f"{goals['seconds_of_a_cold_first_step']:g} s. The floor is what Adafactor must move (a matrix and its gradient read "
        "twice, the matrix written, the factors read and written) at the speed of a copy."
    )


def _everyone(steps: Result) -> str:
    rows = list(steps.values())
    lines = []
    for key in [*FEW, *OTHERS]:
        cells = []
        for row in rows:
            times = [_median(row, "all", key, "device_ms"), _median(row, "all", key, "host_ms")]
            cells.append(" / ".join(_show(x) for x in times) if None not in times else "-")
        lines.append([CONTENDERS[key].name, *cells])
    for key in CAPTURED:
        lines.append([f"{CONTENDERS[key].name}, replay", *(_show(_median(row, "replay", key, "device_ms")) for row in rows)])
    return markdown_table(["all in turn, device / host ms", *(TITLES.get(name, name) for name in steps)], lines)


def _training(record: Result) -> str:
    modes = record.get("ms", {})
    lines = [
        ["no optimizer" if key == NONE else CONTENDERS[key].name, *(_show(_median(times, key)) for times in modes.values())]
        for key in [NONE, *KEYS]
    ]
    return markdown_table([f"training step of {record.get('parameters', 0) / 1e6:.1f}M parameters, ms", *modes], lines)


def draw(result: Result) -> Any:
    """For each network the contenders' times on the device over that of fused AdamW; and the training step."""
    steps = {name: row for name, row in result["parts"].get("steps", {}).items() if _median(row, "few", ADAMW, "device_ms")}
    training = _at(result, "parts", "training", "ms") or {}
    figure, (left, right) = figures().subplots(1, 2, figsize=(13, 2.4 + 0.6 * len(steps)), width_ratios=(3, 2))
    labelled: set[str] = set()

    def dot(value: float | None, y: int, key: str, **look: Any) -> None:
        if value is not None:
            label = CONTENDERS[key].name + (", replayed" if "fillstyle" in look else "")
            known = label in labelled
            labelled.add(label)
            marker = "D" if key == OURS else "o"
            left.plot(value, y, marker, color=color_of(label), linestyle="", label=None if known else label, **look)

    for y, (network, row) in enumerate(steps.items()):
        under = _median(row, "few", ADAMW, "device_ms")
        for key in OTHERS:
            dot(_over(_median(row, "all", key, "device_ms"), _median(row, "all", ADAMW, "device_ms")), y, key)
        dot(_over(_median(row, "few", OURS, "device_ms"), under), y, OURS, markersize=8)
        dot(_over(_median(row, "replay", OURS, "device_ms"), under), y, OURS, markersize=8, fillstyle="none")
        floor = _over(row["floor_ms"], under)
        left.plot([floor] * 2, [y - 0.3, y + 0.3], color="grey", linestyle=":", label=None if y else "floor of Adafactor")
        goal = result["goals"]["over_fused_adamw_at_most"].get(network)
        if goal is not None:
            left.plot([goal] * 2, [y - 0.3, y + 0.3], color="black", linewidth=2, label=None if y else "goal")
    left.set_yticks(range(len(steps)), [TITLES.get(name, name) for name in steps])
    left.invert_yaxis()
    left.set(xscale="log", xlabel="device time of a step / fused AdamW's, logarithmic", title="One optimizer step")
    bars = [(mode, key, times[key]["median"]) for mode, times in training.items() for key in times]
    right.barh(range(len(bars)), [ms for _, _, ms in bars], color=[color_of(_name(key)) for _, key, _ in bars])
    right.set_yticks(range(len(bars)), [f"{_name(key)} ({mode})" for mode, key, _ in bars], fontsize=7)
    right.invert_yaxis()
    right.grid(visible=False, axis="y")
    right.set(xlabel="ms", title="A whole training step")
    if labelled:
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _name(key: str) -> str:
    return key if key == NONE else CONTENDERS[key].name
