"""The passes of a rank over its own piece of a matrix; what they sum adds up over the ranks.

Pieces of rows go through the two reads of `_blocked`, as a matrix on one machine does. Where columns are split a row average
is not known once its piece of the row has been read, so that the weighted squares take a read of their own: three reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from adafactor_compiled import _blocked
from adafactor_compiled._blocked import Averages, Factors, Sums, materialize
from adafactor_compiled._compile import size_variant
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


def weighted_rows(g: Tensor, col: Tensor, table: Tensor) -> Tensor:
    """A read of g, shape [..., n, B, C]: for each row, the sum of its squares divided by the column averages [..., C]."""
    weight = materialize(1.0 / col).unsqueeze(-2).unsqueeze(-2)
    return (g.to(table.dtype).square() * weight).sum(-1)


def moving_average(average: Tensor, mean_sq: Tensor, table: Tensor) -> Tensor:
    """A new average; the old one is left as it is."""
    numbers = Numbers.of(table)
    return average * numbers.beta2 + (mean_sq + numbers.eps) * numbers.one_minus_beta2


class Piece:
    """A rank's piece of a matrix, cut into blocks of rows.

    Args:
        x: the piece; its leading dimensions are slices.
        compiled: whether `run` compiles; blocks are then small enough to stay in cache between two reads.
    """

    def __init__(self, x: Matrix, table: Tensor, run: Runner, compiled: bool) -> None:
        self.x, self.table, self.run = x, table, run
        *self.lead, rows, columns = x.p.shape
        self.blocking = blocking_of(tuple(x.p.shape)) if compiled and can_compile(x.p, x.g) else None
        blocking = self.blocking
        if blocking is None or not blocking.whole:
            self.blocks = (1, rows)
        else:
            self.blocks = (rows // blocking.block, blocking.block)
        self.variant = size_variant(*self.lead, *self.blocks, columns)

    def _cut(self, x: Tensor) -> Tensor:
        """[..., R, C] as [..., n, B, C]."""
        return _unflatten(x, -2, self.blocks)

    def statistics(self) -> Sums:
        """The sums of each slice; brings `x.row` up to date."""
        x, blocking = self.x, self.blocking
        if blocking is None or blocking.whole:
            sums: Sums = self.run(
                _blocked.statistics,
                self.variant,
                self._cut(x.p),
                self._cut(x.g),
                _unflatten(x.row, -1, self.blocks),
                self.table,
            )
            return sums
        sums = statistics_in_chunks(blocking, x, self.table, self.run)
        col_sq, weighted_sq = (_unflatten(y, 0, self.lead) if self.lead else y[0] for y in (sums.col_sq, sums.weighted_sq))
        return Sums(col_sq, weighted_sq, sums.row.reshape(self.lead), sums.param_sq)

    def plain_sums(self) -> PlainSums:
        sums: PlainSums = self.run(plain_sums, self.variant, self._cut(self.x.p), self._cut(self.x.g), self.table)
        return sums._replace(row_sq=sums.row_sq.flatten(-2))

    def weighted_rows(self, col: Tensor) -> Tensor:
        weighted: Tensor = self.run(weighted_rows, self.variant, self._cut(self.x.g), col, self.table)
        return weighted.flatten(-2)

    def finish(self, new: Averages, param_sq: Tensor, numel: int) -> None:
        """All writes of the step but that of the rows, which are up to date in `x.row`."""
        x, table, blocking = self.x, self.table, self.blocking
        f: Factors = _blocked.finish(new, param_sq, x.col, x.rms, x.update_rms, table, numel)
        if blocking is None or blocking.whole:
            exp_avg = None if x.exp_avg is None else self._cut(x.exp_avg)
            row = _unflatten(x.row, -1, self.blocks)
            self.run(_blocked.apply, self.variant, self._cut(x.p), self._cut(x.g), row, exp_avg, f, table)
        else:
            slices = blocking.slices
            f = f._replace(row_mean=f.row_mean.reshape(slices), col_factor=f.col_factor.reshape(slices, -1))
            apply_in_chunks(blocking, x, f, table, self.run)


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    y: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return y


def can_compile(p: Tensor, g: Tensor) -> bool:
    """Whether the blocked passes fit: what is empty, one row or column, or strided is better stepped without compiled calls."""
    return p.numel() > 0 and 1 not in p.shape[-2:] and p.is_contiguous() and g.is_contiguous()
