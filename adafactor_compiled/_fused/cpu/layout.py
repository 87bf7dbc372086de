"""Which members the kernels of a CPU step, and how each is cut into parts: all that shapes decide."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from adafactor_compiled._fused.pieces import COLUMNS, ROWS
from adafactor_compiled._state.layout import cached, contiguous_stride, is_dense, same_layout
from adafactor_compiled._state.moments import Momentum
from adafactor_compiled._state.shape_class import ShapeClass

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MATRIX, LANES, VECTOR, TWICE = range(4)  # kinds of members, as step.cpp has them
LARGE = 262_144  # elements from which on all threads step a member: a smaller one stays in the second-level cache of one
LEAST_GROUPS, MOST_GROUPS, GROUP = 8, 64, 524_288  # of rows of a matrix; elements of a group, where it is not one of the most
BLOCK = 65_536  # elements of a block of rows, which stay in the second-level cache between two reads
ROWS_OF_BLOCK = 512  # at most, since float32 adds them up
PART = 65_536  # elements of a part of what is not in groups
PARTS = 64  # at most
MOST_OF_SLICE, LANE = 256, 16  # elements of a slice that are worth lanes; as many as a vector has, or a multiple


class Kernels(NamedTuple):
    """What a build is for."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    momentum: Momentum | None
    rounding: bool


class Cut(NamedTuple):
    """A member: the columns of the table that step.cpp reads, but the first."""

    kind: int
    swapped: bool  # whether its rows are the kernels' columns
    slices: int
    rows: int
    columns: int
    parts: int
    per: int  # rows of a slice, slices or elements of a part
    block: int
    inner: int
    outer_stride: int
    row_stride: int
    column_stride: int

    @property
    def large(self) -> bool:
        """Whether all threads step it."""
        return self.parts > 1 and self.slices * self.rows * self.columns > LARGE


@cached
def kernels_of(of: ShapeClass, split: int | None = None) -> Kernels | None:
    """None for what has no kernels here, see `cut_of`."""
    return None if cut_of(of, split) is None else _same(Kernels(of.dtype, of.grad_dtype, of.momentum, of.rounding))


@cached
def _same(kernels: Kernels) -> Kernels:
    """One object for equal ones: they are told apart by `id`, which is quicker."""
    return kernels


@cached
def cut_of(of: ShapeClass, split: int | None = None) -> Cut | None:
    """None for what eager operations step: subclasses, strides that no kernel knows, dtypes other than `DTYPES`, nothing.

    Args:
        of: a parameter, or a piece of one.
        split: of a piece, what ranks split; it may be empty, of what is summed it has its share nevertheless.
    """
    momentum_dtype = torch.float32 if of.momentum is None else of.momentum.dtype
    if of.device.type != "cpu" or not of.plain or not {of.dtype, of.grad_dtype, momentum_dtype} <= set(DTYPES):
        return None
    strides = (of.stride, of.grad_stride)
    contiguous = all(same_layout(of.shape, x, contiguous_stride(of.shape)) for x in strides)
    if split in (ROWS, COLUMNS):
        *lead, rows, columns = of.shape
        slices = math.prod(lead)
        return _matrix(slices, rows, columns) if contiguous and slices else None
    if not of.numel:
        return None if split is None else Cut(VECTOR, False, 1, 1, 0, 1, LANE, 0, 0, 0, 0, 0)
    if not of.factored:
        return _vector(VECTOR, of.numel) if contiguous else None
    *lead, rows, columns = of.shape
    slices = math.prod(lead)
    if slices > 1 and rows == columns == 1:
        return _vector(TWICE, slices) if contiguous else None
    if slices > 1 and rows * columns <= MOST_OF_SLICE:
        return _lanes(of, slices, contiguous)
    transposed = (*contiguous_stride((*lead, columns, rows))[:-2], 1, rows)
    if contiguous and columns > 1:
        return _matrix(slices, rows, columns)
    if all(same_layout(of.shape, x, transposed) for x in strides):  # a column alone is its transpose too
        return _matrix(slices, columns, rows, swapped=True)
    return None


def _parts(numel: int, size: int, count: int, multiple: int = 1) -> tuple[int, int]:
    """How many parts of `count` units of `size` elements each, and how many units of a part."""
    parts = 1 if numel <= LARGE else min(PARTS, -(-numel // PART), count)
    per = -(-count // parts)
    per = -(-per // multiple) * multiple
    return -(-count // per), per


def _vector(kind: int, numel: int) -> Cut:
    return Cut(kind, False, 1, 1, numel, *_parts(numel, 1, numel, LANE), 0, 0, 0, 0, 0)


def _lanes(of: ShapeClass, slices: int, contiguous: bool) -> Cut | None:
    """Slices in lanes that lie one behind the other, or, in four dimensions, side by side."""
    rows, columns = of.shape[-2:]
    strides = (slices, 0, 0, 0)
    if not contiguous:
        if len(of.shape) != 4 or not same_layout(of.shape, of.stride, of.grad_stride) or not is_dense(of.shape, of.stride):
            return None
        if of.stride[1] != 1 or of.shape[1] == 1:
            return None
        strides = (of.shape[1], of.stride[0], of.stride[2], of.stride[3])
    return Cut(LANES, False, slices, rows, columns, *_parts(of.numel, rows * columns, slices, LANE), 0, *strides)


def _matrix(slices: int, rows: int, columns: int, swapped: bool = False) -> Cut:
    least = -(-LEAST_GROUPS // slices) if rows * columns > LARGE else 1
    groups = max(1, min(MOST_GROUPS, rows // 8, max(least, rows * columns // GROUP)))
    per = max(4, -(-rows // groups // 4) * 4)
    parts = slices * max(1, -(-rows // per))
    block = min(ROWS_OF_BLOCK, per, max(4, BLOCK // max(columns, 1) // 4 * 4))
    return Cut(MATRIX, swapped, slices, rows, columns, parts, per, block, slices, 0, 0, 0)
