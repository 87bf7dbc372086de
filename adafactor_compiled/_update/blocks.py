"""How a matrix is cut: into blocks of rows that stay in cache between two reads, and into chunks that one call goes through."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from adafactor_compiled._state.layout import cached

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


class Blocking(NamedTuple):
    """How N slices of R x C, R and C at least 2, are cut into blocks of B rows."""

    slices: int
    rows: int
    columns: int
    block: int
    whole: bool  # whether it is stepped in one call; B then divides R
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


@cached
def blocking_of(shape: tuple[int, ...]) -> Blocking:
    """For compiled passes."""
    slices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    most = min(max(BLOCK_ROWS, BLOCK_NUMEL // columns), max(FEW_ROWS, rows // 2), rows, SUMMED_ROWS)
    block = max(b for b in range(1, most + 1) if rows % b == 0)
    if slices * rows * columns > WHOLE_NUMEL:
        # A tail of another size is a pass of its own to compile: rather smaller blocks that leave none.
        block = block if block >= min(BLOCK_ROWS, most // 2) else most
        return Blocking(slices, rows, columns, block, False, CHUNK_NUMEL, CHUNKS_PER_APPLY)
    # A small matrix is one block, and so is one of a prime number of rows, say, for want of another.
    small = slices * rows * columns <= SMALL_NUMEL and rows <= SUMMED_ROWS
    if small or block < min(FEW_ROWS, most):
        block = rows
    return Blocking(slices, rows, columns, block, True, CHUNK_NUMEL, CHUNKS_PER_APPLY)


@cached
def eager_blocking_of(shape: tuple[int, ...], chunk_numel: int) -> Blocking:
    """For eager operations, each of which writes as much as it reads: small chunks of one block."""
    slices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    return Blocking(slices, rows, columns, min(max(1, chunk_numel // columns), rows), False, chunk_numel, 1)
