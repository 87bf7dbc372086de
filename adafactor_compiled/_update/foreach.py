"""One step of a shape class, breadth-first: the numbered steps of reference.py by `torch._foreach_*` operations over k members.

The multi-tensor path; on a CPU what is large, or alone, is stepped by eager.py. What is large stays where it lies, in lists;
what is small (the second-moment factors, the numbers) is stacked along a first dimension of size k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.members import Member, Members
from adafactor_compiled._update.momentum import cautious
from adafactor_compiled._update.numbers import Numbers, clip_divisor, decay_of, step_size
from adafactor_compiled._update.rounding import noise_of_member, write

IN_CACHE, LEAST = 262_144, 4  # on a CPU: elements that are stepped at once, and members that are worth it
PARTS_OF_HALF = 4  # a class in half precision is stepped in so many: float32 takes twice as much, three times, and a little


def step_class(members: Members) -> Tensor:
    """Step k members of one shape; gives the RMS of each and of its update, shape [2, k].

    Temporaries take at most twice what the parameters take, and what rounds a member stochastically.
    """
    k, halves = len(members.params), members.params[0].dtype != members.table.dtype
    size = -(-k // PARTS_OF_HALF) if halves and not torch.compiler.is_compiling() else k
    if members.params[0].device.type == "cpu" and not torch.compiler.is_compiling():
        size = min(size, max(1, _in_cache(members.params[0].numel())))
    if size == k:
        return _step(members)
    return torch.cat([_step(members.part(start, start + size)) for start in range(0, k, size)], 1)


def steps_one_by_one(of: ShapeClass, k: int) -> bool:
    """Whether eager operations go through one parameter after the other, and not each through all of a class.

    On a CPU an operation of `torch._foreach_*` takes each member from memory and puts it back, unless all of them stay in its
    cache. Elsewhere a launch is dear.
    """
    together = min(k, _in_cache(of.numel)) >= LEAST
    return of.device.type == "cpu" and not torch.compiler.is_compiling() and not together


def _in_cache(numel: int) -> int:
    """How many members of so many elements stay in it."""
    return IN_CACHE // max(1, numel)


def _step(members: Members) -> Tensor:
    numbers = Numbers.of(members.table)
    n, dtype = members.params[0].numel(), members.table.dtype
    params, grads = _to(members.params, dtype), _to(members.grads, dtype)

    rms = torch.stack(torch._foreach_norm(params)) / n**0.5  # 2
    alpha = step_size(numbers, rms)  # 3, 4
    update = _factored_update(members, grads, numbers) if members.rows else _whole_update(members, grads, numbers)  # 5
    del grads
    update_rms = torch.stack(torch._foreach_norm(update)) / n**0.5  # 6
    scale = numbers.sign * alpha / clip_divisor(numbers, update_rms)
    torch._foreach_mul_(update, scale.unbind())  # 7

    if members.exp_avgs:  # 8
        exp_avgs = _to(members.exp_avgs, dtype)
        torch._foreach_mul_(exp_avgs, numbers.beta1.unbind())
        torch._foreach_mul_(update, numbers.one_minus_beta1.unbind())
        torch._foreach_add_(exp_avgs, update)
        update = exp_avgs
        if exp_avgs is not members.exp_avgs:
            for member, x in zip(members.each(), exp_avgs, strict=True):
                write(member.exp_avg, x, _noise(member))
    if members.cautious:
        each = zip(update, members.grads, members.table, strict=True)
        update = [cautious(x, g, Numbers.of(table), torch.mean) for x, g, table in each]
    # p - (p * decay + update): p * (1 - decay) would round 1 - decay, the same way at every step.
    decrease = torch._foreach_mul(params, decay_of(numbers, alpha).unbind())  # 9
    torch._foreach_add_(decrease, update)
    torch._foreach_sub_(params, decrease)  # 10
    if members.draws is not None:
        for member, x in zip(members.each(), params, strict=True):
            write(member.p, x, _noise(member))
    elif members.params[0].dtype != dtype:  # else these are the parameters themselves
        torch._foreach_copy_(members.params, params)
    return torch.stack([rms, update_rms])


def _noise(x: Member) -> Tensor | None:
    return noise_of_member(x.draws, x.p, x.exp_avg, x.row is not None)


def _factored_update(members: Members, grads: list[Tensor], numbers: Numbers) -> list[Tensor]:
    squared = torch._foreach_mul(grads, grads)
    small = numbers.unsqueeze(grads[0].ndim - 1)
    row = _moving_average(members.rows, [s.mean(-1) for s in squared], small)
    col = _moving_average(members.cols, [s.mean(-2) for s in squared], small)
    del squared
    row_factor = (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
    update = list(torch._foreach_mul(grads, row_factor.unbind()))
    torch._foreach_mul_(update, col.rsqrt().unsqueeze(-2).unbind())
    return update


def _moving_average(averages: list[Tensor], means: list[Tensor], numbers: Numbers) -> Tensor:
    """Bring the row or column averages up to date and return them stacked."""
    # Not a call: its arguments would stay in memory, and those of kernels of convolutions are no small things.
    new: Tensor = torch.stack(averages) * numbers.beta2 + (torch.stack(means) + numbers.eps) * numbers.one_minus_beta2
    torch._foreach_copy_(averages, new.unbind())
    return new


def _whole_update(members: Members, grads: list[Tensor], numbers: Numbers) -> list[Tensor]:
    squared = torch._foreach_mul(grads, grads)
    torch._foreach_add_(squared, numbers.eps.unbind())
    torch._foreach_mul_(squared, numbers.one_minus_beta2.unbind())
    torch._foreach_mul_(members.exp_avg_sqs, numbers.beta2.unbind())
    torch._foreach_add_(members.exp_avg_sqs, squared)
    del squared
    update = list(torch._foreach_rsqrt(members.exp_avg_sqs))
    torch._foreach_mul_(update, grads)
    return update


def _to(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return tensors if tensors[0].dtype == dtype else [x.to(dtype) for x in tensors]
