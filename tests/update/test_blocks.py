"""How matrices are cut into blocks and chunks: every row once, and nothing too long, too short or alone without need."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adafactor_compiled._update.blocks import (
    BLOCK_ROWS,
    FEW_ROWS,
    SMALL_NUMEL,
    SUMMED_ROWS,
    WHOLE_NUMEL,
    Blocking,
    Part,
    blocking_of,
)

SHAPES = st.one_of(
    st.tuples(st.integers(2, 70_000), st.integers(2, 70_000)),
    st.tuples(st.integers(2, 40), st.integers(2, 400_000)),
    st.tuples(st.integers(1, 300), st.integers(2, 3_000), st.integers(2, 3_000)),
)


def rows_of(part: Part) -> list[tuple[range, range]]:
    slices = range(part.slices, part.slices + 1) if isinstance(part.slices, int) else range(part.slices.start, part.slices.stop)
    return [(slices, range(part.rows.start, part.rows.stop))]


def covered(blocking: Blocking, parts: list[Part]) -> None:
    """Every row of every slice is in one part, and each part is as large as it says."""
    spans = sorted((slices.start, rows.start, slices.stop, rows.stop) for part in parts for slices, rows in rows_of(part))
    at = (0, 0)
    for first_slice, first_row, last_slice, last_row in spans:
        assert (first_slice, first_row) == at
        at = (last_slice, 0) if last_row == blocking.rows else (first_slice, last_row)
        assert last_row == blocking.rows or last_slice == first_slice + 1
    assert at == (blocking.slices, 0)
    for part in parts:
        assert math.prod(part.blocks) == sum(len(slices) * len(rows) for slices, rows in rows_of(part))


@given(SHAPES)
def test_every_row_is_in_one_part(shape: tuple[int, ...]) -> None:
    blocking = blocking_of(shape)
    if blocking.whole:
        assert math.prod(shape) <= WHOLE_NUMEL
        assert blocking.rows % blocking.block == 0
    else:
        assert math.prod(shape) > WHOLE_NUMEL
        covered(blocking, list(blocking.chunks()))
        covered(blocking, list(blocking.chunks_to_apply()))


@given(SHAPES)
def test_blocks_are_neither_long_nor_short_nor_alone(shape: tuple[int, ...]) -> None:
    blocking, rows = blocking_of(shape), shape[-2]
    if not blocking.whole or blocking.block < rows:
        assert blocking.block <= SUMMED_ROWS
        assert blocking.block >= FEW_ROWS or not blocking.whole
    elif math.prod(shape) > SMALL_NUMEL or rows > SUMMED_ROWS:
        assert all(rows % block for block in range(FEW_ROWS, min(BLOCK_ROWS, rows // 2) + 1)), "it could be cut"


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((512, 512), 128),
        ((16, 4096), 16),
        ((16, 14336), 8),
        ((4096, 16), 512),
        ((1024, 16), 512),
        ((1021, 1021), 1021),
        ((3072, 768), 64),
    ],
)
def test_blocks_of_common_matrices(shape: tuple[int, ...], block: int) -> None:
    assert blocking_of(shape).block == block


@pytest.mark.parametrize("shape", [(2048, 3072), (8192, 768), (50257, 768)])
def test_chunks_of_one_matrix_are_no_slices(shape: tuple[int, ...]) -> None:
    """With a dimension of one slice, their rows and columns would not be summed in one loop."""
    assert all(len(part.blocks) == 2 for part in blocking_of(shape).chunks())
