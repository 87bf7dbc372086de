"""What one step does, as data: the parameters that take part, checked, and what steps them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._compile.calls import Call, calls_of, view_of
from adafactor_compiled._fused.launches import Kernels, kernels_of
from adafactor_compiled._fused.members import Member, member_of
from adafactor_compiled._fused.table import Table
from adafactor_compiled._sharded.members import member_of_piece
from adafactor_compiled._state.entries import Entry, path_of
from adafactor_compiled._state.guard import Guard, are_same
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import check, complete, is_left_by_inference, own_tensors
from adafactor_compiled._state.options import LAYOUT, Group, check_gradient
from adafactor_compiled._state.placements import address_of, check_gradient_placements
from adafactor_compiled._state.shape_class import ShapeClass, class_of
from adafactor_compiled._state.views import with_dims_last


class Route(NamedTuple):
    """How an entry steps."""

    path: str  # "fused", "compiled", "multi_tensor", "reference" or "sharded"
    of: ShapeClass
    member: Member | None = None  # of what kernels step, but inside of an outer graph


class Part(NamedTuple):
    """A shape class, and what steps it."""

    path: str
    shape_class: ShapeClass
    positions: list[int]


class Plan(NamedTuple):
    # What it depends on, tensors by a guard; None inside of an outer graph, or of a mode that makes something else of tensors.
    looked_at: tuple[tuple[object, ...], list[object], Guard] | None
    parts: list[Part]
    fused: list[int]  # the positions of the members of the table, or, inside of an outer graph, of its operator
    table: Table | None
    calls: list[Call]  # of compiled graphs
    sharded: list[int]  # the positions of DTensors that are not among the members of the table
    moved: list[int]  # of what is factored over other dimensions than its last two
    update_rms: list[Tensor]  # of each entry, 0-dim: the RMS of its last update before clipping

    @property
    def kernels(self) -> list[Kernels]:
        """What launches run."""
        return [] if self.table is None else [launch.kernels for launch in self.table.launches]

    def eager(self, compiles: bool) -> list[Part]:
        """What operations of torch step one after the other; where nothing runs compiled, also what would."""
        members: dict[tuple[str, ShapeClass], list[int]] = {}
        for path, of, positions in self.parts:
            if path in ("multi_tensor", "reference") or (path == "compiled" and not compiles):
                members.setdefault(("reference" if path == "reference" else "multi_tensor", of), []).extend(positions)
        return [Part(path, of, sorted(positions)) for (path, of), positions in members.items()]

    def is_for(self, looks: Looks) -> bool:
        """Whether all that it depends on is as it was."""
        if self.looked_at is None or is_left_by_inference(self.update_rms[0]):
            return False
        facts, kept, guard = self.looked_at
        return looks.facts == facts and are_same(looks.kept, kept) and guard.holds(looks.tensors)


def plan_of(entries: list[Entry], last: Plan | None, fused: bool = True, apart: Collection[int] = ()) -> Plan:
    """The plan of a step: the last one, where nothing has changed that it depends on.

    All that compiled code relies on is looked at in each step: dtypes, devices, shapes and strides of parameters and gradients,
    the options, and whether the tensors of the states are those that were checked when the plan was made.

    Args:
        entries: of the step.
        last: the plan of the last step.
        fused: whether there are fused kernels; where not, what asks for them is compiled.
        apart: entries that share memory, and step one after the other.

    Raises:
        RuntimeError: a gradient or a state does not fit its parameter; nothing has changed.
    """
    if last is not None and last.is_for(_looks_of(entries)):
        return last
    for entry in entries:
        check_gradient(entry.param, entry.grad, entry.position)
        check_gradient_placements(entry.param, entry.grad, entry.position)
        check(entry.state, entry.param, entry.group, entry.position)
    for entry in entries:
        complete(entry.state, entry.param, entry.group)
    inline = torch.compiler.is_compiling()
    update_rms = [torch.zeros_like(entry.state["RMS"]) for entry in entries]
    seen = [with_dims_last(x) for x in entries]
    of_entries = enumerate(zip(entries, seen, update_rms, strict=True))
    routes = [_route_of(x, as_seen, rms, fused, i in apart) for i, (x, as_seen, rms) in of_entries]
    members = [x.member for x in routes if x.member is not None]
    looked_at = None
    if entries and not inline and type(update_rms[0]) is type(entries[0].state["RMS"]):
        facts, kept, tensors = _looks_of(entries)
        looked_at = facts, kept, Guard(tensors)
    parts = [Part(*key, at) for key, at in group_by_key((x.path, x.of) for x in routes).items()]
    return Plan(
        looked_at,
        parts,
        [i for i, x in enumerate(routes) if x.path == "fused"],
        Table(members) if members else None,
        calls_of((x.shape_class, x.positions) for x in parts if x.path == "compiled"),
        [i for i, x in enumerate(routes) if x.path == "sharded"],
        [i for i, x in enumerate(entries) if seen[i] is not x],
        update_rms,
    )


def _route_of(entry: Entry, seen: Entry, update_rms: Tensor, fused: bool, apart: bool) -> Route:
    """The route of an entry that was checked, `seen` with rows and columns last; `apart`, it steps alone."""
    inline, path = torch.compiler.is_compiling(), path_of(entry.group, entry.param)
    of = class_of(seen)
    if path == "sharded":
        wanted = fused and path_of(entry.group) == "fused" and seen is entry and not (apart or inline)
        member = member_of_piece(entry, update_rms) if wanted else None
        return Route("sharded", of) if member is None else Route("fused", member.of, member)
    if apart or path == "reference" or not of.plain:
        return Route("reference", of)
    if seen is not entry and not all(seen.state[key].is_contiguous() for key in ("exp_avg_sq_row", "exp_avg_sq_col")):
        return Route("multi_tensor", of)  # others take factors that lie as their parameter
    if path == "fused" and fused and kernels_of(of) is not None:
        return Route("fused", of, None if inline else member_of(entry, of, update_rms))
    compiled = path == "compiled" or (path == "fused" and not fused)
    return Route("compiled" if compiled and not inline and view_of(of) is not None else "multi_tensor", of)


def options_of(group: Group) -> tuple[Any, ...]:
    names = (
        "foreach",
        "compile",
        "fused",
        "stochastic_rounding",
        "capturable",
        "momentum_dtype",
        "cautious",
        "nonfinite",
        *LAYOUT,
    )
    return group["beta1"] is None, *(group[name] for name in names)


class Looks(NamedTuple):
    """All that a plan depends on of entries."""

    facts: tuple[object, ...]  # their groups and what their options say, how DTensors are placed, what states have
    kept: list[object]  # parameters and what is in their states, but numbers, as objects
    tensors: list[Tensor]  # all these and gradients, with the pieces of DTensors, which do not say how they lie


def _looks_of(entries: list[Entry]) -> Looks:
    groups = {id(entry.group): entry.group for entry in entries}
    pieces = [(x.placements, address_of(x)) for _, x, *_ in entries if isinstance(x, DTensor)]
    names = [tuple(entry.state) for entry in entries]
    facts = [id(entry.group) for entry in entries], {at: options_of(group) for at, group in groups.items()}, pieces, names
    kept = [x for entry in entries for x in (entry.param, *entry.state.values()) if type(x) is not int]
    tensors = [x for entry in entries for x in (entry.param, entry.grad, *own_tensors(entry.state))]
    return Looks(facts, kept, tensors + [x.to_local() for x in tensors if isinstance(x, DTensor)])
