"""Steps by eager operations on a CPU, one parameter at a time.

There an operation of `torch._foreach_*` is a loop over its members, each of which it takes from memory and puts back there.
Going through one parameter, or a part of it, with all operations before the next one comes leaves it in cache in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adafactor_compiled import _depth_first
from adafactor_compiled._numbers import Numbers
from adafactor_compiled._passes import Members, run_eagerly, step_class
from adafactor_compiled._rounding import bits_of_matrix, write
from adafactor_compiled._shape_class import ShapeClass

WHOLE_NUMEL = 1_048_576  # elements that are stepped as a whole: 4 MB in float32, and as much for the update
STACK_NUMEL = 65_536  # vectors up to this size are cheaper to copy together than to step one by one,
STACK_LEAST = 4  # where there are so many of them


def step_members(
    shape_class: ShapeClass, members: Members, tables: list[Tensor], numbers: Sequence[Numbers], contiguous: bool
) -> None:
    """Step a class; see `_routes.step_eager`."""
    numel = shape_class.numel
    if not shape_class.factored and numel <= STACK_NUMEL and len(tables) >= STACK_LEAST:
        step_class(members, torch.stack(tables))
    elif contiguous and numel > WHOLE_NUMEL:
        blocking = _depth_first.eager_blocking_of(shape_class.shape, WHOLE_NUMEL)
        _depth_first.step_members(blocking, members, tables, run_eagerly)
    else:
        for i, of_member in enumerate(numbers):
            step_parameter(members if len(numbers) == 1 else Members(*(x[i : i + 1] for x in members)), of_member)


def step_parameter(member: Members, numbers: Numbers) -> None:
    """The numbered steps of `_reference.py` with fewer operations; `member` is a class of one."""
    (param,), (grad,), (rms,), (update_rms,) = member.params, member.grads, member.rms, member.update_rms
    p, g = param.to(rms.dtype), grad.to(rms.dtype)
    lr = numbers.lr.to(rms).reshape(()) if isinstance(numbers.lr, Tensor) else numbers.lr
    scale = numbers.sign * lr  # 3
    _rms(p, out=rms)  # 2
    if numbers.scale_parameter:
        scale = rms.clamp(min=numbers.min_scale) * scale
    decay = scale * (numbers.sign * numbers.weight_decay) if numbers.weight_decay else None

    update = g * g  # 5
    if member.rows:
        (row,), (col,) = member.rows, member.cols
        for average, dim in ((row, -1), (col, -2)):
            _move(average, update.mean(dim).add_(numbers.eps), numbers)
        row_factor = (row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        torch.mul(g, row_factor, out=update).mul_(col.rsqrt().unsqueeze(-2))
    else:
        (v,) = member.exp_avg_sqs
        _move(v, update.add_(numbers.eps), numbers)
        torch.mul(g, v.rsqrt(), out=update)

    _rms(update, out=update_rms)  # 6
    if numbers.clip_threshold != math.inf:
        scale = scale / (update_rms / numbers.clip_threshold).clamp_(min=1.0)
    if member.exp_avgs:  # 7, 8
        (exp_avg,) = member.exp_avgs
        exp_avg.mul_(numbers.beta1).add_(update.mul_(scale), alpha=numbers.one_minus_beta1)
        update = exp_avg
    else:
        update.mul_(scale)
    if decay is not None:  # 9: p * (1 - decay) would round 1 - decay, the same way at every step
        update = update + p * decay
    new = p.sub_(update) if p is param else p - update  # 10
    if new is not param:
        write(param, new, bits_of_matrix(member.draws[0], new.shape) if member.draws else None)


def _rms(x: Tensor, out: Tensor) -> None:
    torch.div(torch.linalg.vector_norm(x), x.numel() ** 0.5, out=out)


def _move(average: Tensor, new: Tensor, numbers: Numbers) -> None:
    weight = numbers.one_minus_beta2
    average.mul_(numbers.beta2)
    if isinstance(weight, Tensor):
        average.add_(new * weight)
    else:
        average.add_(new, alpha=weight)
