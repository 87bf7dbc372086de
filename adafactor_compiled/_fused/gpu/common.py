"""What the kernels of a step on a GPU share: how they find their work, their numbers, and what is done with every element.

A kernel finds its work in tables (tables.py): which member or unit a block of threads is for, where its tensors lie, and its
`Numbers`. A unit is a slice of a matrix, or all of another member. Sums are taken in a fixed order, without atomics: replicas
and repeated runs get the same bits. P, G and M are the types of parameter, gradient and momentum (None for no momentum), A that
of the arithmetic and the state.
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
def number_of(numbers, pointers, m, i: tl.constexpr):
    return tl.load(numbers + tl.load(pointers + m * t.POINTERS + t.NUMBERS_AT) * t.NUMBERS + i)


@triton.jit
def decay_rates(numbers, pointers, m):
    """What a moving average takes."""
    rest, eps = number_of(numbers, pointers, m, t.ONE_MINUS_BETA2), number_of(numbers, pointers, m, t.EPS)
    return number_of(numbers, pointers, m, t.BETA2), rest, eps


@triton.jit
def moving_average(average, mean_sq, beta2, rest, eps):
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
def copy(to, x, first, end):
    for start in range(first, end, TOTAL):
        at = start + tl.arange(0, TOTAL)
        tl.store(to + at, tl.load(x + at, at < end, 0.0), at < end)


@triton.jit
def measure(param_sq, update_sq, numel, numbers, pointers, m, A: tl.constexpr, COUNT: tl.constexpr):
    """Writes both RMS, but where elements are only counted; gives what the update is multiplied by, and what share of the
    parameter decays, in float64.
    """
    n = numel.to(tl.float64)
    rms, update_rms = tl.sqrt(param_sq / n), tl.sqrt(update_sq / n)
    if not COUNT:
        tl.store(pointer_to(pointers, m, t.RMS_AT, A, False), rms.to(A))
        tl.store(pointer_to(pointers, m, t.UPDATE_RMS_AT, A, False), update_rms.to(A))
    least = number_of(numbers, pointers, m, t.MIN_SCALE).to(tl.float64)
    scale = tl.where(
        number_of(numbers, pointers, m, t.SCALE_PARAMETER) > 0, tl.maximum(rms, least, propagate_nan=tl.PropagateNan.ALL), 1.0
    )
    alpha = number_of(numbers, pointers, m, t.LR).to(tl.float64) * scale
    threshold = number_of(numbers, pointers, m, t.CLIP).to(tl.float64)
    divisor = tl.maximum(update_rms / threshold, 1.0, propagate_nan=tl.PropagateNan.ALL)
    divisor = tl.where(threshold == float("inf"), 1.0, divisor)
    decay = number_of(numbers, pointers, m, t.WEIGHT_DECAY).to(tl.float64)
    decay *= tl.where(number_of(numbers, pointers, m, t.DECAY_BY_LR) > 0, alpha, 1.0)
    return number_of(numbers, pointers, m, t.SIGN).to(tl.float64) * alpha / divisor, decay


@triton.jit
def put(members, sums, SPLIT: tl.constexpr, COUNT: tl.constexpr):
    """Puts of each piece where ranks add it up: what it has summed but for rows and columns, or how many elements agree."""
    of = members + tl.program_id(0) * t.MEMBER
    first = total(sums + tl.load(of + t.PARAM_SQ), tl.load(of + t.PARAM_SQ_COUNT))
    if COUNT:
        tl.store(sums_at(of, t.AGREE_AT), first)
    else:
        tl.store(sums_at(of, t.SUMS_AT), first)
        if SPLIT == t.NEITHER:
            update_sq = total(sums + tl.load(of + t.UPDATE_SQ), tl.load(of + t.UPDATE_SQ_COUNT))
            tl.store(sums_at(of, t.SUMS_AT) + t.SUMMED_UPDATE_SQ, update_sq)


@triton.jit
def finish(members, pointers, numbers, sums, A: tl.constexpr, SPLIT: tl.constexpr, COUNT: tl.constexpr):
    """Of each member, from its sums or those of all ranks, both RMS, the scale of its update and its decay."""
    m = tl.program_id(0)
    of = members + m * t.MEMBER
    if SPLIT is None:
        param_sq = total(sums + tl.load(of + t.PARAM_SQ), tl.load(of + t.PARAM_SQ_COUNT))
    else:
        param_sq = tl.load(sums_at(of, t.SUMS_AT))
    if SPLIT == t.NEITHER:
        update_sq = tl.load(sums_at(of, t.SUMS_AT) + t.SUMMED_UPDATE_SQ)
    else:
        update_sq = total(sums + tl.load(of + t.UPDATE_SQ), tl.load(of + t.UPDATE_SQ_COUNT))
    scale, decay = measure(param_sq, update_sq, tl.load(of + t.NUMEL), numbers, pointers, m, A, COUNT)
    result = sums + tl.load(of + t.RESULT)
    tl.store(result, scale)
    tl.store(result + 1, decay)


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
def noise_at(draws, m, slices, rows, columns, D: tl.constexpr):
    """Of elements, by their places; what has a smaller shape is broadcast."""
    of = draws + m * t.DRAWS
    row_scale, row_shift = _along(of, 1, rows, slices, D)
    column_scale, column_shift = _along(of, 2, columns, slices, D)
    return row_scale * column_scale + (row_shift + column_shift)


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
def write(to, value, mask, noise, D: tl.constexpr, ROUNDING: tl.constexpr):
    if ROUNDING and (tl.bfloat16 == D or tl.float16 == D):
        value = _rounded(value.to(tl.float32), noise, D)
    tl.store(to, value.to(D), mask)


# What the elements of all members have in common.


@triton.jit
def with_momentum(
    exp_avg, update, mask, noise, numbers, pointers, m, M: tl.constexpr, ROUNDING: tl.constexpr, COUNT: tl.constexpr
):
    """The new momentum; written, but where elements are only counted."""
    before = tl.load(exp_avg, mask, 0.0).to(update.dtype)
    share = number_of(numbers, pointers, m, t.ONE_MINUS_BETA1)
    new = before * number_of(numbers, pointers, m, t.BETA1) + update * share
    if not COUNT:
        write(exp_avg, new, mask, noise, M, ROUNDING)
    return new


@triton.jit
def agreement_of(update, x, sign):
    return (((update > 0) & (x * sign > 0)) | ((update < 0) & (x * sign < 0))).to(update.dtype)


@triton.jit
def share(members, sums, SPLIT: tl.constexpr):
    """Of each member, the share of its elements that agree in sign with their gradient: its third result.

    How many agree stands where the squares of the parameter stood, or where ranks have added it up.
    """
    of = members + tl.program_id(0) * t.MEMBER
    if SPLIT is None:
        count = total(sums + tl.load(of + t.PARAM_SQ), tl.load(of + t.PARAM_SQ_COUNT))
    else:
        count = tl.load(sums_at(of, t.AGREE_AT))
    least = tl.maximum(count / tl.load(of + t.NUMEL).to(tl.float64), LEAST_SHARE)
    tl.store(sums + tl.load(of + t.RESULT) + 2, least)
