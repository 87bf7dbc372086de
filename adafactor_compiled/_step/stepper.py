"""From the entries of a step to its end, and what the next step can use again: plans, records, the buffers of exchanges."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled._sharded.exchanges import Exchanges, exchanges_of
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import forget_replaced
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.warn import warn
from adafactor_compiled._step import capture, scaling
from adafactor_compiled._step.again import Again
from adafactor_compiled._step.compilation import Compilation
from adafactor_compiled._step.faults import counts_kept_true
from adafactor_compiled._step.fused import gathered
from adafactor_compiled._step.plan import Plan, plan_of
from adafactor_compiled._step.record import Record
from adafactor_compiled._step.run import run

EXCHANGES = 4  # sets of them that are kept


class Stepper:
    """Of one optimizer; of `last`, where there was one before, it keeps what does not depend on the state."""

    def __init__(self, last: Stepper | None = None) -> None:
        # Of the whole step under None, and of each parameter that is stepped alone.
        self._plans: dict[Tensor | None, Plan] = {}
        self.records: dict[Tensor | None, Record] = {}
        self.compilation: Compilation = (
            Compilation(False, True) if last is None else Compilation(last.compilation.failed, last.compilation.fused)
        )
        self._again = Again()
        self._exchanges: list[Exchanges] = [()] if last is None else last._exchanges  # the last ones first
        self._captured: bool = last is not None and last._captured  # whether a CUDA graph has a step

    def loaded(self) -> None:
        """Say, where a CUDA graph has a step, that it has one of another state now."""
        if self._captured:
            self._captured = False
            warn("the step should be captured again: a CUDA graph steps with the state from before")

    def again(self, optimizer: Optimizer) -> bool:
        """Take the last step again, with other gradients and numbers; False, and nothing has changed, if it is another one."""
        if (
            torch.compiler.is_compiling()
            or scaling.Scaling.of(optimizer) is not None
            or capture.is_captured(optimizer.param_groups)
        ):
            return False
        record = self._again.step(optimizer)
        if record is not None:
            self._plans, self.records = {None: self._plans[None]}, {None: record}
        return record is not None

    def step(self, optimizer: Optimizer, entries: list[Entry], show_progress: bool | None, alone: Tensor | None = None) -> None:
        """Step all entries that have a gradient, or one of them `alone`."""
        groups: list[Group] = optimizer.param_groups
        if capture.is_captured(groups):
            self._captured = True
        of_scaler = scaling.Scaling.of(optimizer)
        if of_scaler is not None:
            entries, self._again = of_scaler.unscaled(entries), Again()  # nothing of what was stepped otherwise
        if torch.compiler.is_compiling():  # the plan is part of the graph, once and for all: neither guarded nor kept
            run(plan_of(entries, None), entries, None, exchanges_of(groups, []), True)
            return
        last = self._plans.get(alone)
        plan = self.compilation.plan_of(entries, last, groups, show_progress)
        kept, (addresses, shared) = plan, gathered(plan, entries)
        if shared:  # one after the other, and looked at again in the next step
            plan = plan_of(entries, None, self.compilation.fused, shared)
            addresses, _ = gathered(plan, entries)
        self._plans[alone] = kept
        if plan is not last and alone is None:
            forget_replaced(optimizer.state, groups)
        compiles = self.compilation.compiles(plan, groups, show_progress)
        exchanges = self._exchanges_of(groups) if alone is None else ()
        overflowed = None if of_scaler is None else of_scaler.overflowed
        if of_scaler is not None and of_scaler.is_on_host(entries):
            if overflowed:
                self.records[alone] = of_scaler.record_of_none(entries, plan.update_rms)
                return
            overflowed = None
        with counts_kept_true(entries):
            self.records[alone] = record = run(plan, entries, addresses, exchanges, compiles, overflowed)
        if alone is None:  # what was stepped alone before is of the past
            self._plans, self.records = {None: kept}, {None: record}
            if of_scaler is None:
                self._again.learn(plan, entries, groups, exchanges)

    def _exchanges_of(self, groups: list[Group]) -> Exchanges:
        """Of options that take turns, each time the same: to make one takes collectives."""
        found = exchanges_of(groups, self._exchanges)
        if found is self._exchanges[0]:
            return found
        present = {id(p) for group in groups for p in group["params"]}
        others = [
            x for x in self._exchanges if x and x is not found and all(id(p) in present for of in x for _, p in of.params)
        ]
        self._exchanges = [found, *others[: EXCHANGES - 1]]
        return found
