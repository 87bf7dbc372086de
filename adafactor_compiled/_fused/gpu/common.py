"""What the kernels of a step on a GPU share: how they find their work, their numbers, and what is done with every element.

A kernel finds its work in tables (tables.py): which member or unit a block of threads is for, where its tensors lie, and its
`Numbers`. A unit is a slice of a matrix, or all of another member. Sums are taken in a fixed order, without atomics: replicas
and repeated runs get the same bits. P, G and M are the types of parameter, gradient and momentum (None for no momentum), A that
of the arithmetic and the state, N that which noise is drawn for (None for none). SPLIT says what ranks split, and is None for
whole parameters. All kernels of units take the same tensors, needed or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafactor_compiled._fused.gpu import tables as t
from adafactor_compiled._update import numbers, rounding

LEAST_SHARE = tl.constexpr(numbers.LEAST_SHARE)
TOTAL = tl.constexpr(256)  # how many numbers are added at once
GOLDEN = tl.constexpr(rounding.GOLDEN)
FIRST_MULTIPLIER, SECOND_MULTIPLIER = map(tl.constexpr, rounding.MULTIPLIERS)


@triton.jit
def work_of(jobs, units, first: tl.constexpr):
    """What a block of threads is for: a unit, its member, and which of the unit's blocks or chunks."""
    job = tl.program_id(0)
    of = units + tl.load(jobs + job) * t.UNIT
    return of, tl.load(of + t.OF), job - tl.load(of + first)


@triton.jit
def pointer_to(pointers, m, i: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    x = tl.load(pointers + m * t.POINTERS + i).to(tl.pointer_type(dtype))
    return tl.multiple_of(x, 16) if ALIGNED else x


@triton.jit
def sums_at(of, column: tl.constexpr):
    """Where ranks add up what a row of a table says."""
    return tl.load(of + column).to(tl.pointer_type(tl.float64))


@triton.jit
def size_of(table, i, ALIGNED: tl.constexpr):
    x = tl.load(table + i)
    return tl.multiple_of(x, 16) if ALIGNED else x


@triton.jit
def numbers_of(numbers, pointers, m):
    """Where those of a member lie."""
    return numbers + tl.load(pointers + m * t.POINTERS + t.NUMBERS_AT) * t.NUMBERS


@triton.jit
def decay_rates(numbers):
    """What a moving average takes."""
    return tl.load(numbers + t.BETA2), tl.load(numbers + t.ONE_MINUS_BETA2), tl.load(numbers + t.EPS)


@triton.jit
def moving_average(average, mean_sq, rates):
    beta2, rest, eps = rates
    return average * beta2 + (mean_sq + eps) * rest


@triton.jit
def new_averages(averages, kept, of, place: tl.constexpr, SPLIT: tl.constexpr):
    """Where new averages of a unit lie until its elements are stepped: where old ones do, or, of pieces, in what is kept."""
    return averages if SPLIT is None else kept + tl.multiple_of(tl.load(of + place), 16)


@triton.jit
def total(x, count):
    total = tl.zeros([TOTAL], tl.float64)
    for start in range(0, count, TOTAL):
        at = start + tl.arange(0, TOTAL)
        total += tl.load(x + at, at < count, 0.0)
    return tl.sum(total, 0)


@triton.jit
def measure(param_sq, update_sq, numel, numbers, pointers, m, A: tl.constexpr, COUNT: tl.constexpr):
    """Writes both RMS, but where elements are only counted; gives what the update is multiplied by, and what share of the
    parameter decays, in float64.
    """
    rms, update_rms = tl.sqrt(param_sq / numel), tl.sqrt(update_sq / numel)
    if not COUNT:
        tl.store(pointer_to(pointers, m, t.RMS_AT, A, False), rms.to(A))
        tl.store(pointer_to(pointers, m, t.UPDATE_RMS_AT, A, False), update_rms.to(A))
    least = tl.load(numbers + t.MIN_SCALE).to(tl.float64)
    scale = tl.maximum(rms, least, propagate_nan=tl.PropagateNan.ALL)
    alpha = tl.load(numbers + t.LR).to(tl.float64) * tl.where(tl.load(numbers + t.SCALE_PARAMETER) > 0, scale, 1.0)
    threshold = tl.load(numbers + t.CLIP).to(tl.float64)
    divisor = tl.maximum(update_rms / threshold, 1.0, propagate_nan=tl.PropagateNan.ALL)
    divisor = tl.where(threshold == float("inf"), 1.0, divisor)
    decay = tl.load(numbers + t.WEIGHT_DECAY).to(tl.float64) * tl.where(tl.load(numbers + t.DECAY_BY_LR) > 0, alpha, 1.0)
    return tl.load(numbers + t.SIGN).to(tl.float64) * alpha / divisor, decay


@triton.jit
def put(members, sums, SPLIT: tl.constexpr, CALL: tl.constexpr):
    """Puts of each piece where ranks add it up: what it has summed but for rows and columns, or how many elements agree."""
    of = members + tl.program_id(0) * t.MEMBER
    first, count = sums + tl.load(of + t.PARAM_SQ), tl.load(of + t.PARAM_SQ_COUNT)
    if CALL == t.COUNT:
        tl.store(sums_at(of, t.AGREE_AT), total(first + count, count))
    else:
        tl.store(sums_at(of, t.SUMS_AT), total(first, count))
        if SPLIT == t.NEITHER:
            update_sq = total(sums + tl.load(of + t.UPDATE_SQ), tl.load(of + t.UPDATE_SQ_COUNT))
            tl.store(sums_at(of, t.SUMS_AT) + t.SUMMED_UPDATE_SQ, update_sq)


@triton.jit
def finish(
    members, pointers, numbers, sums,
    A: tl.constexpr, SPLIT: tl.constexpr, CAUTIOUS: tl.constexpr, CALL: tl.constexpr,
):  # fmt: skip
    """Of each member, from its sums or those of all ranks, both RMS, the scale of its update and its decay; where elements have
    been counted, also what share of them agrees in sign with their gradient.
    """
    m = tl.program_id(0)
    of = members + m * t.MEMBER
    first, count = sums + tl.load(of + t.PARAM_SQ), tl.load(of + t.PARAM_SQ_COUNT)
    param_sq = total(first, count) if SPLIT is None else tl.load(sums_at(of, t.SUMS_AT))
    if SPLIT == t.NEITHER:
        update_sq = tl.load(sums_at(of, t.SUMS_AT) + t.SUMMED_UPDATE_SQ)
    else:
        update_sq = total(sums + tl.load(of + t.UPDATE_SQ), tl.load(of + t.UPDATE_SQ_COUNT))
    numel, result = tl.load(of + t.NUMEL).to(tl.float64), sums + tl.load(of + t.RESULT)
    own_numbers = numbers_of(numbers, pointers, m)
    scale, decay = measure(param_sq, update_sq, numel, own_numbers, pointers, m, A, CALL == t.COUNT)
    tl.store(result, scale)
    tl.store(result + 1, decay)
    if CAUTIOUS and CALL != t.COUNT:
        agreeing = total(first + count, count) if SPLIT is None else tl.load(sums_at(of, t.AGREE_AT))
        tl.store(result + 2, tl.maximum(agreeing / numel, LEAST_SHARE))


# Stochastic rounding, as in rounding.py.


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST_MULTIPLIER
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND_MULTIPLIER
    return x ^ ((x >> 15) & 0x1FFFF)


@triton.jit
def _bits(draws, axis: tl.constexpr, places):
    key = _mixed(tl.load(draws + axis) + tl.load(draws + 6) * GOLDEN)
    return (places.to(tl.int32) + tl.load(draws + 3 + axis)) * GOLDEN + key


@triton.jit
def _along(draws, axis: tl.constexpr, places, slices, D: tl.constexpr):
    """Scale and shift of rows (axis 1) or columns (2) in their slices."""
    bits = _mixed(_bits(draws, axis, places) ^ _mixed(_bits(draws, 0, slices)))
    cut: tl.constexpr = 16 if tl.bfloat16 == D else 13
    scale = tl.minimum(tl.maximum((bits & 2047) - 1024, -1020), 1020).to(tl.float32) * 0.015625
    shift = (((bits >> (33 - cut)) * 2).to(tl.float32) + 0.5) * (1.0 / (1 << cut))
    return scale, shift


@triton.jit
def noise_at(draws, m, slices, rows, columns, N: tl.constexpr):
    """Of elements, by their places; what has a smaller shape is broadcast."""
    noise = 0.0
    if N is not None:
        of = draws + m * t.DRAWS
        row_scale, row_shift = _along(of, 1, rows, slices, N)
        column_scale, column_shift = _along(of, 2, columns, slices, N)
        noise = row_scale * column_scale + (row_shift + column_shift)
    return noise


@triton.jit
def _rounded(x, noise, D: tl.constexpr):
    fraction = noise - tl.floor(noise + 0.5)
    digits: tl.constexpr = 7 if tl.bfloat16 == D else 10
    shifted = x * (0.75 * (1 << (23 - digits)))
    spacing = (x * (0.75 / (1 << digits)) + shifted) - shifted
    if tl.float16 == D:
        spacing = tl.maximum(tl.abs(spacing), 5.9604644775390625e-08)
    large = spacing * 12582912.0
    result = ((x + fraction * spacing) + large) - large
    return tl.where(tl.abs(x) < 65504.0, result, x) if tl.float16 == D else result


@triton.jit
def _write(to, value, mask, noise, D: tl.constexpr, N: tl.constexpr):
    if N is not None and (tl.bfloat16 == D or tl.float16 == D):
        value = _rounded(value.to(tl.float32), noise, D)
    tl.store(to, value.to(D), mask)


# What the elements of all members have in common.


@triton.jit
def directed(
    update, x, exp_avg, mask, noise, numbers, M: tl.constexpr, N: tl.constexpr, CAUTIOUS: tl.constexpr, COUNT: tl.constexpr
):
    """The update, or the new momentum, which is written, but where elements are only counted; and which elements of it agree in
    sign with their gradient, where it is cautious.
    """
    if M is not None:
        share = tl.load(numbers + t.ONE_MINUS_BETA1)
        update = tl.load(exp_avg, mask, 0.0).to(update.dtype) * tl.load(numbers + t.BETA1) + update * share
        if not COUNT:
            _write(exp_avg, update, mask, noise, M, N)
    agree = update
    if CAUTIOUS:
        sign = tl.load(numbers + t.SIGN)
        agree = (((update > 0) & (x * sign > 0)) | ((update < 0) & (x * sign < 0))).to(update.dtype)
    return update, agree


@triton.jit
def write_stepped(
    p, y, update, agree, share, decay, mask, noise, P: tl.constexpr, N: tl.constexpr, CAUTIOUS: tl.constexpr
):  # fmt: skip
    """Writes elements y with their update, scaled by the share of those that agree."""
    if CAUTIOUS:
        update *= agree / share
    _write(p, y - (y * decay + update), mask, noise, P, N)
