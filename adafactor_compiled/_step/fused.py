"""The part of a step that fused kernels take: what they read, gathered and checked, and what they report."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.launches import ADDRESSES
from adafactor_compiled._fused.members import bytes_of, of_this_rank
from adafactor_compiled._fused.pieces import NUMBERS
from adafactor_compiled._fused.table import Found, overlapping
from adafactor_compiled._sharded.step import Launched
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._step.inputs import Inputs
from adafactor_compiled._step.plan import Plan

TOGETHER = {"compiled", "multi_tensor"}


def makes_fakes() -> bool:
    """Whether there is a mode that makes something else of tensors."""
    return type(torch.empty(0, device="cpu")) is not Tensor


class Gathered(NamedTuple):
    addresses: array[int] | None  # of the members of a plan's table, rows of numbers yet to be said
    shared: set[int]  # positions of entries that share memory which is written, and cannot step together


def gathered(plan: Plan, entries: Sequence[Entry]) -> Gathered:
    """Where all lies that kernels touch, looked at before anything is written.

    Raises:
        RuntimeError: a tensor has no memory, or what a step makes would have none.
    """
    table, shared = plan.table, _sharing(plan, entries)
    if table is None:
        return Gathered(None, shared)
    if makes_fakes():
        raise RuntimeError("parameters that have memory cannot step in a mode that makes fake tensors; nothing was stepped")
    chosen = [entries[i] for i in plan.fused]
    wholes = [x.param for x in chosen], [x.grad for x in chosen], [x.state for x in chosen]
    params, grads, states = of_this_rank(table.members, *wholes)
    addresses = table.addresses_of(table.tensors(params, grads, states), [0] * len(chosen))
    shared |= {plan.fused[j] for j in table.conflicts(addresses, grads)}
    return Gathered(addresses, shared)


def _sharing(plan: Plan, entries: Sequence[Entry]) -> set[int]:
    """The positions of entries, launched ones aside, whose parameter has memory in common with another's.

    Operations that step several parameters at once (`q.data = p.data`) would lose the step of one.
    """
    spans = []
    for path, of, positions in plan.parts:
        if path in TOGETHER and of.numel and of.device.type != "meta":
            size = bytes_of(of.shape, of.stride, of.dtype)
            starts = [(entries[i].param.data_ptr(), i) for i in positions]
            spans += [(start, start + size, True, i) for start, i in starts]
    return overlapping(sorted(spans))


def launched_of(plan: Plan, addresses: array[int], inputs: Inputs) -> Launched:
    """The members of a plan's table, with what a step finds of them.

    Args:
        plan: the plan.
        addresses: as they were gathered.
        inputs: with the numbers and draws of every entry.
    """
    table = plan.table
    assert table is not None
    addresses, rows, unique = addresses[:], {}, {}  # type: ignore[var-annotated]
    for i, member in zip(plan.fused, table.members, strict=True):
        numbers = inputs.tables[i]
        if id(numbers) not in rows:
            of_kind = unique.setdefault((member.of.device, numbers.dtype), [])
            rows[id(numbers)] = len(of_kind)
            of_kind.append(numbers)
    addresses[NUMBERS::ADDRESSES] = array("q", [rows[id(inputs.tables[i])] for i in plan.fused])
    stacked = {kind: torch.stack(numbers) for kind, numbers in unique.items()}
    draws = {j: inputs.draws[i] for j, i in enumerate(plan.fused) if i in inputs.draws}
    return Launched(table, Found(addresses, stacked, draws))
