"""Parameters of many slices of a few elements each, the kernels of convolutions: a tile holds whole slices."""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor_compiled._fused.gpu import tables as t
from adafactor_compiled._fused.gpu.common import (
    decay_rates,
    directed,
    moving_average,
    new_averages,
    noise_at,
    numbers_of,
    pointer_to,
    work_of,
    write_stepped,
)


@triton.jit
def _place(of, n, rows, columns, first: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Where elements of slices lie; else by the strides that stand in the unit from `first` on."""
    if CONTIGUOUS:
        where = n * (R * C) + rows * C + columns
    else:
        inner = tl.load(of + t.INNER)
        where = (n // inner) * tl.load(of + first) + (n % inner) * tl.load(of + first + 1)
        where += rows * tl.load(of + first + 2) + columns * tl.load(of + first + 3)
    return where


@triton.jit
def step_slices(
    jobs, units, members, pointers, numbers, draws, partial, kept, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, CONTIGUOUS: tl.constexpr,
    SPLIT: tl.constexpr, CAUTIOUS: tl.constexpr, CALL: tl.constexpr,
):  # fmt: skip
    """First reads of some slices, the rows of a unit, for all averages and sums; or second ones, and the only write of p."""
    of, m, chunk = work_of(jobs, units, t.FIRST_JOB)
    own_numbers = numbers_of(numbers, pointers, m)
    n, rows, columns = chunk * TILE + tl.arange(0, TILE), tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    inside = n < tl.load(of + t.ROWS)
    of_rows, of_columns = inside[:, None] & (rows < R)[None, :], inside[:, None] & (columns < C)[None, :]
    mask = inside[:, None, None] & (rows < R)[None, :, None] & (columns < C)[None, None, :]
    n3, rows3, columns3 = n[:, None, None], rows[None, :, None], columns[None, None, :]
    at_rows, at_columns = n[:, None] * R + rows[None, :], n[:, None] * C + columns[None, :]
    at_p = _place(of, n3, rows3, columns3, t.STRIDES_OF_P, R, C, CONTIGUOUS)
    p = pointer_to(pointers, m, t.P_AT, P, False) + at_p
    g = pointer_to(pointers, m, t.G_AT, G, False) + _place(of, n3, rows3, columns3, t.STRIDES_OF_G, R, C, CONTIGUOUS)
    x = tl.load(g, mask, 0.0).to(A)
    old_row, old_col = pointer_to(pointers, m, t.ROW_AT, A, False), pointer_to(pointers, m, t.COL_AT, A, False)
    new_row = new_averages(old_row, kept, of, t.NEW_ROW, SPLIT) + at_rows
    new_col = new_averages(old_col, kept, of, t.NEW_COL, SPLIT) + at_columns
    if CALL == t.STATISTICS:
        y = tl.load(p, mask, 0.0).to(A)
        squared, rates = x * x, decay_rates(own_numbers)
        row = moving_average(tl.load(old_row + at_rows, of_rows, 0.0), tl.sum(squared, 2) / C, rates)
        col = moving_average(tl.load(old_col + at_columns, of_columns, 0.0), tl.sum(squared, 1) / R, rates)
        tl.store(new_row, row, of_rows)
        tl.store(new_col, col, of_columns)
        row_mean = tl.sum(tl.where(of_rows, row, 0.0), 1) / R
        weighted = squared / tl.where(of_rows, row, 1.0)[:, :, None] / tl.where(of_columns, col, 1.0)[:, None, :]
        update_sq = tl.sum(tl.sum(weighted, 2), 1) * row_mean
        tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + chunk, tl.sum(tl.sum(tl.sum(y * y, 2), 1).to(tl.float64), 0))
        tl.store(sums + tl.load(of + t.UNIT_UPDATE_SQ) + chunk, tl.sum(update_sq.to(tl.float64), 0))
    else:
        row, col = tl.load(new_row, of_rows, 1.0), tl.load(new_col, of_columns, 1.0)
        if SPLIT is not None and CALL != t.COUNT:
            tl.store(old_row + at_rows, row, of_rows)
            tl.store(old_col + at_columns, col, of_columns)
        result = sums + tl.load(members + m * t.MEMBER + t.RESULT)
        row_mean = tl.sum(tl.where(of_rows, row, 0.0), 1) / R
        # Not of their ratio: beside large rows, that of one without gradient would underflow.
        row_factor = tl.rsqrt(row) * (tl.sqrt(row_mean) * tl.load(result).to(A))[:, None]
        update = x * row_factor[:, :, None] * tl.rsqrt(col)[:, None, :]
        noise = noise_at(draws, m, n3, rows3, columns3, N)
        exp_avg = None if M is None else pointer_to(pointers, m, t.EXP_AVG_AT, M, False) + at_p
        update, agree = directed(update, x, exp_avg, mask, noise, own_numbers, M, N, CAUTIOUS, CALL == t.COUNT)
        if CALL == t.COUNT:
            tl.store(sums + tl.load(of + t.UNIT_AGREE) + chunk, tl.sum(tl.sum(tl.sum(agree, 2), 1).to(tl.float64), 0))
        else:
            share = tl.load(result + 2).to(A) if CAUTIOUS else 1.0
            y = tl.load(p, mask, 0.0).to(A)
            write_stepped(p, y, update, agree, share, tl.load(result + 1).to(A), mask, noise, P, N, CAUTIOUS)
