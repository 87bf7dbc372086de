"""The same step again: where kernels step all of it, and nothing that its plan depends on has changed but the gradients.

One loop looks at every tensor and reads where it lies. Whatever is not as it was, the step is planned anew, which takes longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled._fused.launches import ADDRESSES, launches_of, skips_by_itself
from adafactor_compiled._fused.members import Member, addresses_in, of_this_rank
from adafactor_compiled._fused.table import Found, Table
from adafactor_compiled._sharded.exchanges import Exchanges
from adafactor_compiled._sharded.step import Launched
from adafactor_compiled._sharded.step import step as step_shared
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import State
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._step.faults import note
from adafactor_compiled._step.fused import makes_fakes
from adafactor_compiled._step.plan import Plan, options_of
from adafactor_compiled._step.ranges import range_of
from adafactor_compiled._step.record import Record
from adafactor_compiled._update.numbers import plain_numbers
from adafactor_compiled._update.rounding import draws_of_entries

LAST = 8  # tables that are kept: of experts and layers that take turns


class Again:
    """Of one optimizer: all members that it has stepped, and the tables of those that stepped together."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}  # by the id of the parameter
        self._options: dict[int, tuple[Any, ...]] = {}  # by the id of the group, when its members were looked at
        self._table: Table | None = None
        self._tables: dict[tuple[int, ...], Table] = {}  # by the ids of the members, the last ones last
        self._exchanges: Exchanges = ()
        self._count = 0  # of parameters, with those that have no gradient

    def learn(self, plan: Plan, entries: Sequence[Entry], groups: Sequence[Group], exchanges: Exchanges) -> None:
        """Know the members of a plan, if all that it steps can be stepped so; and forget what has left its group."""
        if plan.table is None or len(plan.fused) < len(entries) or plan.update_rms[0].is_inference():
            return self.forget()
        self._let_go(groups)
        for entry in entries:
            group = entry.group
            plain = not group["capturable"] and (group["relative_step"] or not isinstance(group["lr"], Tensor))
            if not plain or (group["nonfinite"] == "skip" and not skips_by_itself(entry.param.device)) or "get_lr" in group:
                return self.forget()
            if self._options.setdefault(id(group), options_of(group)) != options_of(group):
                return self.forget()
        self._members |= {id(member.param): member for member in plan.table.members}
        self._table, self._tables, self._exchanges = plan.table, {}, exchanges
        self._count = sum(len(group["params"]) for group in groups)

    def _let_go(self, groups: Sequence[Group]) -> None:
        """Keep nothing alive that has left its group."""
        present = {id(p) for group in groups for p in group["params"]}
        if not self._members.keys() <= present:
            self.forget()

    def forget(self) -> None:
        self._members, self._options, self._table, self._tables, self._exchanges = {}, {}, None, {}, ()

    def step(self, optimizer: Optimizer) -> Record | None:
        """Step all parameters that have a gradient; None, and nothing has changed, where something else has."""
        if self._table is None:
            return None
        if makes_fakes():
            return None
        known, states_of = self._members, optimizer.state
        chosen: list[Member] = []
        grads: list[Tensor] = []
        states: list[State] = []
        addresses: list[int] = []
        counts: list[int] = []
        rows: list[tuple[Any, ...]] = []
        skips, position, exchanges = False, -1, self._exchanges
        for group in optimizer.param_groups:
            skips, row, last = skips or group["nonfinite"] == "skip", -1, None
            for p in group["params"]:
                g, position = p.grad, position + 1
                if g is None:
                    continue
                if last is None and (self._options.get(id(group)) != options_of(group) or _needs_tensors(group)):
                    return None
                member, state = known.get(id(p)), states_of.get(p)
                if member is None or member.param is not p or member.group is not group or member.position != position:
                    return None
                if state is None:
                    return None
                count, local, of_rank = state.get("step"), (p, g, state), member.placed
                if of_rank is not None:
                    here = of_this_rank(of_rank, p, g, state)
                    if here is None:
                        return None
                    local = here
                found = addresses_in(member, *local)
                if found is None or type(count) is not int:
                    return None
                if count != last:
                    row, last = len(rows), count
                    rows.append(plain_numbers(group, count + 1))
                addresses += found
                addresses.append(row)
                chosen.append(member)
                grads.append(local[1])
                states.append(state)
                counts.append(count)
        if not chosen or position + 1 != self._count:
            return None
        table = self._table
        if chosen != table.members:
            table = self._table = self._table_of(chosen, addresses)
        if table.conflicts(addresses, grads):
            return None
        numbers = array("d", [x for of_row in rows for x in of_row])
        table.done = []
        try:
            for state in states:
                state["step"] += 1
            with range_of(chosen[0].of, len(chosen), "fused"):
                launched = Launched(table, Found(addresses, numbers, _draws_of(chosen, grads, states)))
                kept = step_shared(exchanges, [], launched)[1] if exchanges else table.run(launched.found)
        except BaseException as error:
            for i in set(range(len(chosen))) - set(table.done):
                states[i]["step"] = counts[i]
            note(error, [chosen[i].position for i in table.done], len(chosen))
            raise
        skipped: list[Tensor | None] = [None] * len(chosen)
        for i, member in enumerate(chosen) if skips else ():
            if member.group["nonfinite"] == "skip":
                skipped[i] = torch.tensor(i in kept, device="cpu")
        for i in kept:
            states[i]["step"] = counts[i]
        if len(chosen) < len(self._members):
            self._let_go(optimizer.param_groups)
        tables = [rows[i] for i in addresses[ADDRESSES - 1 :: ADDRESSES]]
        return Record([x.param for x in chosen], tables, [x.rms for x in chosen], [x.update_rms for x in chosen], skipped)

    def _table_of(self, members: list[Member], addresses: list[int]) -> Table:
        """The last one of these members, or a new one."""
        key = tuple(map(id, members))
        table = self._tables.pop(key, None) or Table(members, launches_of([x.planned for x in members], _unaligned(addresses)))
        self._tables[key] = table
        if len(self._tables) > LAST:
            del self._tables[next(iter(self._tables))]
        return table


def _needs_tensors(group: Group) -> bool:
    return isinstance(group["lr"], Tensor) and not group["relative_step"]


def _unaligned(addresses: Sequence[int]) -> set[int]:
    return {i // ADDRESSES for i in range(0, len(addresses), ADDRESSES) if (addresses[i] | addresses[i + 1]) % 16}


def _draws_of(members: Sequence[Member], grads: Sequence[Tensor], states: Sequence[State]) -> dict[int, Tensor]:
    """What determines the noise of those that are rounded stochastically, at step counts that were raised."""
    rounding = [i for i, x in enumerate(members) if x.of.rounding]
    chosen = [members[i] for i in rounding]
    entries = [Entry(x.position, x.param, grads[i], states[i], x.group) for i, x in zip(rounding, chosen, strict=True)]
    origins = [Origin() if x.placed is None else x.placed.origin for x in chosen]
    return dict(zip(rounding, draws_of_entries(entries, origins), strict=True))
