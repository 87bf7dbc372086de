"""The body of a step: step counts, numbers, then everything that its plan has."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from adafactor_compiled._compile import graphs
from adafactor_compiled._compile.calls import members_in
from adafactor_compiled._fused.launches import skips_by_itself
from adafactor_compiled._fused.operator import step_members
from adafactor_compiled._sharded import step as sharded
from adafactor_compiled._sharded.exchange import Exchange
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import compute_dtype, group_by_key
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._state.views import with_dims_last
from adafactor_compiled._step.fused import launched_of
from adafactor_compiled._step.inputs import Inputs
from adafactor_compiled._step.plan import Part, Plan
from adafactor_compiled._step.ranges import UNNAMED, range_of
from adafactor_compiled._step.record import Record
from adafactor_compiled._step.undo import kept_of, put_back
from adafactor_compiled._update import multi_tensor, reference
from adafactor_compiled._update.members import one_by_one
from adafactor_compiled._update.rounding import draws_of_entries

Measured = list[tuple[Sequence[int], Tensor]]  # positions of k entries, and the RMS of each and of its update, [2, k]


def run(
    plan: Plan,
    entries: list[Entry],
    addresses: array[int] | None,
    exchanges: Sequence[Exchange],
    compiles: bool,
    overflowed: Tensor | None = None,
) -> Record:
    """Step all entries in place.

    Args:
        plan: the plan of the step.
        entries: of the step.
        addresses: of the members of its table, where it has one.
        exchanges: of sharded parameters.
        compiles: whether what is to be compiled runs compiled, by itself or as part of a graph.
        overflowed: whether a gradient did, 0-dim, and all is to be undone, where that is not known on the host.
    """
    by_themselves = {i for i in plan.fused if skips_by_itself(entries[i].param.device)}
    kept = kept_of(entries, plan.update_rms, by_themselves, overflowed)
    counts = [entry.state["step"] for entry in entries if isinstance(entry.state["step"], Tensor)]
    if counts:  # by one call: each would be a kernel
        torch._foreach_add_(counts, 1)
    for entry in entries:
        if not isinstance(entry.state["step"], Tensor):
            entry.state["step"] += 1
    seen = [with_dims_last(x) for x in entries] if plan.moved else entries
    inputs = Inputs(seen, _draws_of(plan, entries))
    finite, at_once = _run_fused(plan, inputs, addresses, exchanges)
    measured = _run_calls(plan, inputs) if compiles else []
    measured += _run_parts(plan.eager(compiles), plan, inputs)
    _keep_measured(measured, plan, inputs)
    for i in at_once:
        entries[i].state["step"] -= 1
    skipped = put_back(kept, [finite.get(entry.position) for entry in entries])
    for i in by_themselves:
        if entries[i].group["nonfinite"] == "skip":
            by_kernels, undone = torch.tensor(i in at_once, device="cpu"), skipped[i]
            skipped[i] = by_kernels if undone is None else by_kernels | undone
    params, rms = [entry.param for entry in entries], [entry.state["RMS"] for entry in entries]
    return Record(params, inputs.tables, rms, plan.update_rms, skipped)


def _draws_of(plan: Plan, entries: list[Entry]) -> dict[int, Tensor]:
    """What determines the noise of the entries that are rounded stochastically, by their positions among all."""
    members = [] if plan.table is None else plan.table.members
    origins = {i: x.placed.origin for i, x in zip(plan.fused, members, strict=False) if x.placed is not None}
    rounding = [i for i, x in enumerate(entries) if wants_rounding(x.param.dtype, x.group) and i not in plan.sharded]
    draws = draws_of_entries([entries[i] for i in rounding], [origins.get(i, Origin()) for i in rounding])
    return dict(zip(rounding, draws, strict=True))


def _run_fused(
    plan: Plan, inputs: Inputs, addresses: array[int] | None, exchanges: Sequence[Exchange]
) -> tuple[dict[int, Tensor], set[int]]:
    """Step what kernels do, by launches or as an operator of an outer graph, and all DTensors around them.

    Returns:
        See `sharded.step`; the second by the positions of entries.
    """
    entries, tables, fused = inputs.entries, inputs.tables, plan.fused
    if plan.table is None and fused:
        step_members([entries[i] for i in fused], [tables[i] for i in fused], [inputs.draws.get(i) for i in fused])
    launched = None if addresses is None else launched_of(plan, addresses, inputs)
    finite: dict[int, Tensor] = {}
    skipped: set[int] = set()
    with UNNAMED if plan.table is None else range_of(plan.table.members[0].of, len(fused), "fused"):
        if exchanges:
            jobs = [sharded.Job(entries[i], tables[i], plan.update_rms[i]) for i in plan.sharded]
            finite, skipped = sharded.step(exchanges, jobs, launched)
        elif launched is not None:
            skipped = launched.table.run(launched.found)
    return finite, {fused[j] for j in skipped}


def _run_calls(plan: Plan, inputs: Inputs) -> Measured:
    """Step what compiled graphs do."""
    # All views first: after a large call Python finds nothing in cache, and each takes 5 us instead of 1.
    calls = [(x, members_in(x, inputs.members(x.shape_class, x.positions))) for x in plan.calls]
    measured: Measured = []
    for call, members in calls:
        with range_of(call.shape_class, len(call.positions), "compiled"):
            measured.append((call.positions, graphs.run(call.graph, members)))
    return measured


def _run_parts(parts: Sequence[Part], plan: Plan, inputs: Inputs) -> Measured:
    """Step parts eagerly, or in an outer graph; the reference path puts what it measures where it is kept."""
    measured: Measured = []
    by_kind = group_by_key((x.path, x.shape_class.device, compute_dtype(x.shape_class.dtype)) for x in parts)
    for (path, _, _), chosen in by_kind.items():
        some = [parts[j] for j in chosen]
        with range_of(some[0].shape_class, sum(len(x.positions) for x in some), path):
            together = group_by_key(path == "multi_tensor" and not one_by_one(x.shape_class, len(x.positions)) for x in some)
            at_once = [some[j] for j in together.get(True, [])]
            if at_once:
                classes = [inputs.members(x.shape_class, x.positions) for x in at_once]
                measured += list(zip([x.positions for x in at_once], multi_tensor.step(classes), strict=True))
            for i in (i for j in together.get(False, []) for i in some[j].positions):
                reference.step_parameter(*inputs.entries[i][1:], plan.update_rms[i], inputs.draws.get(i))
    return measured


def _keep_measured(measured: Measured, plan: Plan, inputs: Inputs) -> None:
    """Put the RMS of parameters and updates where they are kept: one copy a device."""
    for of_device in group_by_key(x.device for _, x in measured).values():
        positions = [i for j in of_device for i in measured[j][0]]
        rms, update_rms = torch.cat([measured[j][1] for j in of_device], 1).unbind()
        to = [inputs.entries[i].state["RMS"] for i in positions] + [plan.update_rms[i] for i in positions]
        torch._foreach_copy_(to, [*rms.unbind(), *update_rms.unbind()])
