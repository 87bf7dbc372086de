"""Matrices one after the other, each in one call where it fits in cache and in chunks of rows where it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled import _blocked
from adafactor_compiled._compile import size_variant
from adafactor_compiled._passes import Members, Runner

BLOCK_NUMEL = 32_768  # a block of rows stays in the second-level cache between two reads: 128 KB in float32
CHUNK_NUMEL = 2_097_152  # what is read twice in one go stays in the last-level cache: 8 MB in float32
WHOLE_NUMEL = 2 * CHUNK_NUMEL  # up to here a matrix is stepped in one call
CHUNKS_PER_APPLY = 8  # the last read and write need no cache: fewer, larger calls


class Blocking(NamedTuple):
    """How N slices of R x C, R and C at least 2, are cut into blocks of B rows."""

    slices: int
    rows: int
    columns: int
    block: int
    whole: bool  # stepped in one call; B then divides R

    @property
    def chunk(self) -> int:
        """Rows that are read twice in one go."""
        return max(1, CHUNK_NUMEL // (self.block * self.columns)) * self.block

    def chunks(self) -> Iterator[tuple[slice, int, int]]:
        """(rows, number of blocks, rows of a block) of the chunks of one slice."""
        main = self.rows - self.rows % self.block
        for start in range(0, main, self.chunk):
            stop = min(start + self.chunk, main)
            yield slice(start, stop), (stop - start) // self.block, self.block
        if main < self.rows:
            yield slice(main, self.rows), 1, self.rows - main


@functools.cache
def blocking_of(shape: tuple[int, ...]) -> Blocking:
    slices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    most = min(max(2, BLOCK_NUMEL // columns), rows)
    if slices * rows * columns > WHOLE_NUMEL:
        return Blocking(slices, rows, columns, most, whole=False)
    block = max(b for b in range(1, most + 1) if rows % b == 0)
    if block < min(8, most):  # a prime number of rows, say: one block, its columns summed in one loop
        block = rows
    return Blocking(slices, rows, columns, block, whole=True)


class Matrix(NamedTuple):
    p: Tensor
    g: Tensor
    row: Tensor
    col: Tensor
    exp_avg: Tensor | None
    rms: Tensor
    update_rms: Tensor
    draws: Tensor | None = None


def step_members(shape: tuple[int, ...], members: Members, tables: list[Tensor], run: Runner) -> None:
    """Step members whose parameters and gradients are contiguous in `shape`."""
    blocking = blocking_of(shape)
    step = _step_whole if blocking.whole else _step_in_chunks
    for i, table in enumerate(tables):
        matrix = Matrix(
            members.params[i],
            members.grads[i],
            members.rows[i],
            members.cols[i],
            members.exp_avgs[i] if members.exp_avgs else None,
            members.rms[i].view(1),  # Inductor loses an in-place update of a 0-dim float64 tensor (torch 2.13)
            members.update_rms[i].view(1),
            members.draws[i] if members.draws else None,
        )
        step(blocking, matrix, table, run)


@functools.cache
def _whole_of(blocking: Blocking) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape in which a member is stepped in one call, and what its graph depends on."""
    slices, rows, columns, block, _ = blocking
    shape = (*(() if slices == 1 else (slices,)), rows // block, block, columns)
    return shape, size_variant(*shape)


def _step_whole(blocking: Blocking, x: Matrix, table: Tensor, run: Runner) -> None:
    shape, variant = _whole_of(blocking)
    run(
        _blocked.step_matrix,
        variant,
        x.p.view(shape),
        x.g.view(shape),
        x.row.view(shape[:-1]),
        x.col.view(shape[:-3] + shape[-1:]),
        None if x.exp_avg is None else x.exp_avg.view(shape),
        x.rms,
        x.update_rms,
        table,
        x.draws,
    )


def _step_in_chunks(blocking: Blocking, x: Matrix, table: Tensor, run: Runner) -> None:
    sums = statistics_in_chunks(blocking, x, table, run)
    col = x.col.view(blocking.slices, blocking.columns)
    f = _blocked.factors(sums, col, x.rms, x.update_rms, table, blocking.rows, x.p.numel())
    apply_in_chunks(blocking, x, f, table, run)


def statistics_in_chunks(blocking: Blocking, x: Matrix, table: Tensor, run: Runner) -> _blocked.Sums:
    """The sums of each slice, stacked along a first dimension; brings `x.row` up to date."""
    slices, rows, columns, _, _ = blocking
    p, g, row = x.p.view(slices, rows, columns), x.g.view(slices, rows, columns), x.row.view(slices, rows)
    sums = [_statistics_of_slice(blocking, p[i], g[i], row[i], table, run) for i in range(slices)]
    total = _blocked.Sums(*map(torch.stack, zip(*sums, strict=True)))
    return total._replace(param_sq=total.param_sq.sum())


def apply_in_chunks(blocking: Blocking, x: Matrix, f: _blocked.Factors, table: Tensor, run: Runner) -> None:
    """The second reads, slice by slice; the factors have a first dimension of slices."""
    slices, rows, columns, _, _ = blocking
    p, g, row = x.p.view(slices, rows, columns), x.g.view(slices, rows, columns), x.row.view(slices, rows)
    exp_avg = None if x.exp_avg is None else x.exp_avg.view(slices, rows, columns)
    stride = CHUNKS_PER_APPLY * blocking.chunk
    for i in range(slices):
        of_slice = f._replace(row_mean=f.row_mean[i], col_factor=f.col_factor[i])
        for start in range(0, rows, stride):
            part = (i, slice(start, start + stride))
            run(
                _blocked.apply,
                size_variant(min(stride, rows - start), columns),
                p[part],
                g[part],
                row[part],
                None if exp_avg is None else exp_avg[part],
                of_slice,
                table,
                None if x.draws is None else _from(x.draws, i, start),
            )


def _statistics_of_slice(blocking: Blocking, p: Tensor, g: Tensor, row: Tensor, table: Tensor, run: Runner) -> _blocked.Sums:
    sums = []
    for part, n, block in blocking.chunks():
        blocks = (n, block, blocking.columns)
        sums.append(
            run(
                _blocked.statistics,
                size_variant(*blocks),
                p[part].view(blocks),
                g[part].view(blocks),
                row[part].view(n, block),
                table,
            )
        )
    return _blocked.Sums(*(torch.stack(x).sum(0) for x in zip(*sums, strict=True)))


def _from(draws: Tensor, first_slice: int, first_row: int) -> Tensor:
    """The draws of a piece that begins at this slice and row."""
    return draws + torch.tensor([0, 0, 0, first_slice, first_row, 0], dtype=draws.dtype, device=draws.device)
