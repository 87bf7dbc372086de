"""The multi-tensor path on a CPU: eager operations, one parameter at a time.

There an operation of `torch._foreach_*` is a loop over its members, each of which it takes from memory and puts back there.
Going through one parameter, or a part of it, with all operations before the next one comes leaves it in cache in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adafactor_compiled._update import kernels
from adafactor_compiled._update.blocks import eager_blocking_of
from adafactor_compiled._update.members import Member
from adafactor_compiled._update.momentum import cautious
from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled._update.rounding import draws_from, noise_of_member, write

WHOLE_NUMEL = 524_288  # elements that are stepped as a whole: 2 MB in float32, and as much for the update


def step_parameter(x: Member, numbers: Numbers, rms: Tensor, update_rms: Tensor) -> None:
    """Step a parameter, a large contiguous matrix in parts; `rms` and `update_rms`, 0-dim, are written.

    Args:
        x: the parameter.
        numbers: its numbers: Python numbers, where no input is a tensor.
        rms: receives the RMS of the parameter.
        update_rms: receives the RMS of the update before clipping.
    """
    in_parts = x.row is not None and not x.cautious
    in_parts = in_parts and x.p.numel() > WHOLE_NUMEL and x.p.shape[-2:].numel() > kernels.MOST  # those are quicker as a whole
    in_parts = in_parts and all(of.is_contiguous() for of in (x.p, x.g, x.row, x.col))
    (_step_in_parts if in_parts else _step_whole)(x, numbers, rms, update_rms)


def _step_whole(x: Member, numbers: Numbers, rms: Tensor, update_rms: Tensor) -> None:
    """The numbered steps of reference.py with fewer operations."""
    param, grad = x.p, x.g
    p, g = param.to(rms.dtype), grad.to(rms.dtype)
    torch.div(torch.linalg.vector_norm(p), p.numel() ** 0.5, out=rms)  # 2
    alpha = _step_size(rms, numbers)  # 3, 4

    update = g * g  # 5
    if x.row is not None:
        row, col = x.row, x.col
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
        v = x.exp_avg_sq
        _move(v, update.add_(numbers.eps), numbers)
        torch.mul(g, v.rsqrt(), out=update)
        factor = _clipped_by_norm(alpha, update, update_rms, numbers)
    noise = noise_of_member(x.draws, param, x.exp_avg, x.row is not None)
    _apply(x, p, update, factor, alpha, numbers, noise)


def _step_in_parts(x: Member, numbers: Numbers, rms: Tensor, update_rms: Tensor) -> None:
    """The same for a contiguous matrix that does not fit in cache; see matrices.py for the RMS of its update."""
    param, grad = x.p, x.g
    blocking = eager_blocking_of(tuple(param.shape), WHOLE_NUMEL)
    slices, rows, columns = blocking[:3]
    params, grads = param.view(slices, rows, columns), grad.view(slices, rows, columns)
    row, col = x.row.view(slices, rows), x.col.view(slices, columns)
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
    exp_avgs = None if x.exp_avg is None else x.exp_avg.view(slices, rows, columns)
    for part in blocking.chunks():
        of_param, g = part.of(params), part.of(grads).to(rms.dtype)
        update = g * part.of(row_factor).unsqueeze(-1)
        of_col = col_factor[part.slices].unsqueeze(-2).unsqueeze(-2)
        exp_avg = None if exp_avgs is None else part.of(exp_avgs)
        noise = noise_of_member(draws_from(x.draws, part.first_slice, part.rows.start), of_param, exp_avg, True)
        of_part = x._replace(p=of_param, g=g, exp_avg=exp_avg)
        _apply(of_part, of_param.to(rms.dtype), update, of_col, alpha, numbers, noise)


def _over_columns(squared: Tensor, col: Tensor) -> Tensor:
    """The sum over the columns of squared / col, of a matrix."""
    # 1 / col might overflow, and underflow beside another; a column whose mean has overflowed counts nothing.
    scale = col.min().sqrt() * col.max().clamp(max=torch.finfo(col.dtype).max).sqrt()
    return torch.mv(squared, scale / col).div_(scale)


def _over_rows(squared: Tensor, row: Tensor) -> Tensor:
    """The sum over the rows of squared / row, shape [..., C], of blocks [..., n, B, C], which may be overwritten."""
    if squared.ndim > 3:
        return squared.div_(row.unsqueeze(-1)).sum((-2, -3))
    return torch.mv(squared.flatten(0, 1).mT, row.reciprocal().flatten())


def _step_size(rms: Tensor, numbers: Numbers) -> Tensor:
    """With the sign of the step."""
    lr = numbers.lr.to(rms) if isinstance(numbers.lr, Tensor) else numbers.lr
    scale = rms.clamp(min=numbers.min_scale) if numbers.scale_parameter else torch.ones_like(rms)
    alpha: Tensor = scale * (numbers.sign * lr)
    return alpha


def _clipped(alpha: Tensor, update_rms: Tensor, numbers: Numbers) -> Tensor:
    divisor: Tensor = (update_rms / numbers.clip_threshold).clamp_(min=1.0)
    return alpha if numbers.clip_threshold == math.inf else alpha / divisor


def _clipped_by_norm(alpha: Tensor, update: Tensor, update_rms: Tensor, numbers: Numbers) -> Tensor:
    torch.div(torch.linalg.vector_norm(update), update.numel() ** 0.5, out=update_rms)  # 6
    return _clipped(alpha, update_rms, numbers)  # 7


def _apply(x: Member, p: Tensor, update: Tensor, factor: Tensor, alpha: Tensor, numbers: Numbers, noise: Tensor | None) -> None:
    """Steps 8 to 10; `p` is the parameter, widened where that is half-precision.

    `update` may be overwritten and lacks a last factor, so that there is one pass less where p is all it is applied to.
    """
    if x.exp_avg is None and not numbers.weight_decay and p is x.p:
        p.addcmul_(update, factor, value=-1.0)
        return
    update.mul_(factor)
    if x.exp_avg is not None:
        exp_avg = x.exp_avg.to(update.dtype)
        update = exp_avg.mul_(numbers.beta1).add_(update, alpha=numbers.one_minus_beta1)
        if exp_avg is not x.exp_avg:
            write(x.exp_avg, exp_avg, noise)
    if x.cautious:
        update = cautious(update, x.g, numbers, torch.mean)
    if numbers.weight_decay:  # p * (1 - decay) would round 1 - decay, the same way at every step
        update = update + p * (alpha * (numbers.sign * numbers.weight_decay) if numbers.decay_by_lr else numbers.weight_decay)
    if p is x.p:
        p.sub_(update)
    else:
        write(x.p, p - update, noise)


def _move(average: Tensor, new: Tensor, numbers: Numbers) -> None:
    weight = numbers.one_minus_beta2
    average.mul_(numbers.beta2)
    if isinstance(weight, Tensor):
        average.add_(new * weight)
    else:
        average.add_(new, alpha=weight)
