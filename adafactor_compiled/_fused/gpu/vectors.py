"""Parameters whose second moment is as large as they are. What a block of threads can hold takes one launch, others three."""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor_compiled._fused.gpu import tables as t
from adafactor_compiled._fused.gpu.common import (
    LEAST_SHARE,
    agreement_of,
    decay_rates,
    measure,
    moving_average,
    noise_at,
    number_of,
    pointer_to,
    size_of,
    with_momentum,
    write,
)


@triton.jit
def scaled_update(x, new, scale, TWICE: tl.constexpr):
    """Where the square of a gradient overflows 0, or NaN where that makes a row infinite."""
    update = x * (tl.rsqrt(new) * scale)
    return update + (new - new) if TWICE else update


@triton.jit
def vector_sums(
    jobs, units, pointers, numbers, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, TILE: tl.constexpr, TWICE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """First reads of a chunk of a vector; of a unit, rows are the elements and `t.PER` is `TILE`."""
    job = tl.program_id(0)
    of = units + tl.load(jobs + job) * t.UNIT
    m, n, chunk = tl.load(of + t.OF), size_of(of, t.ROWS, ALIGNED), job - tl.load(of + t.FIRST_JOB)
    at = chunk * TILE + tl.arange(0, TILE)
    mask = at < n
    x = tl.load(pointer_to(pointers, m, t.G_AT, G, ALIGNED) + at, mask, 0.0).to(A)
    y = tl.load(pointer_to(pointers, m, t.P_AT, P, ALIGNED) + at, mask, 0.0).to(A)
    beta2, rest, eps = decay_rates(numbers, pointers, m)
    old = tl.load(pointer_to(pointers, m, t.ROW_AT, A, ALIGNED) + at, mask, 1.0)
    new = moving_average(old, x * x, beta2, rest, eps)
    tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + chunk, tl.sum(y * y, 0).to(tl.float64))
    update = scaled_update(x, new, 1.0, TWICE)
    tl.store(sums + tl.load(of + t.UNIT_UPDATE_SQ) + chunk, tl.sum(tl.where(mask, update * update, 0.0), 0).to(tl.float64))


@triton.jit
def apply_vector(
    jobs, units, members, pointers, numbers, draws, sums,
    P: tl.constexpr, G: tl.constexpr, A: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    TWICE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    ROUNDING: tl.constexpr, CAUTIOUS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A chunk of a vector; with `WHOLE` all of it, and no other launch is needed. `TWICE`: two copies of the second moment."""
    job = tl.program_id(0)
    of = units + tl.load(jobs + job) * t.UNIT
    m, n, chunk = tl.load(of + t.OF), size_of(of, t.ROWS, ALIGNED), job - tl.load(of + t.FIRST_JOB)
    at = chunk * TILE + tl.arange(0, TILE)
    mask = at < n
    p, v = pointer_to(pointers, m, t.P_AT, P, ALIGNED) + at, pointer_to(pointers, m, t.ROW_AT, A, ALIGNED) + at
    x = tl.load(pointer_to(pointers, m, t.G_AT, G, ALIGNED) + at, mask, 0.0).to(A)
    y = tl.load(p, mask, 0.0).to(A)
    beta2, rest, eps = decay_rates(numbers, pointers, m)
    new = moving_average(tl.load(v, mask, 1.0), x * x, beta2, rest, eps)
    of_member = members + m * t.MEMBER
    if WHOLE:
        update = scaled_update(x, new, 1.0, TWICE)
        update_sq = tl.sum(tl.where(mask, update * update, 0.0).to(tl.float64), 0)
        scale, decay = measure(tl.sum((y * y).to(tl.float64), 0), update_sq, n, numbers, pointers, m, A, False)
    else:
        result = sums + tl.load(of_member + t.RESULT)
        scale, decay = tl.load(result), tl.load(result + 1)
    scale, decay, sign = scale.to(A), decay.to(A), number_of(numbers, pointers, m, t.SIGN)
    update = scaled_update(x, new, scale, TWICE)
    noise = decay
    if ROUNDING and not COUNT:
        # A vector is one row; of two copies each element is a slice of its own.
        noise = noise_at(draws, m, at if TWICE else at * 0, at * 0, at * 0 if TWICE else at, N)
    if M is not None:
        exp_avg = pointer_to(pointers, m, t.EXP_AVG_AT, M, ALIGNED) + at
        update = with_momentum(exp_avg, update, mask, noise, numbers, pointers, m, M, ROUNDING, COUNT)
    if CAUTIOUS:
        agree = tl.where(mask, agreement_of(update, x, sign), 0.0)
        if COUNT:
            tl.store(sums + tl.load(of + t.UNIT_PARAM_SQ) + chunk, tl.sum(agree.to(tl.float64), 0))
        elif WHOLE:
            share = tl.sum(agree.to(tl.float64), 0) / n.to(tl.float64)
            update *= agree / tl.maximum(share, LEAST_SHARE).to(A)
        else:
            update *= agree / tl.load(result + 2).to(A)
    if not COUNT:
        write(p, y - (y * decay + update), mask, noise, P, ROUNDING)
        tl.store(v, new, mask)
        if TWICE:
            tl.store(pointer_to(pointers, m, t.COL_AT, A, ALIGNED) + at, new, mask)
