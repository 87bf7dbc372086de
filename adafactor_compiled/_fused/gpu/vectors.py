"""Parameters whose second moment is as large as they are. What a block of threads can hold takes one launch, others three."""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor_compiled._fused.gpu import tables as t
from adafactor_compiled._fused.gpu.common import (
    LEAST_SHARE,
    decay_rates,
    directed,
    measure,
    moving_average,
    noise_at,
    numbers_of,
    pointer_to,
    size_of,
    work_of,
    write_stepped,
)


@triton.jit
def _scaled_update(x, new, scale, TWICE: tl.constexpr):
    """Where the square of a gradient overflows 0, or NaN where that makes a row infinite."""
    update = x * (tl.rsqrt(new) * scale)
    return update + (new - new) if TWICE else update


@triton.jit
def step_vectors(
    jobs, units, members, pointers, numbers, draws, partial, kept, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    TWICE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, CAUTIOUS: tl.constexpr, CALL: tl.constexpr,
):  # fmt: skip
    """A chunk of a vector; with `WHOLE` all of it, and no other launch is needed. `TWICE`: two copies of the second moment."""
    of, m, chunk = work_of(jobs, units, t.FIRST_JOB)
    n, own_numbers = size_of(of, t.ROWS, ALIGNED), numbers_of(numbers, pointers, m)
    at = chunk * TILE + tl.arange(0, TILE)
    mask = at < n
    p, v = pointer_to(pointers, m, t.P_AT, P, ALIGNED) + at, pointer_to(pointers, m, t.ROW_AT, A, ALIGNED) + at
    x = tl.load(pointer_to(pointers, m, t.G_AT, G, ALIGNED) + at, mask, 0.0).to(A)
    y = tl.load(p, mask, 0.0).to(A)
    new = moving_average(tl.load(v, mask, 1.0), x * x, decay_rates(own_numbers))
    if WHOLE or CALL == t.STATISTICS:
        SUM: tl.constexpr = tl.float64 if WHOLE else A
        update = _scaled_update(x, new, 1.0, TWICE)
        param_sq = tl.sum((y * y).to(SUM), 0).to(tl.float64)
        update_sq = tl.sum(tl.where(mask, update * update, 0.0).to(SUM), 0).to(tl.float64)
    if CALL == t.STATISTICS:
        tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + chunk, param_sq)
        tl.store(sums + tl.load(of + t.UNIT_UPDATE_SQ) + chunk, update_sq)
    else:
        result = sums + tl.load(members + m * t.MEMBER + t.RESULT)
        if WHOLE:
            scale, decay = measure(param_sq, update_sq, n.to(tl.float64), own_numbers, pointers, m, A, False)
        else:
            scale, decay = tl.load(result), tl.load(result + 1)
        # A vector is one row; of two copies each element is a slice of its own.
        noise = noise_at(draws, m, at if TWICE else at * 0, at * 0, at * 0 if TWICE else at, N)
        update = _scaled_update(x, new, scale.to(A), TWICE)
        exp_avg = None if M is None else pointer_to(pointers, m, t.EXP_AVG_AT, M, ALIGNED) + at
        update, agree = directed(update, x, exp_avg, mask, noise, own_numbers, M, N, CAUTIOUS, CALL == t.COUNT)
        if CALL == t.COUNT:
            tl.store(sums + tl.load(of + t.UNIT_AGREE) + chunk, tl.sum(agree.to(tl.float64), 0))
        else:
            share = 1.0
            if CAUTIOUS and WHOLE:
                share = tl.maximum(tl.sum(agree.to(tl.float64), 0) / n.to(tl.float64), LEAST_SHARE).to(A)
            elif CAUTIOUS:
                share = tl.load(result + 2).to(A)
            write_stepped(p, y, update, agree, share, decay.to(A), mask, noise, P, N, CAUTIOUS)
            tl.store(v, new, mask)
            if TWICE:
                tl.store(pointer_to(pointers, m, t.COL_AT, A, ALIGNED) + at, new, mask)
