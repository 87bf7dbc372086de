"""The body of a step: step counts, numbers, then every call and every part of the plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adafactor_compiled._fused.launches import skips_by_itself
from adafactor_compiled._fused.operator import step_members
from adafactor_compiled._sharded import step as sharded
from adafactor_compiled._sharded.exchange import Exchange
from adafactor_compiled._state.entries import Entry, count_step
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._state.views import with_dims_last
from adafactor_compiled._step.calls import Tables, members_as_they_are, members_of, run_call
from adafactor_compiled._step.fused import launched_of
from adafactor_compiled._step.nonfinite import kept_of, put_back
from adafactor_compiled._step.plan import Part, Plan, is_padded
from adafactor_compiled._step.ranges import UNNAMED, profiled, range_of_call, range_of_part, range_of_table
from adafactor_compiled._step.record import Record
from adafactor_compiled._update import eager, foreach, padded, reference
from adafactor_compiled._update.numbers import Numbers, plain_numbers, tables_of
from adafactor_compiled._update.rounding import draws_of_entries


def run(plan: Plan, entries: list[Entry], addresses: list[int], exchanges: Sequence[Exchange], compiles: bool) -> Record:
    """Step all entries in place.

    Args:
        plan: the plan of the step.
        entries: of the step.
        addresses: of the members of its table.
        exchanges: of sharded parameters.
        compiles: whether what is to be compiled runs compiled, by itself or as part of a graph.
    """
    by_themselves = {i for i in plan.fused if skips_by_itself(entries[i].param.device)}
    kept, all_entries = kept_of(entries, plan.update_rms, by_themselves), entries
    count_step(entries)
    entries = with_dims_last(entries, plan.moved)
    tables, named = Tables(tables_of(entries), _draws_of(plan, all_entries)), profiled()
    launched = None if plan.table is None else launched_of(plan, addresses, tables)
    finite: dict[int, Tensor] = {}
    at_once: set[int] = set()
    with range_of_table(plan.table) if named and plan.table is not None else UNNAMED:
        if exchanges:
            jobs = _jobs_of(plan, entries, tables.tables, compiles)
            finite, at_once = sharded.step(exchanges, jobs, launched)
        elif launched is not None:
            at_once = launched.table.run(launched.found)
    at_once = {plan.fused[j] for j in at_once}
    measured: list[tuple[Sequence[int], Tensor]] = []
    # All views first: after a large call Python finds nothing in cache, and each takes 5 us instead of 1.
    calls = [(call, members_of(call, entries, tables)) for call in plan.calls] if compiles else []
    for call, members in calls:
        with range_of_call(call) if named else UNNAMED:
            measured.append((call.positions, run_call(call, members)))
    if plan.table is None and plan.fused:
        step_members([entries[i] for i in plan.fused], [tables.tables[i] for i in plan.fused], _some(tables, plan.fused))
    for part in plan.eager if compiles else plan.all_eager:
        with range_of_part(part) if named else UNNAMED:
            measured += _run_part(part, plan, entries, tables)
    _keep_measured(measured, plan, entries)
    skipped = put_back(kept, [finite.get(entry.position) for entry in entries])
    for i in by_themselves:
        if all_entries[i].group["nonfinite"] == "skip":
            skipped[i] = torch.tensor(i in at_once, device="cpu")
            all_entries[i].state["step"] -= int(i in at_once)
    params, rms = [entry.param for entry in all_entries], [entry.state["RMS"] for entry in entries]
    return Record(params, tables.tables, rms, plan.update_rms, skipped)


def _some(tables: Tables, positions: Sequence[int]) -> list[Tensor | None]:
    return [tables.draws_of_each.get(i) for i in positions]


def _draws_of(plan: Plan, entries: list[Entry]) -> dict[int, Tensor]:
    """What determines the noise of the entries that are rounded stochastically, by their positions among all."""
    members = [] if plan.table is None else plan.table.members
    origins = {i: x.placed.origin for i, x in zip(plan.fused, members, strict=False) if x.placed is not None}
    rounding = [i for i, x in enumerate(entries) if wants_rounding(x.param.dtype, x.group) and i not in plan.sharded]
    draws = draws_of_entries([entries[i] for i in rounding], [origins.get(i, Origin()) for i in rounding])
    return dict(zip(rounding, draws, strict=True))


def _keep_measured(measured: list[tuple[Sequence[int], Tensor]], plan: Plan, entries: list[Entry]) -> None:
    """Put the RMS of parameters and updates, each [2, k or more], where they are kept: one copy a device."""
    for of_device in group_by_key(x.device for _, x in measured).values():
        rms, update_rms = (x.unbind() for x in torch.cat([measured[j][1] for j in of_device], 1).unbind())
        to: list[Tensor] = []
        new: list[Tensor] = []
        start = 0
        for positions, x in (measured[j] for j in of_device):
            stop = start + len(positions)
            to += [entries[i].state["RMS"] for i in positions] + [plan.update_rms[i] for i in positions]
            new += rms[start:stop] + update_rms[start:stop]
            start += x.shape[1]
        torch._foreach_copy_(to, new)


def _run_part(part: Part, plan: Plan, entries: list[Entry], tables: Tables) -> list[tuple[Sequence[int], Tensor]]:
    """Step a part; gives what was measured and is not where it is kept."""
    of, k = part.shape_class, len(part.positions)
    if part.path == "reference":
        for i in part.positions:
            draws = tables.draws([i], 1)[0] if of.rounding else None
            reference.step_parameter(*entries[i][1:], plan.update_rms[i], draws)
        return []
    members = members_as_they_are(of, part.positions, entries, tables)
    short = is_padded(of)  # and of any lengths
    if not short and not foreach.steps_one_by_one(of, k):
        return [(part.positions, foreach.step_class(members))]
    if k >= padded.LEAST and short:
        room = part.rooms[0] if part.rooms else padded.room_of(members)
        if not part.rooms and type(room.x.params) is Tensor:  # not what a mode has made of it
            part.rooms.append(room)
        return [(part.positions, padded.step_vectors(members, room))]
    for i, member in zip(part.positions, members.each(), strict=True):
        eager.step_parameter(member, _plain_numbers(entries[i]), entries[i].state["RMS"], plan.update_rms[i])
    return []


def _plain_numbers(entry: Entry) -> Numbers:
    step = entry.state["step"]
    return plain_numbers(entry.group, step.to(entry.state["RMS"].dtype) if isinstance(step, Tensor) else step)


def _jobs_of(plan: Plan, entries: list[Entry], tables: list[Tensor], compiles: bool) -> list[sharded.Job]:
    return [
        sharded.Job(entries[i], tables[i], plan.update_rms[i], compiles and sharded.compiles(entries[i])) for i in plan.sharded
    ]
