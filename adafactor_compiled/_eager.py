"""Steps by eager operations on a CPU, one parameter at a time.

There an operation of `torch._foreach_*` is a loop over its members, each of which it takes from memory and puts back there.
Going through one parameter, or a part of it, with all operations before the next one comes leaves it in cache in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled import _joined
from adafactor_compiled._depth_first import draws_from, eager_blocking_of
from adafactor_compiled._numbers import Numbers
from adafactor_compiled._passes import Members
from adafactor_compiled._rounding import noise_of, write
from adafactor_compiled._shape_class import ShapeClass

WHOLE_NUMEL = 524_288  # elements that are stepped as a whole: 2 MB in float32, and as much for the update
JOINED_LEAST = 4  # short vectors are cheaper to copy together than to step one by one where there are so many of them


def step_members(
    shape_class: ShapeClass,
    members: Members,
    tables: list[Tensor],
    numbers: Sequence[Numbers],
    in_parts: bool,
    kept: dict[str, Any],
) -> None:
    """Step a class, large contiguous matrices perhaps in parts; see `_routes.step_eager`."""
    numel = shape_class.numel
    if shape_class.joined and len(tables) >= JOINED_LEAST:
        _joined.step_members(members, tables, kept)
        return
    step = _step_in_parts if in_parts and numel > WHOLE_NUMEL else _step_whole
    for i, of_member in enumerate(numbers):
        step(members if len(numbers) == 1 else Members(*(x[i : i + 1] for x in members)), of_member)


def _step_whole(member: Members, numbers: Numbers) -> None:
    """The numbered steps of `_reference.py` with fewer operations; `member` is a class of one."""
    (param,), (grad,), (rms,), (update_rms,) = member.params, member.grads, member.rms, member.update_rms
    p, g = param.to(rms.dtype), grad.to(rms.dtype)
    torch.div(torch.linalg.vector_norm(p), p.numel() ** 0.5, out=rms)  # 2
    alpha = _step_size(rms, numbers)  # 3, 4

    update = g * g  # 5
    if member.rows:
        (row,), (col,) = member.rows, member.cols
        for average, dim in ((row, -1), (col, -2)):
            _move(average, update.mean(dim).add_(numbers.eps), numbers)
        row_factor, factor = (row / row.mean(-1, keepdim=True)).rsqrt_(), col.rsqrt().unsqueeze(-2)
        if g.ndim == 2 and g.numel():  # two passes less; elsewhere, short rows make them slower than the others
            sums = _over_columns(update, col).mul_(row_factor).mul_(row_factor)
            torch.div(sums.sum(), g.numel(), out=update_rms).sqrt_()  # 6
            row_factor.mul_(_clipped(alpha, update_rms, numbers))  # 7
            torch.mul(g, row_factor.unsqueeze(-1), out=update)
        else:
            torch.mul(g, row_factor.unsqueeze(-1), out=update).mul_(factor)
            factor = _clipped_by_norm(alpha, update, update_rms, numbers)
    else:
        (v,) = member.exp_avg_sqs
        _move(v, update.add_(numbers.eps), numbers)
        torch.mul(g, v.rsqrt(), out=update)
        factor = _clipped_by_norm(alpha, update, update_rms, numbers)
    exp_avg = member.exp_avgs[0] if member.exp_avgs else None
    _apply(param, p, update, factor, exp_avg, alpha, numbers, member.draws[0] if member.draws else None)


def _step_in_parts(member: Members, numbers: Numbers) -> None:
    """The same for a contiguous matrix that does not fit in cache; see `_blocked.py` for the RMS of its update."""
    (param,), (grad,), (rms,), (update_rms,) = member.params, member.grads, member.rms, member.update_rms
    blocking = eager_blocking_of(tuple(param.shape), WHOLE_NUMEL)
    slices, rows, columns = blocking[:3]
    params, grads = param.view(slices, rows, columns), grad.view(slices, rows, columns)
    row, col = member.rows[0].view(slices, rows), member.cols[0].view(slices, columns)
    col_sq, weighted_sq, norms = torch.zeros_like(col), torch.zeros_like(col), []
    for part in blocking.chunks():
        g, of_row, at = part.of(grads).to(rms.dtype), part.of(row), part.slices
        norms.append(torch.linalg.vector_norm(part.of(params).to(rms.dtype)))
        squared = g * g
        _move(of_row, squared.mean(-1).add_(numbers.eps), numbers)
        col_sq[at].add_(squared.sum((-2, -3)))
        weighted_sq[at].add_(_over_rows(squared, of_row))
    _move(col, col_sq.div_(rows).add_(numbers.eps), numbers)
    row_mean = row.mean(-1, keepdim=True)

    torch.div(torch.linalg.vector_norm(torch.stack(norms)), param.numel() ** 0.5, out=rms)
    torch.div((weighted_sq.div_(col) * row_mean).sum(), param.numel(), out=update_rms).sqrt_()
    alpha = _step_size(rms, numbers)
    row_factor = (row / row_mean).rsqrt_().mul_(_clipped(alpha, update_rms, numbers))
    col_factor = col.rsqrt()
    exp_avgs = member.exp_avgs[0].view(slices, rows, columns) if member.exp_avgs else None
    for part in blocking.chunks():
        of_param, g = part.of(params), part.of(grads).to(rms.dtype)
        update = g * part.of(row_factor).unsqueeze(-1)
        of_col = col_factor[part.slices].unsqueeze(-2).unsqueeze(-2)
        exp_avg = None if exp_avgs is None else part.of(exp_avgs)
        draws = draws_from(member.draws[0], part.first_slice, part.rows.start) if member.draws else None
        _apply(of_param, of_param.to(rms.dtype), update, of_col, exp_avg, alpha, numbers, draws)


def _over_columns(squared: Tensor, col: Tensor) -> Tensor:
    """The sum over the columns of squared / col, of a matrix."""
    least = col.min()  # 1 / col might overflow
    return torch.mv(squared, least / col).div_(least)


def _over_rows(squared: Tensor, row: Tensor) -> Tensor:
    """The sum over the rows of squared / row, shape [..., C], of blocks [..., n, B, C], which may be overwritten."""
    if squared.ndim > 3:
        return squared.div_(row.unsqueeze(-1)).sum((-2, -3))
    return torch.mv(squared.flatten(0, 1).mT, row.reciprocal().flatten())


def _step_size(rms: Tensor, numbers: Numbers) -> Tensor:
    """With the sign of the step."""
    lr = numbers.lr.to(rms).reshape(()) if isinstance(numbers.lr, Tensor) else numbers.lr
    scale = rms.clamp(min=numbers.min_scale) if numbers.scale_parameter else torch.ones_like(rms)
    alpha: Tensor = scale * (numbers.sign * lr)
    return alpha


def _clipped(alpha: Tensor, update_rms: Tensor, numbers: Numbers) -> Tensor:
    divisor: Tensor = (update_rms / numbers.clip_threshold).clamp_(min=1.0)
    return alpha if numbers.clip_threshold == math.inf else alpha / divisor


def _clipped_by_norm(alpha: Tensor, update: Tensor, update_rms: Tensor, numbers: Numbers) -> Tensor:
    torch.div(torch.linalg.vector_norm(update), update.numel() ** 0.5, out=update_rms)  # 6
    return _clipped(alpha, update_rms, numbers)  # 7


def _apply(
    param: Tensor,
    p: Tensor,
    update: Tensor,
    factor: Tensor,
    exp_avg: Tensor | None,
    alpha: Tensor,
    numbers: Numbers,
    draws: Tensor | None,
) -> None:
    """Steps 8 to 10; `p` is `param`, widened where that is half-precision.

    `update` may be overwritten and lacks a last factor, so that there is one pass less where p is all it is applied to.
    """
    if exp_avg is None and not numbers.weight_decay and p is param:
        p.addcmul_(update, factor, value=-1.0)
        return
    update.mul_(factor)
    if exp_avg is not None:
        update = exp_avg.mul_(numbers.beta1).add_(update, alpha=numbers.one_minus_beta1)
    if numbers.weight_decay:  # p * (1 - decay) would round 1 - decay, the same way at every step
        update = update + p * (alpha * (numbers.sign * numbers.weight_decay))
    if p is param:
        p.sub_(update)
    else:
        write(param, p - update, None if draws is None else noise_of(draws, p.shape, param.dtype))


def _move(average: Tensor, new: Tensor, numbers: Numbers) -> None:
    weight = numbers.one_minus_beta2
    average.mul_(numbers.beta2)
    if isinstance(weight, Tensor):
        average.add_(new * weight)
    else:
        average.add_(new, alpha=weight)
