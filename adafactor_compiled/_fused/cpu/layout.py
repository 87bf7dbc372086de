"""Which members the kernels of a CPU step, and how each is cut into parts: all that shapes decide."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adafactor_compiled._fused.forms import MATRICES, SLICES, TWICE, VECTOR, form_of
from adafactor_compiled._fused.pieces import COLUMNS, ROWS
from adafactor_compiled._state.layout import cached, is_dense, same_layout
from adafactor_compiled._state.moments import Momentum
from adafactor_compiled._state.shape_class import ShapeClass

KINDS = {kind: i for i, kind in enumerate((MATRICES, SLICES, VECTOR, TWICE))}  # as step.cpp has them
LARGE = 262_144  # elements from which on all threads step a member: a smaller one stays in the second-level cache of one
LEAST_GROUPS, MOST_GROUPS, GROUP = 8, 64, 524_288  # of rows of a matrix; elements of a group, where it is not one of the most
BLOCK = 65_536  # elements of a block of rows, which stay in the second-level cache between two reads
ROWS_OF_BLOCK = 512  # at most, since float32 adds them up
PART = 65_536  # elements of a part of what is not in groups
PARTS = 64  # at most
LANE = 16  # slices or elements, as many as a vector has, or a multiple


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
    """None for what has no kernels here, see `form_of`."""
    form = form_of(of, split) if of.device.type == "cpu" else None
    if form is None:
        return None
    kind, slices, rows, columns, contiguous = form
    if kind in (VECTOR, TWICE):
        return _vector(KINDS[kind], columns)
    if kind == SLICES:
        return _lanes(of, slices, contiguous)
    if contiguous and (columns > 1 or split in (ROWS, COLUMNS)):
        return _matrix(slices, rows, columns)
    return _matrix(slices, columns, rows, swapped=True)  # a column alone is its transpose too


def _parts(numel: int, size: int, count: int, multiple: int = 1) -> tuple[int, int]:
    """How many parts of `count` units of `size` elements each, and how many units of a part."""
    parts = 1 if numel <= LARGE else min(PARTS, -(-numel // PART), count)
    per = max(1, -(-count // parts // multiple)) * multiple
    return max(1, -(-count // per)), per


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
    return Cut(KINDS[SLICES], False, slices, rows, columns, *_parts(of.numel, rows * columns, slices, LANE), 0, *strides)


def _matrix(slices: int, rows: int, columns: int, swapped: bool = False) -> Cut:
    least = -(-LEAST_GROUPS // slices) if rows * columns > LARGE else 1
    groups = max(1, min(MOST_GROUPS, rows // 8, max(least, rows * columns // GROUP)))
    per = max(4, -(-rows // groups // 4) * 4)
    parts = slices * max(1, -(-rows // per))
    block = min(ROWS_OF_BLOCK, per, max(4, BLOCK // max(columns, 1) // 4 * 4))
    return Cut(KINDS[MATRICES], swapped, slices, rows, columns, parts, per, block, slices, 0, 0, 0)
