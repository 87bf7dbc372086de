"""Matrices one after the other, each in one call where it fits in cache and in chunks of rows where it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled import _blocked
from adafactor_compiled._compile import blocks_variant, size_variant
from adafactor_compiled._passes import Members, Runner

BLOCK_NUMEL = 65_536  # a block of rows stays in the second-level cache between two reads: 256 KB in float32
BLOCK_ROWS = 16  # at least, if that leaves two blocks: each costs two more rows to write and read, its sums
FEW_ROWS = 8  # the least, or a matrix is rather one block
CHUNK_NUMEL = 16_777_216  # what is summed in one go: the sums of its blocks take up to 8 MB
SMALL_NUMEL = 65_536  # up to here a matrix is one block; 512 x 512 takes a quarter less in several
SUMMED_ROWS = 512  # at most, one after the other, in a small matrix or a block: sums of 1,024 err more than the reference path
WHOLE_NUMEL = 4_194_304  # up to here a matrix is stepped in one call
CHUNKS_PER_APPLY = 16  # the last read and write need no cache: fewer, larger calls


class Part(NamedTuple):
    """Some rows of one slice, or some slices as a whole."""

    slices: int | slice
    rows: slice
    blocks: tuple[int, ...]  # how its rows are laid out: ([slices,] blocks, rows of a block), or (rows,)

    @property
    def first_slice(self) -> int:
        first: int = self.slices if isinstance(self.slices, int) else self.slices.start
        return first

    def of(self, x: Tensor) -> Tensor:
        """This part of a tensor of shape [slices, R] or [slices, R, C], in blocks."""
        return x[self.slices, self.rows].view(*self.blocks, *x.shape[2:])


class Whole(NamedTuple):
    """How a matrix is stepped in one call."""

    function: Callable[..., None]
    shape: tuple[int, ...]  # of p and g there
    col_shape: tuple[int, ...]
    variant: tuple[int, ...]  # what its graph depends on

    def laid_out(self, *arguments: Any) -> tuple[Any, ...]:
        """The arguments of its function, of a matrix as it is."""
        p, g, row, col, exp_avg, rms, update_rms, table, draws = arguments
        shape = self.shape
        exp_avg = exp_avg if exp_avg is None else exp_avg.view(shape)
        row, col = row.view(shape[:-1]), col.view(self.col_shape)
        return p.view(shape), g.view(shape), row, col, exp_avg, writable(rms), writable(update_rms), table, draws


class Blocking(NamedTuple):
    """How N slices of R x C, R and C at least 2, are cut into blocks of B rows."""

    slices: int
    rows: int
    columns: int
    block: int
    whole: Whole | None  # None if it is not stepped in one call; otherwise B divides R
    chunk_numel: int
    chunks_per_apply: int

    def chunks(self) -> Iterator[Part]:
        """What is read twice in one go."""
        block = self.block
        if self.slices > 1 and (per_chunk := self.chunk_numel // (self.rows * self.columns)) > 1:
            yield from self._slices(per_chunk, (self.rows // block, block) if self.rows % block == 0 else (1, self.rows))
            return
        main, step = self.rows - self.rows % block, max(1, self.chunk_numel // (block * self.columns)) * block
        for i in range(self.slices):
            for start in range(0, main, step):
                stop = min(start + step, main)
                yield Part(i, slice(start, stop), ((stop - start) // block, block))
            if main < self.rows:
                yield Part(i, slice(main, self.rows), (1, self.rows - main))

    def chunks_to_apply(self) -> Iterator[Part]:
        """What is applied in one go, in one block."""
        numel = self.chunks_per_apply * self.chunk_numel
        if self.slices > 1 and (per_chunk := numel // (self.rows * self.columns)) > 1:
            yield from self._slices(per_chunk, (1, self.rows))
            return
        step = max(1, numel // self.columns)
        for i in range(self.slices):
            for start in range(0, self.rows, step):
                stop = min(start + step, self.rows)
                yield Part(i, slice(start, stop), (stop - start,))

    def _slices(self, count: int, blocks: tuple[int, int]) -> Iterator[Part]:
        for start in range(0, self.slices, count):
            stop = min(start + count, self.slices)
            yield Part(slice(start, stop), slice(0, self.rows), (stop - start, *blocks))


@functools.cache
def blocking_of(shape: tuple[int, ...]) -> Blocking:
    """For compiled passes."""
    slices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    most = min(max(BLOCK_ROWS, BLOCK_NUMEL // columns), max(FEW_ROWS, rows // 2), rows, SUMMED_ROWS)
    block = max(b for b in range(1, most + 1) if rows % b == 0)
    if slices * rows * columns > WHOLE_NUMEL:
        # A tail of another size is a pass of its own to compile: rather smaller blocks that leave none.
        block = block if block >= min(BLOCK_ROWS, most // 2) else most
        return Blocking(slices, rows, columns, block, None, CHUNK_NUMEL, CHUNKS_PER_APPLY)
    # A small matrix is one block, and so is one of a prime number of rows, say, for want of another.
    small = slices * rows * columns <= SMALL_NUMEL and rows <= SUMMED_ROWS
    if small or block < min(FEW_ROWS, most):
        block = rows
    return Blocking(slices, rows, columns, block, _whole_of(slices, rows, columns, block), CHUNK_NUMEL, CHUNKS_PER_APPLY)


def _whole_of(slices: int, rows: int, columns: int, block: int) -> Whole:
    lead = () if slices == 1 else (slices,)
    if block == rows:
        function, shape = _blocked.step_small_matrix, (*lead, rows, columns)
    else:
        function, shape = _blocked.step_matrix, (*lead, rows // block, block, columns)
    return Whole(function, shape, (*lead, columns), blocks_variant(*shape))


@functools.cache
def eager_blocking_of(shape: tuple[int, ...], chunk_numel: int) -> Blocking:
    """For eager operations, each of which writes as much as it reads: small chunks of one block."""
    slices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    return Blocking(slices, rows, columns, min(max(1, chunk_numel // columns), rows), None, chunk_numel, 1)


class Matrix(NamedTuple):
    p: Tensor
    g: Tensor
    row: Tensor
    col: Tensor
    exp_avg: Tensor | None
    rms: Tensor
    update_rms: Tensor
    draws: Tensor | None = None


def writable(x: Tensor) -> Tensor:
    """A 0-dim tensor for a pass to write to: Inductor loses an in-place update of a 0-dim float64 tensor (torch 2.13)."""
    return x.view(1) if x.dtype == torch.float64 else x


def step_members(members: Members, tables: list[Tensor], run: Runner) -> None:
    """Step members of any shapes, R and C at least 2, whose parameters and gradients are contiguous."""
    params, grads, rows, cols, _, exp_avgs, rms, update_rms, draws = members
    none = [None] * len(tables)
    matrices = map(Matrix, params, grads, rows, cols, exp_avgs or none, rms, update_rms, draws or none)
    for x, table in zip(matrices, tables, strict=True):
        blocking = blocking_of(x.p.shape)
        if blocking.whole is None:
            _step_in_chunks(blocking, x, table, run)
        else:
            _step_whole(blocking.whole, x, table, run)


def _step_whole(whole: Whole, x: Matrix, table: Tensor, run: Runner) -> None:
    run(whole.function, whole.variant, *x[:-1], table, x.draws, lay_out=whole.laid_out)


def _step_in_chunks(blocking: Blocking, x: Matrix, table: Tensor, run: Runner) -> None:
    sums = statistics_in_chunks(blocking, x, table, run)
    col = x.col.view(blocking.slices, blocking.columns)
    f = _blocked.factors(sums, col, x.rms, x.update_rms, table, blocking.rows, x.p.numel())
    apply_in_chunks(blocking, x, f, table, run)


def statistics_in_chunks(blocking: Blocking, x: Matrix, table: Tensor, run: Runner) -> _blocked.Sums:
    """The sums of each slice, stacked along a first dimension; brings `x.row` up to date."""
    slices, rows, columns = blocking[:3]
    p, g, row = x.p.view(slices, rows, columns), x.g.view(slices, rows, columns), x.row.view(slices, rows)
    col_sq, weighted_sq, row_sum = (table.new_zeros(shape) for shape in ((slices, columns), (slices, columns), (slices,)))
    param_sq = table.new_zeros(())
    for part in blocking.chunks():
        sums = run(_blocked.statistics, blocks_variant(*part.blocks, columns), part.of(p), part.of(g), part.of(row), table)
        at = part.slices
        torch._foreach_add_([col_sq[at], weighted_sq[at], row_sum[at], param_sq], list(sums))
    return _blocked.Sums(col_sq, weighted_sq, row_sum, param_sq)


def apply_in_chunks(blocking: Blocking, x: Matrix, f: _blocked.Factors, table: Tensor, run: Runner) -> None:
    """The second reads; the factors have a first dimension of slices."""
    slices, rows, columns = blocking[:3]
    p, g, row = x.p.view(slices, rows, columns), x.g.view(slices, rows, columns), x.row.view(slices, rows)
    exp_avg = None if x.exp_avg is None else x.exp_avg.view(slices, rows, columns)
    for part in blocking.chunks_to_apply():
        run(
            _blocked.apply,
            size_variant(*part.blocks, columns),
            part.of(p),
            part.of(g),
            part.of(row),
            None if exp_avg is None else part.of(exp_avg),
            f._replace(scale=f.scale[part.slices], col_factor=f.col_factor[part.slices]),
            table,
            None if x.draws is None else draws_from(x.draws, part.first_slice, part.rows.start),
        )


def draws_from(draws: Tensor, first_slice: int, first_row: int) -> Tensor:
    """The draws of a part that begins at this slice and row."""
    return draws + torch.tensor([0, 0, 0, first_slice, first_row, 0, 0], dtype=draws.dtype, device=draws.device)
