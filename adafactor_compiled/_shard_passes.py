"""The passes of a rank over its own piece of a matrix; what they sum adds up over the ranks.

Pieces of rows go through the two reads of `_blocked`, as a matrix on one machine does. Where columns are split a row average
is not known once its piece of the row has been read, so that the weighted squares take a read of their own: three reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from adafactor_compiled import _blocked
from adafactor_compiled._blocked import Factors, Sums, materialize
from adafactor_compiled._compile import blocks_variant, size_variant
from adafactor_compiled._depth_first import Matrix, apply_in_chunks, blocking_of, statistics_in_chunks
from adafactor_compiled._numbers import Numbers
from adafactor_compiled._passes import Runner


class PlainSums(NamedTuple):
    """Sums of a piece of which neither rows nor columns need be whole."""

    row_sq: Tensor  # [..., R]: sum over the columns of gradient^2
    col_sq: Tensor  # [..., C]: sum over the rows of gradient^2
    param_sq: Tensor  # []: sum of parameter^2


def plain_sums(p: Tensor, g: Tensor, table: Tensor) -> PlainSums:
    """A read of p and g, shape [..., n, B, C]; the row sums have shape [..., n, B]."""
    p, squared = p.to(table.dtype), g.to(table.dtype).square()
    row_sq = squared.sum(-1)
    col_sq = materialize(squared.sum(-2)).sum(-2)
    return PlainSums(row_sq, col_sq, materialize(p.square().sum(-1)).sum())


class WeightedRows(NamedTuple):
    """What does not need the row averages of the sum of the squares of the update."""

    weighted_sq: Tensor  # [..., n, B]: for each row, the sum of gradient^2 / column average


def weighted_rows(g: Tensor, col: Tensor, table: Tensor) -> WeightedRows:
    """A read of g, shape [..., n, B, C], with new column averages, shape [..., C]."""
    weight = materialize(1.0 / col).unsqueeze(-2).unsqueeze(-2)
    return WeightedRows((g.to(table.dtype).square() * weight).sum(-1))


def moving_average(average: Tensor, mean_sq: Tensor, table: Tensor) -> Tensor:
    """A new average; the old one is left as it is."""
    numbers = Numbers.of(table)
    new: Tensor = average * numbers.beta2 + (mean_sq + numbers.eps) * numbers.one_minus_beta2
    return new


class Piece:
    """A rank's piece of a matrix, cut into blocks of rows.

    Args:
        x: the piece; its leading dimensions are slices.
        compiled: whether `run` compiles; blocks are then small enough to stay in cache between two reads.
    """

    def __init__(self, x: Matrix, table: Tensor, run: Runner, compiled: bool) -> None:
        self.x, self.table = x, table
        *self.lead, rows, columns = x.p.shape
        self.blocking = blocking_of(tuple(x.p.shape)) if compiled and can_compile(x.p, x.g) else None
        self.run = run if self.blocking is not None else _run_eagerly
        whole = self.blocking is None or self.blocking.whole is not None
        self.chunked = None if whole else self.blocking  # too large to be read twice in one go
        block = rows if self.blocking is None else self.blocking.block
        self.blocks = (rows // block, block) if rows else (1, 0)
        self.variant = size_variant(*self.lead, *self.blocks, columns)

    def _cut(self, x: Tensor) -> Tensor:
        """[..., R, C] as [..., n, B, C]."""
        return _unflatten(x, -2, self.blocks)

    def statistics(self) -> Sums:
        """The sums of each slice; brings `x.row` up to date."""
        x = self.x
        if self.chunked is not None:
            sums = statistics_in_chunks(self.chunked, x, self.table, self.run)
            lead = self.lead
            return Sums(self._of_slices(sums.col_sq), self._of_slices(sums.weighted_sq), sums.row.reshape(lead), sums.param_sq)
        row = _unflatten(x.row, -1, self.blocks)
        variant = blocks_variant(*self.lead, *self.blocks, x.p.shape[-1])
        whole: Sums = self.run(_blocked.statistics, variant, self._cut(x.p), self._cut(x.g), row, self.table)
        return whole

    def plain_sums(self) -> PlainSums:
        x = self.x
        if self.chunked is None:
            sums: PlainSums = self.run(plain_sums, self.variant, self._cut(x.p), self._cut(x.g), self.table)
            return sums._replace(row_sq=sums.row_sq.flatten(-2))
        slices, rows, columns = self.chunked[:3]
        p, g = (y.view(slices, rows, columns) for y in (x.p, x.g))
        row_sq, col_sq = self.table.new_zeros(slices, rows), self.table.new_zeros(slices, columns)
        param_sq = self.table.new_zeros(())
        for part in self.chunked.chunks():
            sums = self.run(plain_sums, size_variant(*part.blocks, columns), part.of(p), part.of(g), self.table)
            part.of(row_sq).copy_(sums.row_sq)
            col_sq[part.slices] += sums.col_sq
            param_sq += sums.param_sq
        return PlainSums(self._of_slices(row_sq), self._of_slices(col_sq), param_sq)

    def weighted_rows(self, col: Tensor) -> Tensor:
        """For each row, the sum of gradient^2 / column average."""
        g = self.x.g
        if self.chunked is None:
            whole: WeightedRows = self.run(weighted_rows, self.variant, self._cut(g), col, self.table)
            return whole.weighted_sq.flatten(-2)
        slices, rows, columns = self.chunked[:3]
        g, col, weighted_sq = g.view(slices, rows, columns), col.reshape(slices, columns), self.table.new_zeros(slices, rows)
        for part in self.chunked.chunks():
            variant = size_variant(*part.blocks, columns)
            part.of(weighted_sq).copy_(self.run(weighted_rows, variant, part.of(g), col[part.slices], self.table).weighted_sq)
        return self._of_slices(weighted_sq)

    def _of_slices(self, x: Tensor) -> Tensor:
        """[slices, ...] with the leading dimensions of the piece."""
        return x.view(*self.lead, *x.shape[1:])

    def factors(self, sums: Sums, rows: int, numel: int) -> Factors:
        """What the summed statistics of a parameter of `rows` rows and `numel` elements make of its rows."""
        x = self.x
        variant = size_variant(*self.lead, x.p.shape[-1], rows, numel)
        f: Factors = self.run(_blocked.factors, variant, sums, x.col, x.rms, x.update_rms, self.table, rows, numel)
        return f

    def apply(self, f: Factors) -> None:
        """The second reads, and the write of the parameter and the momentum."""
        x, table = self.x, self.table
        if self.chunked is not None:
            slices = self.chunked.slices
            f = f._replace(scale=f.scale.reshape(slices), col_factor=f.col_factor.reshape(slices, -1))
            apply_in_chunks(self.chunked, x, f, table, self.run)
            return
        exp_avg = None if x.exp_avg is None else self._cut(x.exp_avg)
        row = _unflatten(x.row, -1, self.blocks)
        self.run(_blocked.apply, self.variant, self._cut(x.p), self._cut(x.g), row, exp_avg, f, table, x.draws)


def _run_eagerly(function: Callable[..., Any], _: tuple[int, ...], *arguments: Any) -> Any:
    return function(*arguments)


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    y: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return y


def can_compile(p: Tensor, g: Tensor) -> bool:
    """Whether the blocked passes fit: what is empty, one row or column, or strided is better stepped without compiled calls."""
    return p.numel() > 0 and 1 not in p.shape[-2:] and p.is_contiguous() and g.is_contiguous()
