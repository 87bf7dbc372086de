"""How the members of a shape class are passed to compiled functions: by which one, and as which views.

On a CPU a matrix that fits in cache is stepped in blocks of rows, in one call; a larger one in chunks; the kernels of
convolutions have functions of their own. Elsewhere a matrix is one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from adafactor_compiled._state.layout import cached, contiguous_stride, same_layout
from adafactor_compiled._state.moments import is_cautious
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update import chunks, kernels, matrices, vectors
from adafactor_compiled._update.blocks import blocking_of
from adafactor_compiled._update.chunks import step_in_chunks, step_kernels  # by name: what is compared stays one object
from adafactor_compiled._update.matrices import step_matrices

Shape = tuple[int, ...]


class Route(NamedTuple):
    function: Callable[..., Any]  # of Members, or, for what takes several passes, of a Member and a function that runs them
    passes: tuple[chunks.PassOf, ...]  # on a CPU, the passes and the sizes of what they are called with
    shape: Shape  # parameter, gradient and momentum as views
    row_shape: Shape = ()
    col_shape: Shape = ()
    transposed: bool = False  # a transposed parameter steps like its transpose with the two factors swapped

    @property
    def in_parts(self) -> bool:
        return self.function in (step_in_chunks, step_kernels)

    @property
    def in_blocks(self) -> bool:
        return self.function is step_matrices

    def ones(self, g: Tensor, i: int) -> Tensor:
        """Of member i of a call."""
        ones = matrices.ones_for(self.shape, g.dtype, g.device, i)
        assert ones is not None
        return ones

    def view(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.detach()
        if self.transposed:
            x = x.mT
        return x if x.shape == self.shape else x.view(self.shape)


@cached
def route_of(of: ShapeClass) -> Route | None:
    """None for what is better stepped without compiled calls: empty, one element, one row or column, strided."""
    if of.numel < 2 or not of.plain or of.device.type == "meta":
        return None
    strides = (of.stride, of.grad_stride)
    contiguous = all(same_layout(of.shape, x, contiguous_stride(of.shape)) for x in strides)
    if not of.factored:
        return _vector(of) if contiguous else None
    *lead, rows, columns = of.shape
    transposed = (*contiguous_stride((*lead, columns, rows))[:-2], 1, rows)
    route = None
    if contiguous and lead and math.prod(lead) > 1 and rows * columns <= kernels.MOST:
        route = _kernels(of.shape, of.device.type)
    elif 1 in (rows, columns):
        return None
    elif contiguous:
        route = _matrix(of.shape, of.device.type)
    elif all(same_layout(of.shape, x, transposed) for x in strides):
        route = _matrix((*lead, columns, rows), of.device.type)._replace(transposed=True)
    # How many elements agree in sign is known only after all of them were read: several passes would take one more.
    return None if route is not None and route.in_parts and is_cautious(of.momentum) else route


def _vector(of: ShapeClass) -> Route:
    if of.device.type != "cpu":
        shape: Shape = (1, of.numel)
    else:
        shape = chunks.vector_shape(of.numel)
    return Route(vectors.step_vectors, ((vectors.step_vectors, shape),), shape)


def _kernels(shape: Shape, device_type: str) -> Route:
    n, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    if rows == columns == 1:  # row and column are the same whole second moment
        as_vector = chunks.rows_of(n) if device_type == "cpu" else (1, n)
        return Route(vectors.step_pointwise, ((vectors.step_pointwise, as_vector),), as_vector, as_vector, as_vector)
    if device_type == "cpu":
        return Route(step_kernels, tuple(chunks.passes_of_kernels(shape)), shape, shape[:-1], shape[:-2] + shape[-1:])
    as_slices = n, rows, columns
    return Route(kernels.step_kernels, ((kernels.step_kernels, as_slices),), as_slices, (n, rows), (n, columns))


def _matrix(shape: Shape, device_type: str) -> Route:
    slices, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    lead = () if slices == 1 else (slices,)
    col_shape, block = (*lead, columns), rows
    if device_type == "cpu":
        blocking = blocking_of(shape)
        if not blocking.whole:
            passes = tuple(dict.fromkeys(chunks.passes_in_chunks(shape)))
            return Route(step_in_chunks, passes, shape, shape[:-1], shape[:-2] + shape[-1:])
        block = blocking.block
    if block == rows:
        whole: Shape = (*lead, rows, columns)
        return Route(matrices.step_small_matrices, ((matrices.step_small_matrices, whole),), whole, whole[:-1], col_shape)
    blocks = (*lead, rows // block, block, columns)
    return Route(step_matrices, ((step_matrices, blocks),), blocks, blocks[:-1], col_shape)
