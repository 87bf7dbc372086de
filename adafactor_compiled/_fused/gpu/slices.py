"""Parameters of many slices of a few elements each, the kernels of convolutions: a tile holds whole slices."""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor_compiled._fused.gpu import tables as t
from adafactor_compiled._fused.gpu.common import (
    agreement_of,
    decay_rates,
    moving_average,
    new_averages,
    noise_at,
    number_of,
    pointer_to,
    with_momentum,
    write,
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
def slice_statistics(
    jobs, units, pointers, numbers, kept, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, CONTIGUOUS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """First reads of some slices of a few elements each, kernels of convolutions; of a unit, `t.ROWS` is how many there are."""
    job = tl.program_id(0)
    of = units + tl.load(jobs + job) * t.UNIT
    m, count, chunk = tl.load(of + t.OF), tl.load(of + t.ROWS), job - tl.load(of + t.FIRST_JOB)
    n, rows, columns = chunk * TILE + tl.arange(0, TILE), tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    inside = n < count
    mask = inside[:, None, None] & (rows < R)[None, :, None] & (columns < C)[None, None, :]
    n3, rows3, columns3 = n[:, None, None], rows[None, :, None], columns[None, None, :]
    g = pointer_to(pointers, m, t.G_AT, G, False) + _place(of, n3, rows3, columns3, t.STRIDES_OF_G, R, C, CONTIGUOUS)
    x = tl.load(g, mask, 0.0).to(A)
    p = pointer_to(pointers, m, t.P_AT, P, False) + _place(of, n3, rows3, columns3, t.STRIDES_OF_P, R, C, CONTIGUOUS)
    y = tl.load(p, mask, 0.0).to(A)
    beta2, rest, eps = decay_rates(numbers, pointers, m)
    squared = x * x
    row, col = pointer_to(pointers, m, t.ROW_AT, A, False), pointer_to(pointers, m, t.COL_AT, A, False)
    at_rows, at_columns = n[:, None] * R + rows[None, :], n[:, None] * C + columns[None, :]
    of_rows, of_columns = inside[:, None] & (rows < R)[None, :], inside[:, None] & (columns < C)[None, :]
    new_row = moving_average(tl.load(row + at_rows, of_rows, 0.0), tl.sum(squared, 2) / C, beta2, rest, eps)
    new_col = moving_average(tl.load(col + at_columns, of_columns, 0.0), tl.sum(squared, 1) / R, beta2, rest, eps)
    tl.store(new_averages(row, kept, of, t.NEW_ROW, SPLIT) + at_rows, new_row, of_rows)
    tl.store(new_averages(col, kept, of, t.NEW_COL, SPLIT) + at_columns, new_col, of_columns)
    row_mean = tl.sum(tl.where(of_rows, new_row, 0.0), 1) / R
    weighted = squared / tl.where(of_rows, new_row, 1.0)[:, :, None] / tl.where(of_columns, new_col, 1.0)[:, None, :]
    update_sq = tl.sum(tl.sum(weighted, 2), 1) * row_mean
    tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + chunk, tl.sum(tl.sum(tl.sum(y * y, 2), 1).to(tl.float64), 0))
    tl.store(sums + tl.load(of + t.UNIT_UPDATE_SQ) + chunk, tl.sum(update_sq.to(tl.float64), 0))


@triton.jit
def apply_slices(
    jobs, units, members, pointers, numbers, draws, kept, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, CONTIGUOUS: tl.constexpr,
    SPLIT: tl.constexpr, ROUNDING: tl.constexpr, CAUTIOUS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Second reads of some slices, and the only write of p."""
    job = tl.program_id(0)
    of = units + tl.load(jobs + job) * t.UNIT
    m, count, chunk = tl.load(of + t.OF), tl.load(of + t.ROWS), job - tl.load(of + t.FIRST_JOB)
    n, rows, columns = chunk * TILE + tl.arange(0, TILE), tl.arange(0, TILE_ROWS), tl.arange(0, TILE_COLUMNS)
    inside = n < count
    mask = inside[:, None, None] & (rows < R)[None, :, None] & (columns < C)[None, None, :]
    n3, rows3, columns3 = n[:, None, None], rows[None, :, None], columns[None, None, :]
    at_p = _place(of, n3, rows3, columns3, t.STRIDES_OF_P, R, C, CONTIGUOUS)
    g = pointer_to(pointers, m, t.G_AT, G, False) + _place(of, n3, rows3, columns3, t.STRIDES_OF_G, R, C, CONTIGUOUS)
    x = tl.load(g, mask, 0.0).to(A)
    of_rows, of_columns = inside[:, None] & (rows < R)[None, :], inside[:, None] & (columns < C)[None, :]
    row_at, col_at = pointer_to(pointers, m, t.ROW_AT, A, False), pointer_to(pointers, m, t.COL_AT, A, False)
    at_rows, at_columns = n[:, None] * R + rows[None, :], n[:, None] * C + columns[None, :]
    row = tl.load(new_averages(row_at, kept, of, t.NEW_ROW, SPLIT) + at_rows, of_rows, 1.0)
    col = tl.load(new_averages(col_at, kept, of, t.NEW_COL, SPLIT) + at_columns, of_columns, 1.0)
    if SPLIT is not None and not COUNT:
        tl.store(row_at + at_rows, row, of_rows)
        tl.store(col_at + at_columns, col, of_columns)
    of_member = members + m * t.MEMBER
    result = sums + tl.load(of_member + t.RESULT)
    scale, decay, sign = tl.load(result).to(A), tl.load(result + 1).to(A), number_of(numbers, pointers, m, t.SIGN)
    row_mean = tl.sum(tl.where(of_rows, row, 0.0), 1) / R
    # Not of their ratio: beside large rows, that of one without gradient would underflow.
    row_factor = tl.rsqrt(row) * (tl.sqrt(row_mean) * scale)[:, None]
    update = x * row_factor[:, :, None] * tl.rsqrt(col)[:, None, :]
    noise = decay
    if ROUNDING and not COUNT:
        noise = noise_at(draws, m, n3, rows3, columns3, N)
    if M is not None:
        exp_avg = pointer_to(pointers, m, t.EXP_AVG_AT, M, False) + at_p
        update = with_momentum(exp_avg, update, mask, noise, numbers, pointers, m, M, ROUNDING, COUNT)
    if CAUTIOUS:
        agree = tl.where(mask, agreement_of(update, x, sign), 0.0)
        if COUNT:
            tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + chunk, tl.sum(tl.sum(tl.sum(agree, 2), 1).to(tl.float64), 0))
        else:
            update *= agree / tl.load(result + 2).to(A)
    if not COUNT:
        p = pointer_to(pointers, m, t.P_AT, P, False) + at_p
        y = tl.load(p, mask, 0.0).to(A)
        write(p, y - (y * decay + update), mask, noise, P, ROUNDING)
