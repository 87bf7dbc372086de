"""What a rank sums of its own piece of a matrix where columns are split; the sums add up over the ranks.

A row average is not known there once its piece of the row has been read, so that the weighted squares take a read of their own:
three reads of the gradient instead of two (matrices.py).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adafactor_compiled._update.matrices import materialize, total


class PlainSums(NamedTuple):
    """Sums of a piece of which neither rows nor columns need be whole."""

    row_sq: Tensor  # [..., n, B]: sum over the columns of gradient^2
    col_sq: Tensor  # [..., C]: sum over the rows of gradient^2
    param_sq: Tensor  # []: sum of parameter^2


def plain_sums(p: Tensor, g: Tensor, table: Tensor) -> PlainSums:
    """A read of p and g, shape [..., n, B, C]."""
    p, squared = p.to(table.dtype), g.to(table.dtype).square()
    row_sq = squared.sum(-1)
    col_sq = materialize(squared.sum(-2)).sum(-2)
    return PlainSums(row_sq, col_sq, total(p.square()))


def weighted_rows(g: Tensor, col: Tensor, table: Tensor) -> Tensor:
    """For each row, [..., n, B], the sum of gradient^2 / column average: a read of g, [..., n, B, C], and col, [..., C]."""
    weight = materialize(1.0 / col).unsqueeze(-2).unsqueeze(-2)
    return (g.to(table.dtype).square() * weight).sum(-1)
