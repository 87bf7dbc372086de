"""Parameters that take several passes: matrices in chunks of rows that do not fit in cache, and kernels of convolutions.

`run(function, sizes, *arguments)` runs a pass, compiled or as it is; of `sizes` its graph depends on whether they are 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._state.layout import cached
from adafactor_compiled._update.blocks import Blocking, blocking_of
from adafactor_compiled._update.kernels import apply_kernels, kernel_statistics
from adafactor_compiled._update.matrices import Factors, Sums, apply, averages, finish, ones_for, statistics
from adafactor_compiled._update.members import Member
from adafactor_compiled._update.rounding import draws_from

Run = Callable[..., Any]
PassOf = tuple[Callable[..., Any], tuple[int, ...]]  # a function, and the sizes of what it is called with

ROW_NUMEL = 4096  # elements of a long vector that are summed in one go
SHORT = 8_192  # elements up to which a vector is stepped by one thread: a second one takes as long to begin
SLICES = 65_536  # kernels of convolutions that are stepped together: their factors take 2.4 MB of 3 x 3 ones


def step_in_chunks(x: Member, run: Run) -> Tensor:
    """Step a contiguous matrix; gives the RMS of it and of its update, shape [2]."""
    blocking = blocking_of(tuple(x.p.shape))
    sums = statistics_in_chunks(blocking, x, run)
    col = x.col.view(blocking.slices, blocking.columns)
    f, measured = finish(averages(sums, col, x.table, blocking.rows), sums.param_sq, col, x.table, x.p.numel())
    apply_in_chunks(blocking, x, f, run)
    return measured


def passes_in_chunks(shape: tuple[int, ...]) -> list[PassOf]:
    """What stepping a matrix of this shape runs."""
    blocking = blocking_of(shape)
    passes: list[PassOf] = [(statistics, (*part.blocks, blocking.columns)) for part in blocking.chunks()]
    return [*passes, *((apply, (*part.blocks, blocking.columns)) for part in blocking.chunks_to_apply())]


def statistics_in_chunks(blocking: Blocking, x: Member, run: Run) -> Sums:
    """The sums of each slice, stacked along a first dimension; brings the rows up to date."""
    slices, rows, columns = blocking[:3]
    p, g, row = x.p.view(slices, rows, columns), x.g.view(slices, rows, columns), x.row.view(slices, rows)
    col_sq, weighted_sq, row_sum = (x.table.new_zeros(shape) for shape in ((slices, columns), (slices, columns), (slices,)))
    param_sq = x.table.new_zeros(())
    for part in blocking.chunks():
        of_g = part.of(g)
        ones = ones_for(of_g.shape, of_g.dtype, of_g.device)
        sums = run(statistics, (*part.blocks, columns), part.of(p), of_g, part.of(row), ones, x.table)
        at = part.slices
        torch._foreach_add_([col_sq[at], weighted_sq[at], row_sum[at], param_sq], list(sums))
    return Sums(col_sq, weighted_sq, row_sum, param_sq)


def apply_in_chunks(blocking: Blocking, x: Member, f: Factors, run: Run) -> None:
    """The second reads; the factors have a first dimension of slices."""
    slices, rows, columns = blocking[:3]
    p, g, row = x.p.view(slices, rows, columns), x.g.view(slices, rows, columns), x.row.view(slices, rows)
    exp_avg = None if x.exp_avg is None else x.exp_avg.view(slices, rows, columns)
    for part in blocking.chunks_to_apply():
        of_exp_avg = None if exp_avg is None else part.of(exp_avg)
        draws = draws_from(x.draws, part.first_slice, part.rows.start)
        factors = f.scale[part.slices], f.col_factor[part.slices], f.decay
        sizes = (*part.blocks, columns)
        run(apply, sizes, part.of(p), part.of(g), part.of(row), of_exp_avg, *factors, x.table, draws)


def step_kernels(x: Member, run: Run) -> Tensor:
    """Step the kernels of a convolution, shape [..., R, C], contiguous; gives the RMS as `step_in_chunks`."""
    *lead, rows, columns = x.p.shape
    n, size, numel = math.prod(lead), rows * columns, x.p.numel()
    p, g = x.p.view(n, size), x.g.view(n, size)
    exp_avg = None if x.exp_avg is None else x.exp_avg.view(n, size)
    row, col = x.row.view(n, rows), x.col.view(n, columns)
    sums = x.table.new_zeros(2)
    for at, sizes in _parts_of_kernels(tuple(x.p.shape)):
        as_vector = p[at].view(rows_of(p[at].numel()))
        sums += run(kernel_statistics, sizes, as_vector, g[at].view(-1, rows, columns), row[at], col[at], x.table)
    measured: Tensor = sums
    for at, sizes in _parts_of_kernels(tuple(x.p.shape)):
        of_exp_avg = None if exp_avg is None else exp_avg[at]
        draws = draws_from(x.draws, at.start, 0)
        measured = run(apply_kernels, sizes, p[at], g[at], row[at], col[at], of_exp_avg, sums, x.table, draws, numel)
    return measured


def passes_of_kernels(shape: tuple[int, ...]) -> list[PassOf]:
    """What stepping kernels of this shape runs."""
    return [(function, sizes) for _, sizes in _parts_of_kernels(shape) for function in (kernel_statistics, apply_kernels)]


def _parts_of_kernels(shape: tuple[int, ...]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Some slices, and sizes: of a slice, how many there are, and as which rows their parameters are summed."""
    *lead, rows, columns = shape
    n = math.prod(lead)
    for start in range(0, n, SLICES):
        k = min(SLICES, n - start)
        yield slice(start, start + k), (rows, columns, k, *rows_of(k * rows * columns))


def vector_shape(numel: int) -> tuple[int, ...]:
    """As what a vector is stepped by compiled passes on a CPU: a short one as it is, a long one in rows."""
    return (numel,) if numel <= SHORT else rows_of(numel)


@cached
def rows_of(numel: int) -> tuple[int, int]:
    """A vector cut into two or more equal rows, the longest that are summed in one go; a prime number of elements stays one."""
    columns = next(d for d in range(max(1, min(numel // 2, ROW_NUMEL)), 0, -1) if numel % d == 0)
    return (numel // columns, columns) if columns > 1 else (1, numel)
