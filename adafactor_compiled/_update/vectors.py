"""One step of parameters whose second moment is as large as they are: vectors, and kernels of one element."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._update.matrices import materialize, sum_twice, total
from adafactor_compiled._update.members import Member, Members
from adafactor_compiled._update.momentum import agreeing, cautious, momentum, with_momentum
from adafactor_compiled._update.numbers import Numbers, moving_average, root_mean, scale_and_decay
from adafactor_compiled._update.rounding import half_of, noise_of, write


def step_vectors(members: Members) -> Tensor:
    """A whole step of k vectors; gives the RMS of each and of its update, shape [2, k].

    Short ones have shape [n]; long ones are cut into rows for their sums alone, [m, n].
    """
    return torch.stack([_step(x, x.exp_avg_sq, None) for x in members.each()], 1)


def step_pointwise(members: Members) -> Tensor:
    """The same of kernels of one element, as vectors: row and column are two copies of the whole second moment."""
    return torch.stack([_step(x, x.col, x.row) for x in members.each()], 1)


class VectorSums(NamedTuple):
    """What the first read of a vector, or of a piece of it, adds to the sums of the whole."""

    param_sq: Tensor
    update_sq: Tensor


def vector_sums(p: Tensor, g: Tensor, second_moment: Tensor, table: Tensor, factored: bool = False) -> VectorSums:
    """Nothing is written. Where the square of a gradient overflows the update is 0, or NaN where that makes a row infinite."""
    wide, sums = _wide(p, table)
    wide_g = g.to(wide)
    squared = wide_g.square()
    new = moving_average(second_moment, squared, Numbers.of(table))
    # Of squares / new rather than of g / sqrt(new): a square root less.
    update_sq = squared / new if factored else wide_g * (wide_g / new)
    return VectorSums(sums(p.to(wide).square()), sums(update_sq))


def apply_vector(
    p: Tensor,
    g: Tensor,
    second_moment: Tensor,
    exp_avg: Tensor | None,
    param_sq: Tensor,
    update_sq: Tensor,
    table: Tensor,
    draws: Tensor | None,
    numel: int,
    share: Tensor | None = None,
) -> Tensor:
    """All writes of a step of a vector, or of a piece of one of `numel` elements, from its sums; gives both RMS, shape [2].

    With the `share` of the elements that agree in sign, 0-dim, a step is cautious.
    """
    x = Member(p, g, None, None, second_moment, exp_avg, None, table, draws, share is not None)
    return _apply(x, second_moment, None, VectorSums(param_sq, update_sq), numel, share)


def vector_agreement(
    g: Tensor, second_moment: Tensor, exp_avg: Tensor, param_sq: Tensor, update_sq: Tensor, table: Tensor, numel: int
) -> Tensor:
    """How many elements of a step by `apply_vector` agree in sign with their gradient, 0-dim; nothing is written."""
    numbers, (wide, sums) = Numbers.of(table), _wide(g, table)
    scale, _ = scale_and_decay(numbers, root_mean(param_sq, numel), root_mean(update_sq, numel))
    new = moving_average(second_moment, g.to(wide).square(), numbers)
    update = g.to(wide) * (new.rsqrt() * scale.to(wide))
    return sums(agreeing(momentum(exp_avg, update, numbers), g, numbers))


def _step(x: Member, second_moment: Tensor, twin: Tensor | None) -> Tensor:
    return _apply(x, second_moment, twin, vector_sums(x.p, x.g, second_moment, x.table, twin is not None), x.p.numel())


def _apply(
    x: Member, second_moment: Tensor, twin: Tensor | None, of_whole: VectorSums, numel: int, share: Tensor | None = None
) -> Tensor:
    p, table, numbers, (wide, sums) = x.p, x.table, Numbers.of(x.table), _wide(x.p, x.table)
    wide_p, wide_g = p.to(wide), x.g.to(wide)
    new = moving_average(second_moment, wide_g.square(), numbers)
    rms, update_rms = root_mean(of_whole.param_sq, numel), root_mean(of_whole.update_sq, numel)
    scale, decay = (materialize(x.to(wide)) for x in scale_and_decay(numbers, rms, update_rms))
    update = wide_g * (new.rsqrt() * scale)
    elements = (p.numel(), 1, 1) if twin is not None else (p.numel(),)
    noise = None if x.draws is None else noise_of(x.draws, elements, half_of(p, x.exp_avg)).reshape(p.shape)
    if x.exp_avg is not None:
        update = with_momentum(x.exp_avg, update, numbers, noise)
    if x.cautious:
        update = cautious(update, x.g, numbers, lambda agree: sums(agree) / numel if share is None else share)
    write(p, (wide_p - (wide_p * decay + update)).to(table.dtype), noise)
    second_moment.copy_(new)
    if twin is not None:
        twin.copy_(new)
    return torch.stack([rms, update_rms]).to(table.dtype)


def _wide(p: Tensor, table: Tensor) -> tuple[torch.dtype, Callable[[Tensor], Tensor]]:
    """The arithmetic: short vectors are stepped in float64, which costs little where they are in cache."""
    return (torch.float64, torch.sum) if p.ndim == 1 else (table.dtype, sum_twice if p.ndim == 2 else total)
