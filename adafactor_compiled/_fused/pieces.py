"""Members that are pieces: of a parameter that ranks share, what this one has. What ranks sum is known between two calls."""

from __future__ import annotations

from typing import NamedTuple

NEITHER, ROWS, COLUMNS = range(3)  # what ranks split of the rows and columns of a piece
STATISTICS, COUNT, STEP = range(3)  # calls: the first two are for pieces, and write nothing but sums


class Piece(NamedTuple):
    """Of a member that is one: the columns of another table."""

    sums: int  # address of what ranks add up, float64, in the order of `_sharded/exchange.py`
    agree: int  # and of how many elements agree, for cautious steps, else 0
    split: int
    numel: int  # of the whole parameter
    rows: int
    columns: int
