"""The part of a step that fused kernels take: what they read, gathered and checked, and what they report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.gpu import layout as gpu_layout
from adafactor_compiled._fused.launches import ADDRESSES
from adafactor_compiled._fused.members import addresses_in
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._step.plan import Plan
from adafactor_compiled._step.ranges import UNNAMED, profiled, range_of_table
from adafactor_compiled._step.shared import sharing


def skips_by_itself(device: torch.device) -> bool:
    """Whether kernels look at gradients before they write: those of a CPU do."""
    return device.type == "cpu" and not gpu_layout.is_gpu(device) and not torch.compiler.is_compiling()


class Gathered(NamedTuple):
    addresses: list[int]  # of the members of a plan's table, rows of numbers yet to be said
    shared: set[int]  # positions of entries that share memory which is written, and cannot step together


def gathered(plan: Plan, entries: Sequence[Entry]) -> Gathered:
    """Where all lies that kernels touch, looked at before anything is written.

    Raises:
        RuntimeError: a tensor has no memory.
    """
    table, shared = plan.table, sharing(plan, entries)
    if table is None:
        return Gathered([], shared)
    addresses: list[int] = []
    for i, member in zip(plan.fused, table.members, strict=True):
        entry = entries[i]
        found = addresses_in(member, entry.param, entry.grad, entry.state)
        if found is None:
            raise RuntimeError(
                f"parameter {entry.position} (shape {tuple(entry.param.shape)}), its gradient or its state has no memory; "
                "nothing was stepped"
            )
        addresses += (*found, 0)
    conflicts = table.conflicts(addresses, [entries[i].grad for i in plan.fused])
    return Gathered(addresses, shared | {plan.fused[j] for j in conflicts})


def run_table(plan: Plan, addresses: list[int], tables: Sequence[Tensor], draws: dict[int, Tensor]) -> set[int]:
    """Step the members of a plan's table; gives the positions of those that kernels skipped.

    Args:
        plan: the plan.
        addresses: as they were gathered.
        tables: the numbers of every entry.
        draws: of those entries that are rounded stochastically.
    """
    table = plan.table
    assert table is not None
    addresses, rows, unique = addresses[:], {}, {}  # type: ignore[var-annotated]
    for j, i in enumerate(plan.fused):
        of, numbers = table.members[j].of, tables[i]
        kind = of.device, numbers.dtype
        if id(numbers) not in rows:
            unique.setdefault(kind, []).append(numbers)
            rows[id(numbers)] = len(unique[kind]) - 1
        addresses[(j + 1) * ADDRESSES - 1] = rows[id(numbers)]
    stacked = {kind: torch.stack(numbers) for kind, numbers in unique.items()}
    with range_of_table(table) if profiled() else UNNAMED:
        skipped = table.run(addresses, stacked, {j: draws[i] for j, i in enumerate(plan.fused) if i in draws})
    return {plan.fused[j] for j in skipped}
