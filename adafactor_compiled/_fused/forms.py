"""In which form the kernels of any device step a member: all that they can know of its shape, strides and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from adafactor_compiled._fused.pieces import COLUMNS, ROWS
from adafactor_compiled._state.layout import contiguous_stride, same_layout
from adafactor_compiled._state.shape_class import ShapeClass

DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
MATRICES, SLICES, VECTOR, TWICE = "matrices", "slices", "vector", "twice"  # the last has two copies of its second moment
MOST_OF_SLICE = 256  # elements of a slice of which many are stepped at once, as of kernels of convolutions


class Form(NamedTuple):
    kind: str
    slices: int
    rows: int
    columns: int  # or the elements of a vector
    contiguous: bool = True  # else matrices are transposes of such, and slices lie in any way


def form_of(of: ShapeClass, split: int | None, padded: Callable[[int], int] = int) -> Form | None:
    """None for what operations of torch step: subclasses, strides that no kernel knows, dtypes other than `DTYPES`, nothing.

    Args:
        of: a parameter, or a piece of one.
        split: of a piece, what ranks split; it may be empty, of what is summed it has its share nevertheless.
        padded: what a side of a slice takes in a tile.
    """
    momentum_dtype = torch.float32 if of.momentum is None else of.momentum.dtype
    if not of.plain or not {of.dtype, of.grad_dtype, momentum_dtype} <= DTYPES:
        return None
    *lead, rows, columns = of.shape if of.factored else (1, of.numel)
    slices, strides = math.prod(lead), (of.stride, of.grad_stride)
    contiguous = all(same_layout(of.shape, x, contiguous_stride(of.shape)) for x in strides)
    if split in (ROWS, COLUMNS):
        return Form(MATRICES, slices, rows, columns) if contiguous and slices else None
    if not of.numel:
        return None if split is None else Form(VECTOR, 1, 1, 0)
    if not of.factored or (slices > 1 and rows == columns == 1):
        return Form(TWICE if of.factored else VECTOR, 1, 1, of.numel) if contiguous else None
    if slices > 1 and padded(rows) * padded(columns) <= MOST_OF_SLICE:
        return Form(SLICES, slices, rows, columns, contiguous)
    transposed = (*contiguous_stride((*lead, columns, rows))[:-2], 1, rows)
    if contiguous or all(same_layout(of.shape, x, transposed) for x in strides):
        return Form(MATRICES, slices, rows, columns, contiguous)
    return None
