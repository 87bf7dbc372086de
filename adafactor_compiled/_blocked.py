"""One step of one matrix, depth-first, in a form that Inductor turns into good loops on a CPU.

A step reads the gradient and the parameter twice and writes the parameter once. That is possible because the RMS of the
update needs no pass of its own: with `row` and `col` the new second-moment factors of a slice,

    sum_ij update_ij^2 = sum_j (mean(row) / col_j) * sum_i gradient_ij^2 / row_i

and `row_i` is known as soon as row i has been read, so that the inner sum is taken while a block of rows is still in cache.

A matrix of R rows and C columns comes as [n, B, C]: n blocks of B rows. Leading dimensions, if any, are slices with factors
of their own. Every size is dynamic, so that one graph serves every matrix of every network.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._numbers import Numbers, root_mean, scale_and_decay
from adafactor_compiled._rounding import Along, along, noise, write


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


def static(size: int) -> int:
    """A size as a constant of the graph: iterating over it specializes the graph on it."""
    return len([None for _ in range(size)])


class Sums(NamedTuple):
    """What a step needs to know of a whole matrix; sums over blocks of rows add up to it."""

    col_sq: Tensor  # [..., C]: sum over the rows of gradient^2
    weighted_sq: Tensor  # [..., C]: the same, each row divided by its new row average
    row: Tensor  # [...]: sum of the new row averages
    param_sq: Tensor  # []: sum of parameter^2


def statistics(p: Tensor, g: Tensor, row: Tensor, table: Tensor) -> Sums:
    """First reads of p and g, shape [..., n, B, C]; brings `row`, shape [..., n, B], up to date."""
    return _statistics(p, g, row, table)[0]


def _statistics(p: Tensor, g: Tensor, row: Tensor, table: Tensor) -> tuple[Sums, Tensor]:
    """And 1 / sqrt of the new `row`."""
    numbers = Numbers.of(table)
    one_block, one = g.shape[-3] == 1, shared(numbers, g)
    p, g = p.view_as(g).to(table.dtype), g.to(table.dtype)
    # Additions wait for the ones before them, so that two sums in one loop take little longer than one: a tenth of a step.
    row_sq, param_sq = ((x * (x * one)).sum(-1) for x in (g, p))
    new_row = row * numbers.beta2 + (row_sq / g.shape[-1] + numbers.eps) * numbers.one_minus_beta2
    root, new_row = materialize(new_row.rsqrt()), materialize(new_row)
    row_sum, param_sq = sum_twice(new_row), sum_twice(param_sq).sum()
    # Sums over rows go through the sums of each block: a block's columns are read while its rows are in cache.
    of_blocks = [materialize(x.square().sum(-2)) for x in (g * one, g * one * root.unsqueeze(-1))]
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
    new_col = materialize(col * numbers.beta2 + (sums.col_sq / rows + numbers.eps) * numbers.one_minus_beta2)
    row_mean = sums.row / rows
    # row_mean / new_col first would overflow for a column without gradient beside large ones: 1e8 / 1e-30.
    return Averages(row_mean, new_col, (sums.weighted_sq / new_col * row_mean.unsqueeze(-1)).sum())


def factors(sums: Sums, col: Tensor, rms: Tensor, update_rms: Tensor, table: Tensor, rows: int, numel: int) -> Factors:
    """The small work between the two reads; brings `col`, shape [..., C], and both RMS, of one element, up to date."""
    return finish(averages(sums, col, table, rows), sums.param_sq, col, rms, update_rms, table, numel)


def finish(new: Averages, param_sq: Tensor, col: Tensor, rms: Tensor, update_rms: Tensor, table: Tensor, numel: int) -> Factors:
    """The second half of `factors`."""
    numbers = Numbers.of(table)
    new_rms, new_update_rms = root_mean(param_sq, numel), root_mean(new.update_sq, numel)
    scale, decay = scale_and_decay(numbers, new_rms, new_update_rms)
    scale = scale * new.row_mean.to(scale.dtype).sqrt()
    col.copy_(new.col)
    rms.copy_(new_rms)
    update_rms.copy_(new_update_rms)
    return Factors(materialize(scale.to(col.dtype)), materialize(new.col.rsqrt()), materialize(decay.to(col.dtype)))


def apply(
    p: Tensor, g: Tensor, row: Tensor, exp_avg: Tensor | None, f: Factors, table: Tensor, draws: Tensor | None = None
) -> None:
    """Second reads of p and g, and the only write of p."""
    _apply(p, g, materialize(row.rsqrt()), exp_avg, f, table, draws)


def _apply(p: Tensor, g: Tensor, root: Tensor, exp_avg: Tensor | None, f: Factors, table: Tensor, draws: Tensor | None) -> None:
    """With `root`, 1 / sqrt of the rows."""
    numbers = Numbers.of(table)
    scale = f.scale.reshape(f.scale.shape + (1,) * (root.ndim - f.scale.ndim))
    col_factor = f.col_factor.reshape(f.col_factor.shape[:-1] + (1,) * (g.ndim - f.col_factor.ndim) + g.shape[-1:])
    row_factor = root * scale
    if draws is not None:
        row_factor = materialize(row_factor)  # in the loop, beside the noise, it costs a sixth of a step of bfloat16
    update = g.to(table.dtype) * row_factor.unsqueeze(-1) * col_factor
    if exp_avg is not None:
        update = exp_avg * numbers.beta1 + update * numbers.one_minus_beta1
        exp_avg.copy_(update)
    wide_p = p.to(table.dtype)
    write(p, wide_p - (wide_p * f.decay + update), None if draws is None else _noise(draws, root, p))


def _noise(draws: Tensor, row: Tensor, p: Tensor) -> Tensor:
    """Of elements p whose rows have shape [R], [n, B] or [slices, n, B]; leading dimensions are flattened to slices."""
    lead, columns = row.shape[:-2], p.shape[-1]
    slices, rows = math.prod(lead), math.prod(row.shape[-2:])
    of_rows, of_columns = (along(draws, axis, slices, count, p.dtype) for axis, count in ((1, rows), (2, columns)))
    of_rows = Along(*(materialize(x).reshape(row.shape) for x in of_rows))
    of_columns = Along(*(materialize(x).reshape(*lead, *(1,) * (row.ndim - 1 - len(lead)), columns) for x in of_columns))
    return noise(of_rows, of_columns)


def step_matrix(
    p: Tensor,
    g: Tensor,
    row: Tensor,
    col: Tensor,
    exp_avg: Tensor | None,
    rms: Tensor,
    update_rms: Tensor,
    table: Tensor,
    draws: Tensor | None = None,
) -> None:
    """A whole step of a matrix that fits in cache."""
    sums, root = _statistics(p, g, row, table)
    f = factors(sums, col, rms, update_rms, table, g.shape[-3] * g.shape[-2], g.numel())
    _apply(p, g, root, exp_avg, f, table, draws)


def step_small_matrix(
    p: Tensor,
    g: Tensor,
    row: Tensor,
    col: Tensor,
    exp_avg: Tensor | None,
    rms: Tensor,
    update_rms: Tensor,
    table: Tensor,
    draws: Tensor | None = None,
) -> None:
    """A whole step of a matrix [..., R, C] in one block, made here: for a small one, views would take a tenth of its step."""
    p, g, row = p.unsqueeze(-3), g.unsqueeze(-3), row.unsqueeze(-2)
    step_matrix(p, g, row, col, None if exp_avg is None else exp_avg.unsqueeze(-3), rms, update_rms, table, draws)
