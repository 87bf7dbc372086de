"""The same step again: where kernels step all of it, and nothing that its plan depends on has changed but the gradients.

Every tensor is looked at, and where it lies. Whatever is not as it was, the step is planned anew, which takes longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled._fused.launches import skips_by_itself
from adafactor_compiled._fused.members import Member, are_placed, of_this_rank
from adafactor_compiled._fused.table import Found, Table
from adafactor_compiled._sharded.exchanges import Exchanges
from adafactor_compiled._sharded.step import Launched
from adafactor_compiled._sharded.step import step as step_shared
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.guard import Guard, are_same
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import State
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._step.faults import note
from adafactor_compiled._step.fused import makes_fakes
from adafactor_compiled._step.plan import Plan, options_of
from adafactor_compiled._step.ranges import range_of
from adafactor_compiled._step.record import Record
from adafactor_compiled._update.numbers import Numbers, plain_numbers
from adafactor_compiled._update.rounding import draws_of_entries

LAST = 8  # sets of members that are kept: of experts and layers that take turns


class Together(NamedTuple):
    """Members that step together."""

    table: Table
    guard: Guard  # of the table's tensors
    groups: list[tuple[Group, list[int]]]  # and which of the members are theirs

    @classmethod
    def of(cls, table: Table, tensors: Sequence[Tensor]) -> Together:
        groups = [x.group for x in table.members]
        return cls(table, Guard(tensors), [(groups[chosen[0]], chosen) for chosen in group_by_key(map(id, groups)).values()])


@dataclass(slots=True)
class Known:
    """What was learnt of the parameters of some groups."""

    groups: list[Group]
    options: list[tuple[Any, ...]]
    params: list[Tensor]  # also those without a gradient
    exchanges: Exchanges = ()
    members: dict[int, tuple[Member, Guard]] = field(default_factory=dict)  # by position
    together: dict[tuple[int, ...], Together] = field(default_factory=dict)  # by positions, the last ones last

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Known:
        return cls([*groups], [options_of(group) for group in groups], _params_of(groups))

    def is_of(self, groups: Sequence[Group]) -> bool:
        """Whether these are the groups, as they were."""
        same = are_same(groups, self.groups) and are_same(_params_of(groups), self.params)
        return same and [options_of(group) for group in groups] == self.options

    def add(self, together: Together) -> Together:
        self.together[tuple(x.position for x in together.table.members)] = together
        if len(self.together) > LAST:
            del self.together[next(iter(self.together))]
        return together


def _params_of(groups: Sequence[Group]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


class Again:
    """Of one optimizer: all members that it has stepped, and those that stepped together."""

    def __init__(self) -> None:
        self._known: Known | None = None

    def learn(self, plan: Plan, entries: Sequence[Entry], groups: Sequence[Group], exchanges: Exchanges) -> None:
        """Know the members of a plan, if all that it steps can be stepped so; and forget what has left its group."""
        known, self._known = self._known, None
        if plan.table is None or len(plan.fused) < len(entries) or plan.update_rms[0].is_inference():
            return
        for _, p, _, _, group in entries:
            skips = group["nonfinite"] == "skip" and not skips_by_itself(p.device)
            if group["capturable"] or _needs_tensors(group) or skips or "get_lr" in group:
                return
        if known is None or not known.is_of(groups):
            known = Known.of(groups)
        table, params, grads = plan.table, [x.param for x in entries], [x.grad for x in entries]
        if not are_placed(table.members, params, grads):  # of a class of its own, say
            return
        local = of_this_rank(table.members, params, grads, [x.state for x in entries])
        for member, p, g, _ in zip(table.members, *local, strict=True):
            known.members[member.position] = member, Guard([p, g, *member.kept.values()])
        known.exchanges, known.together = exchanges, {}  # members of other plans, which may have been of another state
        known.add(Together.of(table, table.tensors(*local)))
        self._known = known

    def step(self, optimizer: Optimizer) -> Record | None:
        """Step all parameters that have a gradient; None, and nothing has changed, where something else has."""
        known = self._known
        if known is None or makes_fakes() or not known.is_of(optimizer.param_groups):
            return None
        seen = _seen(known, optimizer.state)
        if seen is None or seen.together.table.conflicts(seen.addresses, seen.grads):
            return None
        (table, _, groups), grads, states, rows, addresses = seen
        members, table.done = table.members, []
        try:
            for state in states:
                state["step"] += 1
            numbers = array("d", [x for of_row in rows.numbers for x in of_row])
            launched = Launched(table, Found(addresses, numbers, _draws_of(members, grads, states)))
            with range_of(members[0].of, len(members), "fused"):
                skipping = step_shared(known.exchanges, [], launched)[1] if known.exchanges else table.run(launched.found)
        except BaseException as error:
            for i in set(range(len(members))) - set(table.done):
                states[i]["step"] = rows.counts[i]
            note(error, [members[i].position for i in table.done], len(members))
            raise
        for i in skipping:
            states[i]["step"] = rows.counts[i]
        skipped: list[Tensor | None] = [None] * len(members)
        for group, of_group in groups:
            for i in of_group if group["nonfinite"] == "skip" else ():
                skipped[i] = torch.tensor(i in skipping, device="cpu")
        tables, rms = [rows.numbers[i] for i in rows.of_members], [x.kept["RMS"] for x in members]
        return Record([x.param for x in members], tables, rms, [x.update_rms for x in members], skipped)


class Rows(NamedTuple):
    """The numbers of a step: a row for each group and step count, and which row each member has."""

    counts: list[int]  # of steps before this one
    of_members: list[int]
    numbers: list[Numbers]


class Seen(NamedTuple):
    """Members that are as they were, with what a step finds anew."""

    together: Together
    grads: list[Tensor]  # of this rank
    states: list[State]
    rows: Rows
    addresses: array[int]


def _seen(known: Known, states_of: Mapping[Tensor, State]) -> Seen | None:
    """What is to be stepped, all of it looked at; None where something is not as it was."""
    of_all = [p.grad for p in known.params]
    positions = [i for i, g in enumerate(of_all) if g is not None]
    params, grads = [known.params[i] for i in positions], [g for g in of_all if g is not None]
    states = [states_of.get(p, {}) for p in params]
    try:
        together = known.together.get(tuple(positions)) or _together_anew(known, positions, params, grads, states)
        rows = None if together is None else _rows_of(together, states)
        if together is None or rows is None:
            return None
        table, local = together.table, (params, grads, states)
        if table.sharded and not are_placed(table.members, params, grads):
            return None
        tensors = table.tensors(*(of_this_rank(table.members, *local) if table.sharded else local))
    except LookupError:  # a state lacks something
        return None
    count = len(positions)
    if not are_same(tensors[2 * count :], table.kept) or not together.guard.holds(tensors):
        return None
    return Seen(together, tensors[count : 2 * count], states, rows, table.addresses_of(tensors, rows.of_members))


def _together_anew(
    known: Known, positions: list[int], params: list[Tensor], grads: list[Tensor], states: list[State]
) -> Together | None:
    """Members that have not stepped together yet; None where one is not known, or not as it was.

    Raises:
        LookupError: a state lacks something.
    """
    found = [known.members[i] for i in positions if i in known.members]
    if not found or len(found) < len(positions):
        return None
    members = [member for member, _ in found]
    if not are_placed(members, params, grads):
        return None
    local = of_this_rank(members, params, grads, states)
    for (member, guard), p, g, state in zip(found, *local, strict=True):
        if not guard.holds([p, g, *member.kept_in(state)]):
            return None
    table = Table(members)
    return known.add(Together.of(table, table.tensors(*local)))


def _rows_of(together: Together, states: Sequence[State]) -> Rows | None:
    """None where numbers are in tensors, which may not be read.

    Raises:
        LookupError: a state has no step count.
    """
    counts = [state["step"] for state in states]
    if set(map(type, counts)) != {int}:
        return None
    of_members, numbers = [0] * len(counts), list[Numbers]()
    for group, chosen in together.groups:
        if _needs_tensors(group):
            return None
        row_of: dict[int, int] = {}
        for i in chosen:
            count = counts[i]
            if count not in row_of:
                row_of[count] = len(numbers)
                numbers.append(plain_numbers(group, count + 1))
            of_members[i] = row_of[count]
    return Rows(counts, of_members, numbers)


def _needs_tensors(group: Group) -> bool:
    return isinstance(group["lr"], Tensor) and not group["relative_step"]


def _draws_of(members: Sequence[Member], grads: Sequence[Tensor], states: Sequence[State]) -> dict[int, Tensor]:
    """What determines the noise of those that are rounded stochastically, at step counts that were raised."""
    rounding = [i for i, x in enumerate(members) if x.of.rounding]
    if not rounding:
        return {}
    chosen = [members[i] for i in rounding]
    entries = [Entry(x.position, x.param, grads[i], states[i], x.group) for i, x in zip(rounding, chosen, strict=True)]
    origins = [Origin() if x.placed is None else x.placed.origin for x in chosen]
    return dict(zip(rounding, draws_of_entries(entries, origins), strict=True))
