"""A rank's piece of a matrix: the passes over it, in blocks of rows as on one machine (matrices.py)."""

from __future__ import annotations

import math

from torch import Tensor

from adafactor_compiled._state.placements import Split
from adafactor_compiled._update import matrices, pieces
from adafactor_compiled._update.blocks import Blocking, Part, blocking_of
from adafactor_compiled._update.chunks import PassOf, Run, apply_in_chunks, passes_in_chunks, statistics_in_chunks
from adafactor_compiled._update.matrices import Factors, Sums
from adafactor_compiled._update.members import Member
from adafactor_compiled._update.pieces import PlainSums

Shape = tuple[int, ...]


def can_compile(p: Tensor, g: Tensor) -> bool:
    """Whether the passes fit: what is empty, one row or column, or strided is better stepped without compiled calls."""
    return p.numel() > 0 and 1 not in p.shape[-2:] and p.is_contiguous() and g.is_contiguous()


def passes_of(shape: Shape, split: Split) -> list[PassOf]:
    """What stepping a compiled piece of this shape runs."""
    blocking = _blocking(shape, compiled=True)
    sums = [matrices.statistics] if split in (Split.ROWS, Split.SLICES) else [pieces.plain_sums, pieces.weighted_rows]
    if not blocking.whole:
        in_chunks = passes_in_chunks(shape)
        chunks = [sizes for function, sizes in in_chunks if function is matrices.statistics]
        return [*((function, sizes) for function in sums for sizes in chunks), *in_chunks]
    return [(function, _sizes(blocking)) for function in (*sums, matrices.apply)]


def _blocking(shape: Shape, compiled: bool) -> Blocking:
    """Blocks are small enough to stay in cache between two reads, where that is what a compiled pass makes of them."""
    if compiled:
        return blocking_of(shape)
    *lead, rows, columns = shape
    return Blocking(math.prod(lead), rows, columns, rows, True, 0, 0)


def _sizes(blocking: Blocking) -> Shape:
    """The sizes of a piece that is stepped in one go: ([slices,] blocks, rows of a block, columns)."""
    slices, rows, columns, block = blocking[:4]
    return (*(() if slices == 1 else (slices,)), rows // block if rows else 1, block, columns)


class Piece:
    """A rank's piece of a matrix.

    Args:
        x: the piece; its leading dimensions are slices.
        run: runs a pass, see chunks.py.
        compiled: whether `run` compiles; see `can_compile`.
    """

    def __init__(self, x: Member, run: Run, compiled: bool) -> None:
        self.x, self.run = x, run
        self.lead = x.p.shape[:-2]
        self.blocking = _blocking(tuple(x.p.shape), compiled)

    def _p_and_g(self) -> tuple[Tensor, Tensor]:
        sizes = _sizes(self.blocking)
        return self.x.p.reshape(sizes), self.x.g.reshape(sizes)

    def _of_slices(self, x: Tensor, *rest: int) -> Tensor:
        """With the leading dimensions of the piece."""
        return x.reshape((*self.lead, *rest))

    def statistics(self) -> Sums:
        """The sums of each slice; brings `x.row` up to date."""
        x, columns = self.x, self.blocking.columns
        if self.blocking.whole:
            row = x.row.reshape(_sizes(self.blocking)[:-1])
            p, g = self._p_and_g()
            ones = matrices.ones_for(g.shape, g.dtype, g.device)
            sums: Sums = self.run(matrices.statistics, _sizes(self.blocking), p, g, row, ones, x.table)
        else:
            sums = statistics_in_chunks(self.blocking, x, self.run)
        col_sq, weighted_sq = (self._of_slices(y, columns) for y in sums[:2])
        return Sums(col_sq, weighted_sq, self._of_slices(sums.row), sums.param_sq)

    def plain_sums(self) -> PlainSums:
        x, (slices, rows, columns) = self.x, self.blocking[:3]
        if self.blocking.whole:
            sums: PlainSums = self.run(pieces.plain_sums, _sizes(self.blocking), *self._p_and_g(), x.table)
            row_sq, col_sq, param_sq = sums
        else:
            p, g = (y.view(slices, rows, columns) for y in (x.p, x.g))
            row_sq, col_sq = x.table.new_zeros(slices, rows), x.table.new_zeros(slices, columns)
            param_sq = x.table.new_zeros(())
            for part in self.blocking.chunks():
                sums = self.run(pieces.plain_sums, self._of_part(part), part.of(p), part.of(g), x.table)
                part.of(row_sq).copy_(sums.row_sq)
                col_sq[part.slices] += sums.col_sq
                param_sq += sums.param_sq
        return PlainSums(self._of_slices(row_sq, rows), self._of_slices(col_sq, columns), param_sq)

    def weighted_rows(self, col: Tensor) -> Tensor:
        """For each row, the sum of gradient^2 / column average."""
        x, (slices, rows, columns) = self.x, self.blocking[:3]
        if self.blocking.whole:
            sizes = _sizes(self.blocking)
            weighted: Tensor = self.run(
                pieces.weighted_rows, sizes, self._p_and_g()[1], col.reshape(*sizes[:-3], columns), x.table
            )
        else:
            g, col = x.g.view(slices, rows, columns), col.reshape(slices, columns)
            weighted = x.table.new_zeros(slices, rows)
            for part in self.blocking.chunks():
                of_part = self.run(pieces.weighted_rows, self._of_part(part), part.of(g), col[part.slices], x.table)
                part.of(weighted).copy_(of_part)
        return self._of_slices(weighted, rows)

    def _of_part(self, part: Part) -> Shape:
        return (*part.blocks, self.blocking.columns)

    def agreement(self, f: Factors) -> Tensor:
        """How many elements of a cautious step agree in sign; of a piece that is not compiled."""
        x, sizes = self.x, _sizes(self.blocking)
        row, exp_avg = x.row.reshape(sizes[:-1]), x.exp_avg.reshape(sizes)
        scale, col_factor, _ = self._factors(f)
        return matrices.agreement(x.g.reshape(sizes), row, exp_avg, scale, col_factor, x.table)

    def _factors(self, f: Factors) -> tuple[Tensor, ...]:
        """Those of a piece that is stepped in one go."""
        lead = _sizes(self.blocking)[:-3]
        return f.scale.reshape(lead), f.col_factor.reshape(*lead, self.blocking.columns), f.decay

    def apply(self, f: Factors, share: Tensor | None) -> None:
        """The second reads, and the write of the parameter and the momentum; `share` see matrices.py."""
        x = self.x
        if not self.blocking.whole:
            slices = self.blocking.slices
            f = f._replace(scale=f.scale.reshape(slices), col_factor=f.col_factor.reshape(slices, -1))
            apply_in_chunks(self.blocking, x, f, self.run)
            return
        factors = self._factors(f)
        if not (x.p.is_contiguous() and (x.exp_avg is None or x.exp_avg.is_contiguous())):
            p = x.p.contiguous()
            exp_avg = None if x.exp_avg is None else x.exp_avg.contiguous()
            self._apply(p, exp_avg, factors, share)
            x.p.copy_(p)
            if exp_avg is not None:
                x.exp_avg.copy_(exp_avg)
        else:
            self._apply(x.p, x.exp_avg, factors, share)

    def _apply(self, p: Tensor, exp_avg: Tensor | None, factors: tuple[Tensor, ...], share: Tensor | None) -> None:
        x, sizes = self.x, _sizes(self.blocking)
        exp_avg = None if exp_avg is None else exp_avg.view(sizes)
        row, g = x.row.reshape(sizes[:-1]), x.g.reshape(sizes)
        self.run(matrices.apply, sizes, p.view(sizes), g, row, exp_avg, *factors, x.table, x.draws, share)
