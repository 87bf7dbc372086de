"""The multi-tensor path: the numbered steps of reference.py by `torch._foreach_*`, over classes of k parameters of one shape.

What is large stays where it lies, in lists; what is small (averages of rows and columns, numbers) is stacked along a first
dimension of size k. A step has four stages, so that ranks can add up sums after the first one. `torch.compile` makes one graph
of all four, for which a matrix may come in blocks of rows: as [n, B, C], its columns are summed while a block is in cache.

The RMS of an update needs no update: with the new averages `row` and `col` of a slice,

    sum_ij update_ij^2 = mean(row) * sum_j (sum_i gradient_ij^2 / row_i) / col_j
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._update.members import Members, Tensors
from adafactor_compiled._update.numbers import LEAST_SHARE, Numbers, moving_average, root_mean, scale_and_decay
from adafactor_compiled._update.rounding import half_of, noise_of, write

FEW = 4  # elements whose sum is taken by additions


class Sums(NamedTuple):
    """What the first reads make of k members; sums over pieces of a parameter add up to those of the whole."""

    param_sq: Tensor  # [k]
    own: Any = None  # of matrices, [k, ..., R]: the new averages of the rows
    own_sum: Any = None  # of matrices, [k, ...]: the sum of `own`
    shared_sq: Any = None  # [k, ..., C]: sum over the rows of gradient^2
    weighted_sq: Any = None  # [k, ..., C]: the same, each row divided by its new average
    update_sq: Any = None  # of what is not factored, [k]


class Averages(NamedTuple):
    """The new averages of k matrices, if these are matrices, and the sums of the squares of their updates."""

    update_sq: Tensor  # [k]
    own: Any = None  # [k, ..., R]
    shared: Any = None  # [k, ..., C]
    mean: Any = None  # of the averages of the rows, [k, ...]


class Factors(NamedTuple):
    """What the numbers of k members make of their sums, each [k]."""

    scale: Tensor  # of an update before it is clipped
    decay: Tensor  # the share of a parameter that decays


def step(classes: Sequence[Members]) -> list[Tensor]:
    """Step the members of classes, on one device and in one dtype of arithmetic; gives the RMS of each and of its update.

    These have shape [2, k] for each class. Temporaries take at most twice what a part of a class takes.
    """
    parts = [list(members.parts()) for members in classes]
    flat = [part for of_class in parts for part in of_class]
    param_sq, new = zip(*map(_first, flat), strict=True)
    numels = [part.params[0].numel() for part in flat]
    factors, measured = factors_of(flat, param_sq, [x.update_sq for x in new], numels)
    for part, x, f in zip(flat, new, factors, strict=True):
        apply(part, x, f)
    return list(torch.split(measured, [len(members.params) for members in classes], 1))


def _first(members: Members) -> tuple[Tensor, Averages]:
    sums = statistics(members)
    return sums.param_sq, averages(members, sums, rows_of(members))


def rows_of(members: Members) -> int:
    """What the columns of a whole parameter are averaged over."""
    return math.prod(members.own[0].shape[-1 - _blocks(members) :]) if members.shared else 0


def statistics(members: Members) -> Sums:
    """The first reads (2, 5); nothing is written."""
    numbers, dtype = members.numbers, members.table.dtype
    param_sq = _sums_of_squares(_to(members.params, dtype))
    if not members.shared:
        return Sums(param_sq, update_sq=_sums_of_whole_updates(members))
    squared = _squares(members)
    means = _stack([_sum_along(-1, x) for x in squared]) / squared[0].shape[-1]
    own = moving_average(_stack(members.own), means, numbers.unsqueeze(means.ndim - 1))
    shared_sq = _over_rows(members, squared)
    if torch.compiler.is_compiling():  # where two products take half the time of a quotient
        roots = _kept(own.rsqrt()).unsqueeze(-1).unbind()
        for _ in range(2):
            torch._foreach_mul_(squared, roots)
    else:
        torch._foreach_div_(squared, own.unsqueeze(-1).unbind())
    own_sum = own.flatten(own.ndim - 1 - _blocks(members)).sum(-1)
    return Sums(param_sq, own, own_sum, shared_sq, _over_rows(members, squared))


def averages(members: Members, sums: Sums, rows: int) -> Averages:
    """What the sums of whole parameters of so many rows make of the second moments; nothing is written."""
    if not members.shared:
        return Averages(sums.update_sq)
    numbers = members.numbers.unsqueeze(sums.shared_sq.ndim - 1)
    shared = moving_average(_stack(members.shared), sums.shared_sq / rows, numbers)
    mean = shared.mean(-1) if members.transposed else sums.own_sum / rows
    # The mean last: its ratio to a column without gradient beside large ones would overflow.
    update_sq = (sums.weighted_sq / shared).sum(-1) * mean
    return Averages(update_sq.flatten(1).sum(-1) if update_sq.ndim > 1 else update_sq, sums.own, shared, mean)


def factors_of(
    parts: Sequence[Members], param_sq: Tensors, update_sq: Tensors, numels: Sequence[int]
) -> tuple[list[Factors], Tensor]:
    """Of members of any classes at once (2 to 4, 6), from sums of squares; and the RMS of each and of its update, [2, all]."""
    numbers = Numbers.of(torch.cat([part.table for part in parts]))
    rms, update_rms = (torch.cat([root_mean(x, n) for x, n in zip(of, numels, strict=True)]) for of in (param_sq, update_sq))
    scale, decay = scale_and_decay(numbers, rms, update_rms)
    dtype, sizes = parts[0].table.dtype, [len(part.params) for part in parts]
    each = zip(*(torch.split(x.to(dtype), sizes) for x in (scale, decay)), strict=True)
    return [Factors(*x) for x in each], torch.stack([rms, update_rms]).to(dtype)


def apply(members: Members, new: Averages, f: Factors, shares: Tensor | None = None) -> None:
    """The second reads, and all that is written (7 to 10).

    Args:
        members: the members.
        new: their second moments.
        f: their factors.
        shares: of the elements of whole parameters that agree in sign, [k], for a cautious step of pieces.
    """
    numbers, dtype = members.numbers, members.table.dtype
    update = _momentum(members, _update(members, new, f, writes=True))
    if members.exp_avgs:
        _write(members, members.exp_avgs, update)
    if members.cautious:
        agree = _agreeing(members, update)
        shares = torch.stack([_sum(x) / x.numel() for x in agree]) if shares is None else shares
        mask = torch._foreach_div(agree, shares.clamp(min=LEAST_SHARE).unbind())
        update = torch._foreach_mul(update, mask)
    params = _to(members.params, dtype)
    if isinstance(numbers.weight_decay, Tensor) or numbers.weight_decay:
        # p - (p * decay + update): p * (1 - decay) would round 1 - decay, the same way at every step.
        decrease = torch._foreach_mul(params, f.decay.unbind())
        torch._foreach_add_(decrease, update)
        update = decrease
    torch._foreach_sub_(params, update)
    if members.params[0].dtype != dtype:
        _write(members, members.params, params)


def count(members: Members, new: Averages, f: Factors) -> Tensor:
    """How many elements of a cautious step agree in sign with their gradient, [k]; nothing is written."""
    update = _momentum(members, _update(members, new, f, writes=False))
    return torch.stack([_sum(x) for x in _agreeing(members, update)])


def _update(members: Members, new: Averages, f: Factors, writes: bool) -> list[Tensor]:
    """The updates, and where that is said, all second moments written."""
    if not members.shared:
        second_moments = _second_moments(members)
        update = _unscaled(members, second_moments)
        torch._foreach_mul_(update, f.scale.unbind())
        for to in (members.own, members.twins) if writes else ():
            if to:
                torch._foreach_copy_(to, second_moments)
        return update
    if writes:
        torch._foreach_copy_([*members.own, *members.shared], [*new.own, *new.shared])
    # Not of their ratio: beside large rows, that of one without gradient would underflow.
    of_slices = new.mean.sqrt() * f.scale.reshape(-1, *(1,) * (new.mean.ndim - 1))
    of_rows = new.own.rsqrt() * of_slices.reshape(*of_slices.shape, *(1,) * (new.own.ndim - of_slices.ndim))
    of_rows, of_columns = _kept(of_rows), _kept(new.shared.rsqrt())
    for _ in range(1 + _blocks(members)):
        of_columns = of_columns.unsqueeze(-2)
    update = _multiplied(members.grads, of_rows.unsqueeze(-1).unbind(), members.table.dtype)
    torch._foreach_mul_(update, of_columns.unbind())
    return update


def _sums_of_whole_updates(members: Members) -> Tensor:
    """Of the squares of the updates of what is not factored, [k]."""
    second_moments = _second_moments(members)
    if not members.twins:
        return _sums_of_squares(_unscaled(members, second_moments))
    squared = _squares(members)
    # Where a square has overflowed this is not a number, as the average of a row over its mean is not.
    torch._foreach_div_(squared, second_moments)
    return torch.stack([_sum(x) for x in squared])


def _second_moments(members: Members) -> list[Tensor]:
    """The new ones of what is not factored."""
    new = list(torch._foreach_mul(members.own, _each(members.numbers.beta2)))
    squared = _squares(members)
    torch._foreach_add_(squared, _each(members.numbers.eps))
    torch._foreach_mul_(squared, _each(members.numbers.one_minus_beta2))
    torch._foreach_add_(new, squared)
    return new


def _unscaled(members: Members, second_moments: Tensors) -> list[Tensor]:
    """The gradients of what is not factored over the roots of their second moments."""
    update = list(torch._foreach_rsqrt(second_moments))
    torch._foreach_mul_(update, _to(members.grads, members.table.dtype))
    return update


def _momentum(members: Members, update: list[Tensor]) -> Tensors:
    """The new momenta, which step in the place of an update; the old ones are left as they are."""
    if not members.exp_avgs:
        return update
    new = _multiplied(members.exp_avgs, _each(members.numbers.beta1), members.table.dtype)
    torch._foreach_mul_(update, _each(members.numbers.one_minus_beta1))
    torch._foreach_add_(new, update)
    return new


def _agreeing(members: Members, update: Tensors) -> list[Tensor]:
    """1 for the elements of an update that agree in sign with their gradient, 0 for the others.

    Liang et al., Cautious Optimizers: Improving Training with One Line of Code, https://arxiv.org/abs/2411.16085.
    """
    sign = members.numbers.sign
    each = zip(update, members.grads, sign if isinstance(sign, Tensor) else [sign] * len(update), strict=True)
    return [(u.sign() * g.sign() * sign > 0).to(u.dtype) for u, g, sign in each]


def _write(members: Members, to: Tensors, values: Tensors) -> None:
    """Write parameters or momenta, rounded stochastically where there are draws."""
    if members.draws is None:
        torch._foreach_copy_(list(to), list(values))
        return
    p = members.params[0]
    if members.shared:
        shape: Sequence[int] = (*members.shared[0].shape[:-1], rows_of(members), p.shape[-1])
    else:
        shape = (p.numel(), 1, 1) if members.twins else (p.numel(),)
    dtype = half_of(p, members.exp_avgs[0] if members.exp_avgs else None)
    for x, value, draws in zip(to, values, members.draws, strict=True):
        write(x, value, noise_of(draws, shape, dtype).reshape(p.shape))


def _blocks(members: Members) -> int:
    """1 where matrices come in blocks of rows, [..., n, B, C], else 0."""
    return members.params[0].ndim - 1 - members.shared[0].ndim


def _over_rows(members: Members, tensors: Tensors) -> Tensor:
    """The sums over the rows of each, stacked."""
    sums = [_sum_along(-2, x) for x in tensors]
    return _stack([x.sum(-2) for x in sums] if _blocks(members) else sums)


def _sum_along(dim: int, x: Tensor) -> Tensor:
    """Sums of a few elements, as of kernels of convolutions, take half the time as additions of what is not contiguous."""
    return functools.reduce(torch.add, x.unbind(dim)) if x.ndim > 2 and 1 < x.shape[dim] <= FEW else x.sum(dim)


def _sums_of_squares(tensors: Tensors) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.stack([_sum(x * x) for x in tensors])
    return torch.stack(torch._foreach_norm(tensors)).square()


def _squares(members: Members) -> list[Tensor]:
    """Of the gradients."""
    return _multiplied(members.grads, None, members.table.dtype)


def _sum(x: Tensor) -> Tensor:
    """Of all elements; in a graph one dimension after the other, since of long sums Inductor makes loops that sizes guard."""
    while torch.compiler.is_compiling() and x.ndim > 1:
        x = x.sum(-1)
    return x.sum()


def _each(number: Any) -> Any:
    """Of `Numbers`, as operations on lists take it."""
    return number.unbind() if isinstance(number, Tensor) else number


def _kept(x: Tensor) -> Tensor:
    """In a graph, written out once, and not computed again for each element of the loop that reads it."""
    return torch.as_strided(x, x.shape, x.stride()) if torch.compiler.is_compiling() else x


def _stack(tensors: Tensors) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _multiplied(tensors: Tensors, by: Any, dtype: torch.dtype) -> list[Tensor]:
    """Tensors times numbers or others, or, by None, themselves; nothing is new but the result, of whatever dtype they are."""
    wide = _to(tensors, dtype)
    if tensors[0].dtype == dtype:
        return list(torch._foreach_mul(wide, wide if by is None else by))
    torch._foreach_mul_(wide, wide if by is None else by)
    return list(wide)


def _to(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return tensors if tensors[0].dtype == dtype else [x.to(dtype) for x in tensors]
