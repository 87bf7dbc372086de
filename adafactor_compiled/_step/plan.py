"""What one step does, as data: the parameters that take part, checked, and what steps them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from adafactor_compiled._compile.calls import Call, calls_of, view_of
from adafactor_compiled._fused.launches import Kernels, kernels_of, skips_by_itself
from adafactor_compiled._fused.members import Member, member_of
from adafactor_compiled._fused.table import Table
from adafactor_compiled._sharded.members import localized, placed_of
from adafactor_compiled._state.entries import Entry, path_of
from adafactor_compiled._state.guard import Guard, are_same
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import check, complete, factored_dims, is_left_by_inference, own_tensors
from adafactor_compiled._state.options import LAYOUT, Group, check_gradient
from adafactor_compiled._state.placements import address_of, check_gradient_placements
from adafactor_compiled._state.shape_class import ShapeClass, shape_class_of
from adafactor_compiled._state.views import is_moved, with_dims_last


class Part(NamedTuple):
    """A shape class, and what steps it where that can be done."""

    path: str  # "fused", "compiled", "multi_tensor", "reference" or "sharded"
    shape_class: ShapeClass
    positions: list[int]


class Plan(NamedTuple):
    looked_at: Looked | None  # None inside of an outer graph
    parts: list[Part]
    fused: list[int]  # the positions of the members of the table, or, inside of an outer graph, of its operator
    table: Table | None
    calls: list[Call]  # of compiled graphs
    uncompiled: list[Part]  # what no call steps, by the multi-tensor or the reference path
    without_calls: list[Part]  # the same where nothing is compiled
    sharded: list[int]  # the positions of DTensors that are not among the members of the table
    moved: list[int]  # of what is factored over other dimensions than its last two
    update_rms: list[Tensor]  # of each entry, 0-dim: the RMS of its last update before clipping

    @property
    def kernels(self) -> list[Kernels]:
        """What launches run."""
        return [] if self.table is None else [launch.kernels for launch in self.table.launches]

    def is_for(self, entries: list[Entry]) -> bool:
        """Whether these are its entries, and as they were."""
        if self.looked_at is None or not entries:
            return False
        made = self.update_rms[0]
        if type(made) is not type(entries[0].state.get("RMS")) or is_left_by_inference(made):
            return False  # made in a mode that has ended, or has begun
        return self.looked_at.holds(entries)


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
    if last is not None and last.is_for(entries):
        return last
    for entry in entries:
        check_gradient(entry.param, entry.grad, entry.position)
        check_gradient_placements(entry.param, entry.grad, entry.position)
        check(entry.state, entry.param, entry.group, entry.position)
    for entry in entries:
        complete(entry.state, entry.param, entry.group)
    moved = [i for i, entry in enumerate(entries) if is_moved(entry)]
    seen = with_dims_last(entries, moved)
    classes = [(_path_of(x, fused, i in apart), _class_of(x)) for i, x in enumerate(seen)]
    for i in moved:
        path, of = classes[i]
        factors = seen[i].state["exp_avg_sq_row"], seen[i].state["exp_avg_sq_col"]
        if path in ("fused", "compiled") and not all(x.is_contiguous() for x in factors):
            classes[i] = "multi_tensor", of  # others take factors that lie as their parameter
    inline = torch.compiler.is_compiling()
    update_rms = [torch.zeros_like(entry.state["RMS"]) for entry in entries]
    launched, members = [], []
    for i, (path, of) in enumerate(classes):
        member = None
        if path == "fused" and kernels_of(of) is not None:
            launched.append(i)
            member = None if inline else member_of(entries[i], of, update_rms[i])
        elif path == "sharded" and fused and not inline and i not in moved and i not in apart:
            member = _piece_of(entries[i], update_rms[i])
            if member is not None:
                launched.append(i)
                classes[i] = "fused", member.of
        members += [] if member is None else [member]
    called = [] if inline else [i for i, (path, of) in enumerate(classes) if path == "compiled" and view_of(of) is not None]
    sharded = [i for i, (path, _) in enumerate(classes) if path == "sharded"]
    return Plan(
        None if inline or not entries else Looked.at(entries),
        _parts_of(classes, range(len(entries))),
        launched,
        Table(members) if members else None,
        calls_of((x.shape_class, x.positions) for x in _parts_of(classes, called)),
        _uncompiled(classes, {*launched, *called, *sharded}),
        _uncompiled(classes, {*launched, *sharded}),
        sharded,
        moved,
        update_rms,
    )


def _piece_of(entry: Entry, update_rms: Tensor) -> Member | None:
    """A DTensor as a member, if kernels are wanted, and can step this rank's piece."""
    placed = placed_of(entry) if path_of(entry.group) == "fused" else None
    if placed is None:
        return None
    local = localized(entry)
    if placed.split is not None and entry.group["nonfinite"] == "skip" and not skips_by_itself(local.param.device):
        return None  # whether it is to be undone is another number that ranks add up, which only operations of torch do
    if local.param.dtype != entry.param.dtype:  # a DTensor whose `data` was set, which its piece does not learn of
        return None
    of = _class_of(local)._replace(factored=factored_dims(entry.param.shape, entry.group) is not None)
    return None if kernels_of(of, placed.split) is None else member_of(local, of, update_rms, placed)


def _path_of(entry: Entry, fused: bool, apart: bool) -> str:
    path = path_of(entry.group, entry.param)
    if apart and path != "sharded":
        return "reference"
    return "compiled" if path == "fused" and not fused else path


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


class Looked(NamedTuple):
    """All that a plan depends on of its entries."""

    facts: tuple[object, ...]
    kept: list[object]
    guard: Guard

    @classmethod
    def at(cls, entries: list[Entry]) -> Looked:
        facts, kept, tensors = _looks_of(entries)
        return cls(facts, kept, Guard(tensors))

    def holds(self, entries: list[Entry]) -> bool:
        """Whether all is as it was."""
        facts, kept, tensors = _looks_of(entries)
        return facts == self.facts and are_same(kept, self.kept) and self.guard.holds(tensors)


def _looks_of(entries: list[Entry]) -> tuple[tuple[object, ...], list[object], list[Tensor]]:
    """The groups, what their options say, how DTensors are placed and what states have; parameters and what is in their states,
    but numbers, as objects; and all these and gradients as tensors, with the pieces of DTensors, which do not say how they lie.
    """
    groups = {id(entry.group): entry.group for entry in entries}
    pieces = [(x.placements, address_of(x)) for _, x, *_ in entries if isinstance(x, DTensor)]
    names = [tuple(entry.state) for entry in entries]
    facts = [id(entry.group) for entry in entries], {at: options_of(group) for at, group in groups.items()}, pieces, names
    kept = [x for entry in entries for x in (entry.param, *entry.state.values()) if type(x) is not int]
    tensors = [x for entry in entries for x in (entry.param, entry.grad, *own_tensors(entry.state))]
    return facts, kept, tensors + [x.to_local() for x in tensors if isinstance(x, DTensor)]


def _class_of(entry: Entry) -> ShapeClass:
    _, param, grad, state, group = entry
    tensors = [grad, *(x for x in state.values() if isinstance(x, Tensor))]
    # A class of parameters may be derived from Parameter for its name alone.
    plain = all(type(x) is Tensor for x in tensors) and (type(param) in (Tensor, Parameter) or type(param.detach()) is Tensor)
    return shape_class_of(param, grad, group, plain and (torch.compiler.is_compiling() or not param.is_neg()))


def _parts_of(classes: list[tuple[str, ShapeClass]], positions: Iterable[int]) -> list[Part]:
    positions = list(positions)
    by_class = group_by_key(classes[i] for i in positions)
    return [Part(*key, [positions[j] for j in chosen]) for key, chosen in by_class.items()]


def _uncompiled(classes: list[tuple[str, ShapeClass]], others: Collection[int]) -> list[Part]:
    """All but the others: plain tensors by the multi-tensor path, unless they ask for the reference path."""
    eager = [("reference" if path == "reference" or not of.plain else "multi_tensor", of) for path, of in classes]
    return _parts_of(eager, (i for i in range(len(classes)) if i not in others))
