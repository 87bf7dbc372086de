"""Matrices, in four launches for any number of any shapes.

`matrix_statistics` goes over blocks of rows: it reads g and p, writes the new rows, and the sums over the rows of its block,
plain and each row divided by its average. From those `matrix_columns` makes the columns and, by the identity of
_update/matrices.py, the sum of the squares of the update: no pass over the elements is needed for it. `finish` makes the step
size of each member; `apply_matrix` reads g and p again and writes p.

Of pieces whose rows are split, the sums of all blocks are put where ranks add them up, and the columns are made of what is
there then. Where columns are split, the kernels' rows are columns of the parameter. New averages of pieces are kept apart until
`apply_matrix` comes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor_compiled._fused.gpu import tables as t
from adafactor_compiled._fused.gpu.common import (
    TOTAL,
    decay_rates,
    directed,
    moving_average,
    new_averages,
    noise_at,
    numbers_of,
    pointer_to,
    size_of,
    sums_at,
    total,
    work_of,
    write_stepped,
)


@triton.jit
def _place(rows, columns, R, C, TRANSPOSED: tl.constexpr):
    """Where elements of a matrix lie."""
    return rows[:, None] + columns[None, :] * R if TRANSPOSED else rows[:, None] * C + columns[None, :]


@triton.jit
def _block_of(of, block, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where a unit begins, how many rows and columns it has, and the first and last row of one of its blocks."""
    R, C = size_of(of, t.ROWS, ALIGNED and TRANSPOSED), size_of(of, t.COLUMNS, ALIGNED and not TRANSPOSED)
    per = size_of(of, t.PER, ALIGNED and TRANSPOSED)
    return size_of(of, t.START, ALIGNED), R, C, block * per, tl.minimum(block * per + per, R)


@triton.jit
def matrix_statistics(
    jobs, units, members, pointers, numbers, draws, partial, kept, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """First reads of a block of rows; with `ONE_TILE` the columns are no more than those of a tile, which is read once."""
    of, m, block = work_of(jobs, units, t.FIRST_JOB)
    start, R, C, first, end = _block_of(of, block, ALIGNED, TRANSPOSED)
    p, g = pointer_to(pointers, m, t.P_AT, P, ALIGNED) + start, pointer_to(pointers, m, t.G_AT, G, ALIGNED) + start
    row = pointer_to(pointers, m, t.ROW_AT, A, False) + tl.load(of + t.ROW_START)
    new_row = new_averages(row, kept, of, t.NEW_ROW, SPLIT)
    part = partial + tl.load(of + t.PARTIAL) + 2 * C * block
    rates = decay_rates(numbers_of(numbers, pointers, m))
    columns = tl.arange(0, TILE_COLUMNS)
    row_sum, param_sq = tl.zeros([TILE_ROWS], A), tl.zeros([TILE_COLUMNS], A)
    # Where rows are short, adding them up in each tile would take longer than reading them.
    wide: tl.constexpr = TILE_COLUMNS >= 256
    col_sq = tl.zeros([TILE_COLUMNS] if wide else [TILE_ROWS, TILE_COLUMNS], A)
    weighted_sq = tl.zeros([TILE_COLUMNS] if wide else [TILE_ROWS, TILE_COLUMNS], A)
    for at in range(first, end, TILE_ROWS):
        rows = at + tl.arange(0, TILE_ROWS)
        inside = rows < end
        row_sq = tl.zeros([TILE_ROWS], A)
        old = tl.load(row + rows, inside, 0.0)
        if ONE_TILE:
            mask = inside[:, None] & (columns < C)[None, :]
            where = _place(rows, columns, R, C, TRANSPOSED)
            x = tl.load(g + where, mask, 0.0).to(A)
            y = tl.load(p + where, mask, 0.0).to(A)
            squared = x * x
            param_sq += tl.sum(y * y, 0)
            new = moving_average(old, tl.sum(squared, 1) / C, rates)
            weighted = squared / tl.where(inside, new, 1.0)[:, None]
            col_sq += tl.sum(squared, 0) if wide else squared
            weighted_sq += tl.sum(weighted, 0) if wide else weighted
        else:
            for c in range(0, C, TILE_COLUMNS):
                mask = inside[:, None] & (c + columns < C)[None, :]
                where = _place(rows, c + columns, R, C, TRANSPOSED)
                x = tl.load(g + where, mask, 0.0).to(A)
                y = tl.load(p + where, mask, 0.0, eviction_policy="evict_first").to(A)
                row_sq += tl.sum(x * x, 1)
                param_sq += tl.sum(y * y, 0)
            new = moving_average(old, row_sq / C, rates)
        tl.store(new_row + rows, new, inside)
        row_sum += tl.where(inside, new, 0.0)
    tl.store(sums + tl.load(of + t.ROW_SUMS) + block, tl.sum(row_sum, 0).to(tl.float64))
    tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + block, tl.sum(param_sq.to(tl.float64), 0))
    if ONE_TILE:
        tl.store(part + columns, col_sq if wide else tl.sum(col_sq, 0), columns < C)
        tl.store(part + C + columns, weighted_sq if wide else tl.sum(weighted_sq, 0), columns < C)
    else:
        tl.debug_barrier()  # rows are read by other threads than wrote them
        for c in range(0, C, TILE_COLUMNS):  # the block is in cache
            col_sq = tl.zeros([TILE_COLUMNS], A)
            weighted_sq = tl.zeros([TILE_COLUMNS], A)
            for at in range(first, end, TILE_ROWS):
                rows = at + tl.arange(0, TILE_ROWS)
                mask = (rows < end)[:, None] & (c + columns < C)[None, :]
                where = _place(rows, c + columns, R, C, TRANSPOSED)
                squared = tl.load(g + where, mask, 0.0).to(A)
                squared *= squared
                col_sq += tl.sum(squared, 0)
                weighted_sq += tl.sum(squared / tl.load(new_row + rows, rows < end, 1.0)[:, None], 0)
            tl.store(part + c + columns, col_sq, c + columns < C)
            tl.store(part + C + c + columns, weighted_sq, c + columns < C)


@triton.jit
def _of_blocks(of, partial, columns, D: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """Sums of columns over all blocks of a unit, plain and of weighted rows, added up in the type D."""
    C, blocks, part = tl.load(of + t.COLUMNS), tl.load(of + t.BLOCKS), partial + tl.load(of + t.PARTIAL)
    col_sq, weighted_sq = tl.zeros([TILE_BLOCKS, TILE_COLUMNS], D), tl.zeros([TILE_BLOCKS, TILE_COLUMNS], D)
    for start in range(0, blocks, TILE_BLOCKS):
        b = start + tl.arange(0, TILE_BLOCKS)
        mask = (b < blocks)[:, None] & (columns < C)[None, :]
        where = 2 * C * b[:, None] + columns[None, :]
        col_sq += tl.load(part + where, mask, 0.0)
        weighted_sq += tl.load(part + C + where, mask, 0.0)
    return tl.sum(col_sq, 0), tl.sum(weighted_sq, 0)


@triton.jit
def matrix_columns(
    jobs, units, members, pointers, numbers, draws, partial, kept, sums,
    A: tl.constexpr, SPLIT: tl.constexpr, PUTS: tl.constexpr, TILE_BLOCKS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a unit from the sums of its blocks, or, where rows or columns are split, from those of all ranks; and
    what they add to the sum of the squares of the update. With `PUTS` the sums, of rows too, are put where ranks add them up.
    """
    of, m, chunk = work_of(jobs, units, t.FIRST_COLUMN_JOB)
    columns = chunk * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < tl.load(of + t.COLUMNS)
    if PUTS:
        col_sq, weighted_sq = _of_blocks(of, partial, columns, tl.float64, TILE_BLOCKS, TILE_COLUMNS)
        tl.store(sums_at(of, t.COL_SQ_AT) + columns, col_sq, inside)
        tl.store(sums_at(of, t.WEIGHTED_SQ_AT) + columns, weighted_sq, inside)
        if SPLIT == t.SPLIT_ROWS and chunk == 0:
            tl.store(sums_at(of, t.ROW_SUM_AT), total(sums + tl.load(of + t.ROW_SUMS), tl.load(of + t.BLOCKS)))
    else:
        R, col = tl.load(of + t.WHOLE_ROWS), pointer_to(pointers, m, t.COL_AT, A, False) + tl.load(of + t.COL_START)
        if SPLIT is None or SPLIT == t.NEITHER:
            col_sq, weighted_sq = _of_blocks(of, partial, columns, A, TILE_BLOCKS, TILE_COLUMNS)
            mean_sq, row_sum = col_sq / R, total(sums + tl.load(of + t.ROW_SUMS), tl.load(of + t.BLOCKS))
        else:
            mean_sq = (tl.load(sums_at(of, t.COL_SQ_AT) + columns, inside, 0.0) / R).to(A)
            weighted_sq = tl.load(sums_at(of, t.WEIGHTED_SQ_AT) + columns, inside, 0.0).to(A)
            row_sum = tl.load(sums_at(of, t.ROW_SUM_AT)) if SPLIT == t.SPLIT_ROWS else 0.0
        new = moving_average(tl.load(col + columns, inside, 1.0), mean_sq, decay_rates(numbers_of(numbers, pointers, m)))
        tl.store(new_averages(col, kept, of, t.NEW_COL, SPLIT) + columns, new, inside)
        # As in _update/matrices.py: the mean last, beside large ones its ratio to a column without gradient would overflow.
        update_sq = tl.sum(tl.where(inside, weighted_sq / new, 0.0).to(tl.float64), 0)
        if SPLIT == t.SPLIT_COLUMNS:  # the update is divided by the mean of these columns, which are rows of the parameter
            tl.store(sums + tl.load(of + t.ROW_SUMS) + chunk, tl.sum(tl.where(inside, new, 0.0).to(tl.float64), 0))
        else:
            row_mean = row_sum / R.to(tl.float64)
            if chunk == 0:
                tl.store(sums + tl.load(of + t.MEAN), row_mean)
            update_sq *= row_mean
        tl.store(sums + tl.load(of + t.UNIT_UPDATE_SQ) + chunk, update_sq)


@triton.jit
def column_means(units, sums, TILE_COLUMNS: tl.constexpr):
    """Where columns are split: the mean that was yet to come, for each unit."""
    of = units + tl.program_id(0) * t.UNIT
    C = tl.load(of + t.COLUMNS)
    chunks = tl.cdiv(C, TILE_COLUMNS)
    mean = total(sums + tl.load(of + t.ROW_SUMS), chunks) / C.to(tl.float64)
    tl.store(sums + tl.load(of + t.MEAN), mean)
    update_sq = sums + tl.load(of + t.UNIT_UPDATE_SQ)
    for start in range(0, chunks, TOTAL):
        at = start + tl.arange(0, TOTAL)
        tl.store(update_sq + at, tl.load(update_sq + at, at < chunks, 0.0) * mean, at < chunks)


@triton.jit
def _copy(to, x, first, end):
    for start in range(first, end, TOTAL):
        at = start + tl.arange(0, TOTAL)
        tl.store(to + at, tl.load(x + at, at < end, 0.0), at < end)


@triton.jit
def apply_matrix(
    jobs, units, members, pointers, numbers, draws, partial, kept, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr, CAUTIOUS: tl.constexpr, CALL: tl.constexpr,
):  # fmt: skip
    """Second reads of a block of rows, and the only write of p; or how many elements agree in sign, nothing else."""
    of, m, block = work_of(jobs, units, t.FIRST_JOB)
    start, R, C, first, end = _block_of(of, block, ALIGNED, TRANSPOSED)
    own_numbers = numbers_of(numbers, pointers, m)
    p, g = pointer_to(pointers, m, t.P_AT, P, ALIGNED) + start, pointer_to(pointers, m, t.G_AT, G, ALIGNED) + start
    old_row = pointer_to(pointers, m, t.ROW_AT, A, False) + tl.load(of + t.ROW_START)
    old_col = pointer_to(pointers, m, t.COL_AT, A, ALIGNED) + size_of(of, t.COL_START, ALIGNED and not TRANSPOSED)
    row, col = new_averages(old_row, kept, of, t.NEW_ROW, SPLIT), new_averages(old_col, kept, of, t.NEW_COL, SPLIT)
    result = sums + tl.load(members + m * t.MEMBER + t.RESULT)
    scale = (tl.load(result) * tl.sqrt(tl.load(sums + tl.load(of + t.MEAN)))).to(A)
    decay = tl.load(result + 1).to(A)
    share = tl.load(result + 2).to(A) if CAUTIOUS else decay
    agreeing = tl.zeros([TILE_ROWS], tl.float64)
    for c in range(0, C, TILE_COLUMNS):
        columns = c + tl.arange(0, TILE_COLUMNS)
        col_factor = tl.rsqrt(tl.load(col + columns, columns < C, 1.0))
        for at in range(first, end, TILE_ROWS):
            rows = at + tl.arange(0, TILE_ROWS)
            mask = (rows < end)[:, None] & (columns < C)[None, :]
            where = _place(rows, columns, R, C, TRANSPOSED)
            row_factor = tl.rsqrt(tl.load(row + rows, rows < end, 1.0)) * scale
            x = tl.load(g + where, mask, 0.0).to(A)
            update = x * row_factor[:, None] * col_factor[None, :]
            noise = noise_at(draws, m, tl.load(of + t.SLICE), rows[:, None], columns[None, :], N)
            exp_avg = None if M is None else pointer_to(pointers, m, t.EXP_AVG_AT, M, ALIGNED) + start + where
            update, agree = directed(update, x, exp_avg, mask, noise, own_numbers, M, N, CAUTIOUS, CALL == t.COUNT)
            if CALL == t.COUNT:
                agreeing += tl.sum(agree.to(tl.float64), 1)
            else:
                y = tl.load(p + where, mask, 0.0).to(A)
                write_stepped(p + where, y, update, agree, share, decay, mask, noise, P, N, CAUTIOUS)
    if CALL == t.COUNT:
        tl.store(sums + tl.load(of + t.UNIT_AGREE) + block, tl.sum(agreeing, 0))
    elif SPLIT is not None:
        _copy(old_row, row, first, end)
        if block == 0:
            _copy(old_col, col, 0, C)
