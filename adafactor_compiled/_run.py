"""The body of a step: step counts, numbers, then every part of the plan on its path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adafactor_compiled import _routes, _sharded
from adafactor_compiled._exchange import Exchange
from adafactor_compiled._nonfinite import kept_of, put_back
from adafactor_compiled._numbers import Numbers, plain_numbers
from adafactor_compiled._plan import Entry, Part, Plan, count_step, members_of, path_of, tables_of
from adafactor_compiled._ranges import profiled, range_of_class
from adafactor_compiled._reference import step_parameter
from adafactor_compiled.telemetry import Record


def run(plan: Plan, entries: list[Entry], exchanges: Sequence[Exchange], compiles: bool) -> Record:
    """Step all entries in place; `compiles` says whether compiled parts run compiled."""
    kept = kept_of(entries, plan)
    count_step(entries)
    tables = tables_of(entries)
    finite = _run_sharded(plan, entries, tables, exchanges, compiles) if exchanges else {}
    for part in plan.merged if compiles and not profiled() else plan.batches:
        if part.path == "sharded":
            continue
        with range_of_class(part.shape_class, part.path, len(part.positions)):
            _run_part(part, plan, entries, tables, compiles)
    skipped = put_back(kept, [finite.get(entry.position) for entry in entries])
    params, rms = [entry.param for entry in entries], [entry.state["RMS"] for entry in entries]
    return Record(params, tables, rms, plan.update_rms, skipped)


def _run_part(part: Part, plan: Plan, entries: list[Entry], tables: list[Tensor], compiles: bool) -> None:
    members, numbers = members_of(part, entries, plan.update_rms), [tables[i] for i in part.positions]
    if part.path == "reference":
        for number, i in enumerate(part.positions):
            step_parameter(*entries[i][1:], plan.update_rms[i], members.draws[number] if members.draws else None)
    elif part.path == "compiled" and compiles:
        _routes.step_compiled(part.shape_class, members, numbers)
    else:
        plain = [_plain_numbers(entries[i]) for i in part.positions]
        _routes.step_eager(part.shape_class, members, numbers, plain, part.kept)


def _plain_numbers(entry: Entry) -> Numbers:
    step = entry.state["step"]
    return plain_numbers(entry.group, step.to(entry.state["RMS"].dtype) if isinstance(step, Tensor) else step)


def _run_sharded(
    plan: Plan, entries: list[Entry], tables: list[Tensor], exchanges: Sequence[Exchange], compiles: bool
) -> dict[int, Tensor]:
    """Whether gradients are finite over all ranks, see `_sharded.step`."""
    chosen = [i for part in plan.batches if part.path == "sharded" for i in part.positions]
    jobs = [
        _sharded.Job(entries[i], tables[i], plan.update_rms[i], compiles and path_of(entries[i].group) == "compiled")
        for i in chosen
    ]
    return _sharded.step(exchanges, jobs)
