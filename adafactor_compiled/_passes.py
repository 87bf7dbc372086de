"""One step of a whole shape class, breadth-first: the numbered steps of `_reference.py` over k members at once.

The parameters and gradients, which are large, are lists stepped by `torch._foreach_*` operations where they lie. What is
small (the second-moment factors, the numbers) is stacked along a first dimension of size k. So is a class of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._numbers import Numbers, clip_divisor, step_size
from adafactor_compiled._rounding import noise_of, noise_of_vectors, rounded, write

# Runs a function on arguments: compiled, or to note what would be compiled. The tuple says what a graph of it depends on.
# With `lay_out`, the function takes what that makes of the arguments: views of them, which not every call needs to have.
Runner = Callable[..., Any]
LayOut = Callable[..., tuple[Any, ...]]


class Members(NamedTuple):
    """The tensors of k parameters of one shape class, each field a list of k (empty where the class has none)."""

    params: list[Tensor]
    grads: list[Tensor]
    rows: list[Tensor]
    cols: list[Tensor]
    exp_avg_sqs: list[Tensor]
    exp_avgs: list[Tensor]
    rms: list[Tensor]
    update_rms: list[Tensor]  # written: the RMS of the update before clipping
    draws: list[Tensor]  # for stochastic rounding, see _rounding.py


def step_class(members: Members, table: Tensor) -> None:
    """Step k members in place; `table` holds their `Numbers`, shape [k, len(Numbers)]."""
    if members.rows:
        _step_matrices(members, table)
    else:
        _step_vectors(members, table)


def _step_matrices(members: Members, table: Tensor) -> None:
    numbers = Numbers.of(table)
    n = members.params[0].numel()
    ndim = members.params[0].ndim
    params, grads = _to(members.params, table.dtype), _to(members.grads, table.dtype)

    param_rms = torch.stack(torch._foreach_norm(params)) / n**0.5  # 2
    alpha = step_size(numbers, param_rms)  # 3, 4

    squared = torch._foreach_mul(grads, grads)  # 5
    row = _moving_average(members.rows, [s.mean(-1) for s in squared], numbers.unsqueeze(ndim - 1))
    col = _moving_average(members.cols, [s.mean(-2) for s in squared], numbers.unsqueeze(ndim - 1))
    del squared
    row_factor = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
    update = list(torch._foreach_mul(grads, row_factor.unbind()))
    torch._foreach_mul_(update, col.rsqrt().unsqueeze(-2).unbind())

    update_rms = torch.stack(torch._foreach_norm(update)) / n**0.5  # 6
    scale = numbers.sign * alpha / clip_divisor(numbers, update_rms)
    torch._foreach_mul_(update, scale.unbind())  # 7

    if members.exp_avgs:  # 8
        torch._foreach_mul_(members.exp_avgs, numbers.beta1.unbind())
        torch._foreach_mul_(update, numbers.one_minus_beta1.unbind())
        torch._foreach_add_(members.exp_avgs, update)
        update = members.exp_avgs
    # p - (p * decay + update): p * (1 - decay) would round 1 - decay, the same way at every step.
    decrease = torch._foreach_mul(params, (numbers.weight_decay * alpha).unbind())  # 9
    torch._foreach_add_(decrease, update)
    new = torch._foreach_sub(params, decrease)  # 10
    if members.draws:
        dtype = members.params[0].dtype
        new = tuple(rounded(x, noise_of(d, x.shape, dtype), dtype) for x, d in zip(new, members.draws, strict=True))
    torch._foreach_copy_(members.params, new)

    torch._foreach_copy_(members.rms, param_rms.unbind())
    torch._foreach_copy_(members.update_rms, update_rms.unbind())


def _step_vectors(members: Members, table: Tensor) -> None:
    """Vectors and 0-dim parameters are stacked: [k, n] costs one copy and few operations."""
    with_stacked(members, lambda stacked: step_stacked(stacked, table))


class Stacked(NamedTuple):
    """k vectors of n elements as tensors of shape [k, n]; what is one number for each has shape [k, 1].

    `_joined.py` holds vectors of several lengths in it, in blocks.
    """

    params: Tensor
    grads: Tensor
    exp_avg_sqs: Tensor
    exp_avgs: Tensor | None
    rms: Tensor
    update_rms: Tensor
    draws: Tensor | None = None  # [k, 7]


def with_stacked(members: Members, step: Callable[[Stacked], None]) -> None:
    """Run `step` on the stacked vectors of a class and put the results back."""
    stacked = stacked_of(members)
    step(stacked)
    put_back(members, stacked)


def stacked_of(members: Members) -> Stacked:
    """Copies of the vectors of a class, stacked; room for what is only written."""
    params, exp_avg_sqs = _stack(members.params), _stack(members.exp_avg_sqs)
    exp_avgs = _stack(members.exp_avgs) if members.exp_avgs else None
    draws = _stack(members.draws) if members.draws else None
    rms, update_rms = (exp_avg_sqs.new_empty(len(params), 1) for _ in range(2))
    return Stacked(params, _stack(members.grads), exp_avg_sqs, exp_avgs, rms, update_rms, draws)


def put_back(members: Members, stacked: Stacked) -> None:
    """Copy stacked vectors to where they came from."""
    _unstack_(members.params, stacked.params)
    _unstack_(members.exp_avg_sqs, stacked.exp_avg_sqs)
    if stacked.exp_avgs is not None:
        _unstack_(members.exp_avgs, stacked.exp_avgs)
    _unstack_(members.rms, stacked.rms)
    _unstack_(members.update_rms, stacked.update_rms)


def step_stacked(x: Stacked, table: Tensor) -> None:
    """Step k stacked vectors in place."""
    apply_stacked(x, stacked_update(x, table), table, x.params.shape[1])


class StackedUpdate(NamedTuple):
    """What the first reads of k stacked vectors give; the sums of shards of a vector add up."""

    update: Tensor  # [k, n], before it is scaled
    exp_avg_sqs: Tensor  # [k, n], new
    param_sq: Tensor  # [k, 1]: sum of parameter^2
    update_sq: Tensor  # [k, 1]: sum of update^2


def stacked_update(x: Stacked, table: Tensor) -> StackedUpdate:
    """The first reads of k stacked vectors; nothing is written."""
    numbers = Numbers.of(table).unsqueeze(1)
    p, g = x.params.to(table.dtype), x.grads.to(table.dtype)
    v = x.exp_avg_sqs * numbers.beta2 + (g * g + numbers.eps) * numbers.one_minus_beta2  # 5
    update = g * v.rsqrt()
    return StackedUpdate(update, v, (p * p).sum(-1, keepdim=True), (update * update).sum(-1, keepdim=True))


def apply_stacked(x: Stacked, new: StackedUpdate, table: Tensor, numel: int) -> None:
    """All writes of a step of k stacked vectors of `numel` elements (of which n are here)."""
    numbers = Numbers.of(table).unsqueeze(1)
    p = x.params.to(table.dtype)
    param_rms, update_rms = (new.param_sq / numel).sqrt(), (new.update_sq / numel).sqrt()  # 2, 6
    alpha = step_size(numbers, param_rms)  # 3, 4
    update = new.update * (numbers.sign * alpha / clip_divisor(numbers, update_rms))  # 6, 7
    if x.exp_avgs is not None:  # 8
        update = x.exp_avgs * numbers.beta1 + update * numbers.one_minus_beta1
        x.exp_avgs.copy_(update)
    noise = None if x.draws is None else noise_of_vectors(x.draws, p.shape[1], x.params.dtype)
    write(x.params, p - (p * (numbers.weight_decay * alpha) + update), noise)  # 9, 10

    x.exp_avg_sqs.copy_(new.exp_avg_sqs)
    x.rms.copy_(param_rms)
    x.update_rms.copy_(update_rms)


def _moving_average(averages: list[Tensor], means: list[Tensor], numbers: Numbers) -> Tensor:
    """Bring the row or column averages up to date and return them stacked."""
    new: Tensor = torch.stack(averages) * numbers.beta2 + (torch.stack(means) + numbers.eps) * numbers.one_minus_beta2
    torch._foreach_copy_(averages, new.unbind())
    return new


def _to(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return tensors if tensors[0].dtype == dtype else [x.to(dtype) for x in tensors]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """[k, n] of k vectors of n elements (n = 1 for 0-dim ones)."""
    stacked = torch.stack(tensors)  # type: ignore[arg-type]
    return stacked if stacked.ndim == 2 else stacked.unsqueeze(1)


def _unstack_(tensors: list[Tensor], stacked: Tensor) -> None:
    torch._foreach_copy_(tensors, (stacked if tensors[0].ndim == 1 else stacked.squeeze(1)).unbind())
