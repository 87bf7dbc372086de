"""One step of one matrix, depth-first, in a form that Inductor turns into good loops on a CPU.

A step reads the gradient and the parameter twice and writes the parameter once. That is possible because the RMS of the
update needs no pass of its own: with `row` and `col` the new second-moment factors of a slice,

    sum_ij update_ij^2 = sum_j (mean(row) / col_j) * sum_i gradient_ij^2 / row_i

and `row_i` is known as soon as row i has been read, so that the inner sum is taken while a block of rows is still in cache.

A matrix of R rows and C columns comes as [n, B, C]: n blocks of B rows. Leading dimensions, if any, are slices with factors
of their own. Every size is dynamic, so that one graph serves every matrix of every network.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._update.members import Member, Members
from adafactor_compiled._update.momentum import agreeing, cautious, momentum, with_momentum
from adafactor_compiled._update.numbers import Numbers, moving_average, root_mean, scale_and_decay
from adafactor_compiled._update.rounding import Along, along, half_of, noise_between, write


def materialize(x: Tensor) -> Tensor:
    """Have Inductor write `x` out once, instead of computing it again for each element of the loop that reads it."""
    return torch.as_strided(x, x.shape, x.stride())


AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def fills_two_vectors(columns: int) -> bool:
    """Whether sums over rows of so many columns go over two vectors at a time, which a graph is for or is not.

    With AVX2 they take whole lines of cache then, each read once where they are far apart: a step of 16 x 4096 takes a sixth
    less, one of GPT-2 3 %. With AVX-512 one vector is a line.
    """
    return AVX2 and columns >= 16


def shared(numbers: Numbers, g: Tensor) -> Tensor:
    """A 1 by which to multiply what is summed: Inductor gives sums one loop only if they read something in common.

    In bfloat16 it also makes a loop go over two vectors of float32 at a time, as numbers of half the width fill one.
    """
    two = g.dtype == torch.float32 and fills_two_vectors(g.shape[-1])
    return materialize(numbers.one.to(torch.bfloat16)) if two else numbers.one


def ones_for(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, i: int = 0) -> Tensor | None:
    """A 1 for each block of a gradient of shape [..., n, B, C] and `dtype`; None where there is one block.

    What is multiplied by it depends on the block, so that loops over blocks and over their rows stay apart. Inductor would make
    one long loop of both, and the columns of a block would have left the cache when they are summed. Member i of a call has
    ones of its own: a graph is for tensors that are all different.
    """
    if shape[-3] == 1:
        return None
    two = dtype == torch.float32 and fills_two_vectors(shape[-1])
    ones_dtype = torch.bfloat16 if two else torch.float64 if dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling():
        return torch.ones(shape[:-2], dtype=ones_dtype, device=device)
    return _ones(shape[:-2], ones_dtype, device, i)


@functools.lru_cache(maxsize=1024)
def _ones(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: int) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def static(size: int) -> int:
    """A size as a constant of the graph: iterating over it specializes the graph on it."""
    return len([None for _ in range(size)])


def total(x: Tensor) -> Tensor:
    """The sum of all elements, one dimension after the other: of long sums Inductor makes another loop, and guards on that."""
    while x.ndim > 1:
        x = materialize(x.sum(-1))
    return x.sum()


class Sums(NamedTuple):
    """What a step needs to know of a whole matrix; sums over blocks of rows add up to it."""

    col_sq: Tensor  # [..., C]: sum over the rows of gradient^2
    weighted_sq: Tensor  # [..., C]: the same, each row divided by its new row average
    row: Tensor  # [...]: sum of the new row averages
    param_sq: Tensor  # []: sum of parameter^2


def statistics(p: Tensor, g: Tensor, row: Tensor, ones: Tensor | None, table: Tensor) -> Sums:
    """First reads of p and g, shape [..., n, B, C]; brings `row`, shape [..., n, B], up to date. For `ones` see `ones_for`."""
    return _statistics(p, g, row, ones, table)[0]


def _statistics(p: Tensor, g: Tensor, row: Tensor, ones: Tensor | None, table: Tensor) -> tuple[Sums, Tensor]:
    """And 1 / sqrt of the new `row`."""
    numbers = Numbers.of(table)
    one_block, one = ones is None, shared(numbers, g)
    of_row = one if ones is None else ones.unsqueeze(-1)
    of_block = of_row if ones is None else of_row.unsqueeze(-1)
    p, g = p.view_as(g).to(table.dtype), g.to(table.dtype)
    # Additions wait for the ones before them, so that two sums in one loop take little longer than one: a tenth of a step.
    row_sq, param_sq = ((x * (x * of_block)).sum(-1) for x in (g, p))
    new_row = moving_average(row, row_sq / g.shape[-1], numbers) * of_row
    root, new_row = materialize(new_row.rsqrt() * of_row), materialize(new_row)
    row_sum, param_sq = sum_twice(new_row), total(param_sq)
    # Sums over rows go through the sums of each block: a block's columns are read while its rows are in cache.
    of_blocks = [materialize(x.square().sum(-2)) for x in (g * of_block, g * of_block * root.unsqueeze(-1))]
    col_sq, weighted_sq = (x.squeeze(-2) if one_block else (x * one).sum(-2) for x in of_blocks)
    row.copy_(new_row)
    return Sums(col_sq, weighted_sq, row_sum, param_sq), root


def sum_twice(x: Tensor) -> Tensor:
    return materialize(x.sum(-1)).sum(-1)


class Factors(NamedTuple):
    """What turns a gradient into a step: p <- p - (p * decay + g * scale / sqrt(row) * col_factor)."""

    scale: Tensor  # [...]
    col_factor: Tensor  # [..., C]
    decay: Tensor  # []


class Averages(NamedTuple):
    """The new second-moment factors of a matrix, beside its rows, and the sum of the squares of its update."""

    row_mean: Tensor  # [...]
    col: Tensor  # [..., C]
    update_sq: Tensor  # []


def averages(sums: Sums, col: Tensor, table: Tensor, rows: int) -> Averages:
    """What the sums over whole columns make of `col`, shape [..., C], which is left as it is."""
    numbers = Numbers.of(table)
    new_col = materialize(moving_average(col, sums.col_sq / rows, numbers))
    row_mean = sums.row / rows
    # row_mean / new_col first would overflow for a column without gradient beside large ones: 1e8 / 1e-30.
    return Averages(row_mean, new_col, total(sums.weighted_sq / new_col * row_mean.unsqueeze(-1)))


def finish(new: Averages, param_sq: Tensor, col: Tensor, table: Tensor, numel: int) -> tuple[Factors, Tensor]:
    """The small work between the two reads; brings `col` up to date, and gives the RMS of parameter and update, shape [2]."""
    numbers = Numbers.of(table)
    rms, update_rms = root_mean(param_sq, numel), root_mean(new.update_sq, numel)
    scale, decay = scale_and_decay(numbers, rms, update_rms)
    scale = scale * new.row_mean.to(scale.dtype).sqrt()
    col.copy_(new.col)
    f = Factors(materialize(scale.to(col.dtype)), materialize(new.col.rsqrt()), materialize(decay.to(col.dtype)))
    return f, torch.stack([rms, update_rms]).to(col.dtype)


def apply(
    p: Tensor,
    g: Tensor,
    row: Tensor,
    exp_avg: Tensor | None,
    scale: Tensor,
    col_factor: Tensor,
    decay: Tensor,
    table: Tensor,
    draws: Tensor | None,
    share: Tensor | None = None,
) -> None:
    """Second reads of p and g, and the only write of p; the factors as those of `Factors`.

    With the `share` of the elements that agree in sign, 0-dim, a step is cautious.
    """
    x = Member(p, g, row, None, None, exp_avg, None, table, draws, share is not None)
    _apply(x, materialize(row.rsqrt()), Factors(scale, col_factor, decay), share)


def _apply(x: Member, root: Tensor, f: Factors, share: Tensor | None = None) -> None:
    """With `root`, 1 / sqrt of the rows; the share of all elements is that of these where none is given."""
    p, g, table, numbers = x.p, x.g, x.table, Numbers.of(x.table)
    row_factor, col_factor = _factors_of(g, root, f.scale, f.col_factor)
    noise = None
    if x.draws is not None:
        row_factor = materialize(row_factor)  # in the loop, beside the noise, it costs a sixth of a step of bfloat16
        noise = _noise(x.draws, root, p.shape[-1], half_of(p, x.exp_avg))
    update = g.to(table.dtype) * row_factor.unsqueeze(-1) * col_factor
    if x.exp_avg is not None:
        update = with_momentum(x.exp_avg, update, numbers, noise)
    if x.cautious:
        update = cautious(update, g, numbers, lambda agree: total(agree) / agree.numel() if share is None else share)
    wide_p = p.to(table.dtype)
    write(p, wide_p - (wide_p * f.decay + update), noise)


def _factors_of(g: Tensor, root: Tensor, scale: Tensor, col_factor: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows and the columns of a gradient are multiplied by, in its shape but for sizes of 1."""
    row_factor = root * scale.reshape(scale.shape + (1,) * (root.ndim - scale.ndim))
    lead = col_factor.shape[:-1] + (1,) * (g.ndim - col_factor.ndim)
    return row_factor, col_factor.reshape(lead + g.shape[-1:])


def agreement(g: Tensor, row: Tensor, exp_avg: Tensor, scale: Tensor, col_factor: Tensor, table: Tensor) -> Tensor:
    """How many elements of a step by `apply` agree in sign with their gradient, 0-dim; nothing is written."""
    numbers = Numbers.of(table)
    row_factor, col_factor = _factors_of(g, row.rsqrt(), scale, col_factor)
    update = g.to(table.dtype) * row_factor.unsqueeze(-1) * col_factor
    return total(agreeing(momentum(exp_avg, update, numbers), g, numbers))


def _noise(draws: Tensor, row: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Of elements whose rows have shape [R], [n, B] or [slices, n, B]; leading dimensions are flattened to slices."""
    lead = row.shape[:-2]
    slices, rows = math.prod(lead), math.prod(row.shape[-2:])
    of_rows, of_columns = (along(draws, axis, slices, count, dtype) for axis, count in ((1, rows), (2, columns)))
    of_rows = Along(*(materialize(x).reshape(row.shape) for x in of_rows))
    of_columns = Along(*(materialize(x).reshape(*lead, *(1,) * (row.ndim - 1 - len(lead)), columns) for x in of_columns))
    return noise_between(of_rows, of_columns)


def step_matrices(members: Members) -> Tensor:
    """A whole step of k matrices that fit in cache; gives the RMS of each and of its update, shape [2, k]."""
    return torch.stack([_step(x) for x in members.each()], 1)


def step_small_matrices(members: Members) -> Tensor:
    """The same of matrices [..., R, C] in one block, made here: for a small one, views would take a tenth of its step."""
    return torch.stack([_step(_in_one_block(x)) for x in members.each()], 1)


def _in_one_block(x: Member) -> Member:
    exp_avg = None if x.exp_avg is None else x.exp_avg.unsqueeze(-3)
    return x._replace(p=x.p.unsqueeze(-3), g=x.g.unsqueeze(-3), row=x.row.unsqueeze(-2), exp_avg=exp_avg)


def _step(x: Member) -> Tensor:
    sums, root = _statistics(x.p, x.g, x.row, x.ones, x.table)
    rows = x.g.shape[-3] * x.g.shape[-2]
    f, measured = finish(averages(sums, x.col, x.table, rows), sums.param_sq, x.col, x.table, x.g.numel())
    _apply(x, root, f)
    return measured
