"""What kernels are told of a member: where its tensors lie, and of a piece, of a parameter that ranks share, what these sum."""

from __future__ import annotations

from typing import NamedTuple

# The columns of addresses; the last one is a row of the numbers. What is kept as a whole stands for rows and columns, and what
# stands for rows for a momentum where there is none.
ADDRESSES = 8
P, G, ROW, COL, EXP_AVG, RMS, UPDATE_RMS, NUMBERS = range(ADDRESSES)
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
