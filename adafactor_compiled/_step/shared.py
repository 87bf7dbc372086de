"""Parameters that lie in one memory (`q.data = p.data`): operations that step several at once would lose the step of one."""

from __future__ import annotations

from collections.abc import Sequence

from adafactor_compiled._fused.members import bytes_of
from adafactor_compiled._fused.table import overlapping
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._step.plan import Plan

ONE_BY_ONE = {"reference", "sharded"}


def sharing(plan: Plan, entries: Sequence[Entry]) -> set[int]:
    """The positions of entries, launched ones aside, whose parameter has memory in common with another's."""
    spans, launched = [], set(plan.fused)
    for path, of, positions in plan.parts:
        if path in ONE_BY_ONE or not of.plain or not of.numel or of.device.type == "meta":
            continue
        size = bytes_of(of.shape, of.stride, of.dtype)
        starts = [(entries[i].param.data_ptr(), i) for i in positions if i not in launched]
        spans += [(start, start + size, True, i) for start, i in starts]
    return overlapping(sorted(spans))
