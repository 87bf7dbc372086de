"""The fused step as one operator, a node of whatever graph torch.compile makes of a training loop.

Its lists are the members of a launch. Inside of the graph nothing of the step is compiled, whatever the number of parameters,
and kernels write to the tensors themselves: Dynamo is told which lists are written, and Inductor calls it without copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._fused.launches import kernels_of, launches_of
from adafactor_compiled._fused.members import member_of
from adafactor_compiled._fused.table import Found, Table
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import Momentum, factored_dims, is_cautious, momentum_of
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update import multi_tensor
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.numbers import Numbers


def step_members(entries: Sequence[Entry], tables: Sequence[Tensor], draws: Sequence[Any]) -> None:
    """Step entries that have kernels, inside of an outer graph: a node for each device and each set of types and options.

    Args:
        entries: the members.
        tables: the numbers of each.
        draws: of each that is rounded stochastically, else None.
    """
    kinds = (
        (p.device, p.dtype, g.dtype, momentum_of(p.dtype, group), wants_rounding(p.dtype, group))
        for _, p, g, _, group in entries
    )
    for chosen in group_by_key(kinds).values():
        some = [entries[i] for i in chosen]
        factored = [factored_dims(x.param.shape, x.group) is not None for x in some]
        states = [x.state for x in some]
        momentum = momentum_of(some[0].param.dtype, some[0].group)
        of_draws = [draws[i] for i in chosen]
        torch.ops.adafactor_compiled.step(
            [x.param.detach() for x in some],
            [x.grad for x in some],
            [x["exp_avg_sq_row" if f else "exp_avg_sq"] for x, f in zip(states, factored, strict=True)],
            [x["exp_avg_sq_col"] for x, f in zip(states, factored, strict=True) if f],
            [x["exp_avg"] for x in states] if momentum is not None else [],
            [x["RMS"] for x in states],
            torch.stack([tables[i] for i in chosen]),
            None if of_draws[0] is None else torch.stack(of_draws),
            factored,
            is_cautious(momentum),
        )


@torch.library.custom_op("adafactor_compiled::step", mutates_args=("params", "rows", "cols", "exp_avgs", "rms"))
def step(
    params: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    exp_avgs: list[Tensor],
    rms: list[Tensor],
    numbers: Tensor,
    draws: Tensor | None,
    factored: list[bool],
    cautious: bool,
) -> None:
    """Step k parameters in place; what is written are all lists but the gradients.

    Args:
        params: of one dtype, on one device, of any shapes.
        grads: of one dtype.
        rows: the second moment of the rows, or of all elements.
        cols: that of the columns, of those that are factored.
        exp_avgs: the momenta, or none.
        rms: 0-dim; receives the RMS of each parameter.
        numbers: [k, len(Numbers)], of the dtype of the arithmetic.
        draws: for stochastic rounding, int32 of shape [k, DRAWS].
        factored: of each whether rows and columns stand for its second moment.
        cautious: whether elements step only where momentum and gradient agree in sign.
    """
    of_cols, momentum = iter(cols), Momentum(exp_avgs[0].dtype, cautious) if exp_avgs else None
    entries, classes = [], []
    for i, (p, g, row, is_factored) in enumerate(zip(params, grads, rows, factored, strict=True)):
        of_p, of_step = (p.dtype, g.dtype, p.device), (is_factored, momentum, draws is not None)
        classes.append(ShapeClass(tuple(p.shape), p.stride(), g.stride(), *of_p, *of_step))
        state = {"exp_avg_sq_row": row, "exp_avg_sq_col": next(of_cols)} if is_factored else {"exp_avg_sq": row}
        entries.append(Entry(i, p, g, state | ({"exp_avg": exp_avgs[i]} if exp_avgs else {}) | {"RMS": rms[i]}, {}))
    for i in set(range(len(params))) - _stepped_by_kernels(entries, classes, numbers, draws):  # right, and slower
        of_draws, table = None if draws is None else draws[i : i + 1], numbers[i : i + 1]
        measured = multi_tensor.step([Members.of(classes[i], [entries[i]], table, Numbers.of(table), of_draws)])[0]
        rms[i].copy_(measured[0, 0])


def _stepped_by_kernels(entries: list[Entry], classes: list[ShapeClass], numbers: Tensor, draws: Tensor | None) -> set[int]:
    """The positions of the entries that kernels have stepped: all that these know, unless their memory is shared."""
    chosen = [x for x, of in zip(entries, classes, strict=True) if kernels_of(of) is not None]
    if not chosen:
        return set()
    positions = [x.position for x in chosen]
    update_rms = torch.zeros(len(chosen), dtype=numbers.dtype, device=numbers.device).unbind()
    members = [member_of(x, classes[x.position], to) for x, to in zip(chosen, update_rms, strict=True)]
    table = Table(members, _launches_of(tuple(x.planned for x in members)))
    params, grads = [x.param for x in chosen], [x.grad for x in chosen]
    addresses = table.addresses_of(table.tensors(params, grads, [x.state for x in chosen]), positions)
    if table.conflicts(addresses, grads):
        return set()
    of_draws = {} if draws is None else {i: draws[position] for i, position in enumerate(positions)}
    table.run(Found(addresses, {(numbers.device, numbers.dtype): numbers}, of_draws))
    for launch in table.launches:  # which are kept, and this may be inside of a CUDA graph
        launch.forget()
    return set(positions)


_launches_of = lru_cache(maxsize=64)(launches_of)  # of a tuple
