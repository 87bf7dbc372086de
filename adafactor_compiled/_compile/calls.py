"""The calls of compiled graphs that a step makes: some members of a shape class each, as the views that its graph is for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from adafactor_compiled._state.layout import cached, contiguous_stride, same_layout
from adafactor_compiled._state.moments import Momentum
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.members import LISTS, Members

Shape = tuple[int, ...]

K = 4  # members of a call: guards and the call itself take a small member as long as its step; code grows with each
LONG_SUM = 4096  # elements, at most, of a sum that Inductor makes a plain loop of
LEAST_ROW, EXACT_SUM = 64, 512  # of the rows of a long vector: float32 adds them up, without vector instructions one by one
BLOCK_NUMEL = 73_728  # a block of rows stays in the second-level cache of a CPU between two reads
FEW_ROWS = 8  # the least of a block, or a matrix is rather one
SMALL_NUMEL = 65_536  # up to here it is


class View(NamedTuple):
    """How members of a class are passed: as vectors, perhaps in rows for their sums, or as matrices, perhaps in blocks."""

    shape: Shape  # parameter, gradient and momentum
    own: Shape  # see `Members`
    shared: Shape | None  # None of a second moment that is kept whole
    twins: bool = False
    transposed: bool = False


class Graph(NamedTuple):
    """What is compiled once: all that its code depends on. Other sizes of the same magnitudes are data."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    momentum: Momentum | None
    rounding: bool
    k: int  # members of a call
    sizes: Shape  # magnitudes of the sizes of a member
    slices: bool  # whether the first size is that of slices, not of blocks
    factored: bool
    twins: bool
    transposed: bool


class Call(NamedTuple):
    graph: Graph
    shape_class: ShapeClass
    positions: Sequence[int]  # its members, by their positions among the entries of a step


def calls_of(classes: Iterable[tuple[ShapeClass, Sequence[int]]]) -> list[Call]:
    """The calls that step these classes, each of which has a view."""
    calls = []
    for of, positions in classes:
        whole = len(positions) - len(positions) % K
        sizes = [(start, K) for start in range(0, whole, K)] + [(start, 1) for start in range(whole, len(positions))]
        calls += [Call(graph_of(of, k), of, positions[start : start + k]) for start, k in sizes]
    return calls


@cached
def graph_of(of: ShapeClass, k: int) -> Graph:
    view = view_of(of)
    assert view is not None
    slices = view.shared is not None and len(view.shared) > 1
    sizes = tuple(map(magnitude, view.shape))
    of_class = of.device, of.dtype, of.grad_dtype, of.momentum, of.rounding
    return Graph(*of_class, k, sizes, slices, view.shared is not None, view.twins, view.transposed)


def magnitude(size: int) -> int:
    """What a graph depends on of a size: 1 is none to Inductor, and of long sums it makes other loops."""
    return min(size, 2 + (size > LONG_SUM))


def members_in(call: Call, members: Members) -> Members:
    """The members of a call as its graph takes them."""
    view = view_of(call.shape_class)
    assert view is not None
    seen = members.transposes() if view.transposed else members
    shapes = (view.shape, view.shape, view.own, view.shared or (), view.own, view.shape)
    views = {
        name: [x if x.shape == shape else x.view(shape) for x in getattr(seen, name)]
        for name, shape in zip(LISTS, shapes, strict=True)
    }
    return seen._replace(**views)  # type: ignore[arg-type]


@cached
def view_of(of: ShapeClass) -> View | None:
    """None for what is better stepped without compiled calls.

    That is what is empty, one element, one row or column, or strided; and on a CPU the kernels of convolutions, of whose short
    rows Inductor makes slow loops.
    """
    if of.numel < 2 or not of.plain or of.device.type == "meta":
        return None
    strides = (of.stride, of.grad_stride)
    contiguous = all(same_layout(of.shape, x, contiguous_stride(of.shape)) for x in strides)
    if not of.factored or of.is_pointwise:
        as_vector = _rows_of(of.numel)
        return View(as_vector, as_vector, None, twins=of.is_pointwise) if contiguous else None
    *lead, rows, columns = of.shape
    slices = math.prod(lead)
    if 1 in (rows, columns) or (slices > 1 and of.device.type == "cpu" and min(rows, columns) < FEW_ROWS):
        return None
    transposed = (*contiguous_stride((*lead, columns, rows))[:-2], 1, rows)
    if contiguous:
        return _matrix(slices, rows, columns, of.device.type == "cpu")
    if all(same_layout(of.shape, x, transposed) for x in strides):
        return _matrix(slices, columns, rows, of.device.type == "cpu")._replace(transposed=True)
    return None


def _matrix(slices: int, rows: int, columns: int, on_cpu: bool) -> View:
    if slices > 1:
        return View((slices, rows, columns), (slices, rows), (slices, columns))
    most = max(2 * FEW_ROWS, BLOCK_NUMEL // columns)
    block = max(x for x in range(1, min(most, rows) + 1) if rows % x == 0)
    if not on_cpu or rows * columns <= SMALL_NUMEL or not FEW_ROWS <= block < rows:
        return View((rows, columns), (rows,), (columns,))
    return View((rows // block, block, columns), (rows // block, block), (columns,))


@cached
def _rows_of(numel: int) -> Shape:
    """A long vector cut into equal rows, best of `EXACT_SUM` elements at most; a prime number of elements stays one."""
    of_rows = [d for d in range(LONG_SUM, 1, -1) if numel % d == 0] if numel > LONG_SUM else []
    if not of_rows:
        return (numel,)
    columns = next((d for d in of_rows if LEAST_ROW <= d <= EXACT_SUM), of_rows[0])
    return numel // columns, columns
