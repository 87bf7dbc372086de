"""Which calls step a shape class. The order in which they go through it is the one choice that depends on the device.

- On a CPU: depth-first, one matrix after the other. A matrix that fits in cache is then read from memory once, although a
  step reads it twice. Contiguous matrices, of whatever shapes, are gone through as one class, and so are short vectors, since
  a class costs as much as a small one of them.
- Elsewhere (CUDA): breadth-first, k members in each operation. Launches are dear there and caches small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled import _depth_first, _eager, _elementwise, _unrolled
from adafactor_compiled._compile import Call, Pass, compiled, pass_of, size_variant
from adafactor_compiled._depth_first import draws_from, writable
from adafactor_compiled._direct import Direct
from adafactor_compiled._numbers import Numbers
from adafactor_compiled._passes import LayOut, Members, Runner, step_class
from adafactor_compiled._recorded import Recorded
from adafactor_compiled._rounding import DRAWS, SWAPPED
from adafactor_compiled._shape_class import ANY_SHAPE, ShapeClass, compute_dtype, contiguous_stride, joined, same_layout

ROW_NUMEL = 4096  # elements of a long vector that are summed in one go
SLICES = 65_536  # kernels of convolutions that are stepped together: their factors take 2.4 MB of 3 x 3 ones


def step_eager(
    shape_class: ShapeClass, members: Members, tables: list[Tensor], numbers: Sequence[Numbers], kept: dict[str, Any]
) -> None:
    """Step a class with operations as they are.

    Args:
        shape_class: the class.
        members: its members.
        tables: one vector of numbers for each member.
        numbers: the same as Python numbers, where no input is a tensor.
        kept: the same in each step of the same members.
    """
    if shape_class.device.type != "cpu" or torch.compiler.is_compiling():
        step_class(members, torch.stack(tables))
    else:
        in_parts = _layout_of(shape_class) == "contiguous"  # small kernels are quicker as a whole
        _eager.step_members(shape_class, members, tables, numbers, in_parts, kept)


def step_compiled(shape_class: ShapeClass, members: Members, tables: list[Tensor]) -> None:
    """Step a class with compiled calls."""

    known: dict[Any, Callable[..., Any]] = {}  # a class has few passes and many members

    def run(function: Callable[..., Any], variant: tuple[int, ...], *arguments: Any, lay_out: LayOut | None = None) -> Any:
        call = known.get((function, variant))
        if call is None:
            call = compiled(_pass_of(shape_class, function, variant))
            call = known[function, variant] = call.for_now() if isinstance(call, Direct) else call
        if lay_out is None:
            return call(*arguments)
        return call.laid_out(lay_out, *arguments) if isinstance(call, Recorded) else call(*lay_out(*arguments))

    _step(shape_class, members, tables, run)


def calls_of(shape_class: ShapeClass, k: int) -> list[Call]:
    """Every compiled call that a step of up to k members can need; nothing is computed."""
    shape_class, calls = joined(shape_class), []

    def run(function: Callable[..., Any], variant: tuple[int, ...], *arguments: Any, lay_out: LayOut | None = None) -> Any:
        arguments = arguments if lay_out is None else lay_out(*arguments)
        calls.append(Call(_pass_of(shape_class, function, variant), arguments))
        return function(*arguments)

    # Calls differ by their number of members, and any number up to k may have a gradient.
    for size in _member_counts(shape_class, k):
        members = _on_meta(shape_class, size)
        table = torch.empty(len(Numbers._fields), dtype=members.rms[0].dtype, device="meta")
        _step(shape_class, members, [table] * size, run)
    return calls


def _member_counts(shape_class: ShapeClass, k: int) -> list[int]:
    """Numbers of members that, together, make every call that any number of them, on CUDA up to k, can make."""
    return [1] if shape_class.device.type == "cpu" else [1 << i for i in range(k.bit_length())]


def _pass_of(shape_class: ShapeClass, function: Callable[..., Any], variant: tuple[int, ...]) -> Pass:
    of = shape_class
    return pass_of(function, of.device, (of.dtype, of.grad_dtype), of.momentum, of.rounding, variant)


def any_shape(shape_class: ShapeClass) -> ShapeClass:
    """What contiguous matrices on a CPU have in common with those of other shapes; any other class as it is."""
    if shape_class.device.type != "cpu" or _layout_of(shape_class) != "contiguous":
        return shape_class
    return shape_class._replace(shape=ANY_SHAPE, stride=(), grad_stride=())


def _step(shape_class: ShapeClass, members: Members, tables: list[Tensor], run: Runner) -> None:
    layout = _layout_of(shape_class)
    if layout is None:
        step_class(members, torch.stack(tables))
    elif shape_class.device.type != "cpu":
        step_breadth_first(members, tables, run)
    elif layout == "joined":
        _step_elementwise(_elementwise.step_short_vector, (-1,), (), members, members.exp_avg_sqs, [], tables, run)
    elif layout == "vector":
        _step_long(shape_class.numel, members, members.exp_avg_sqs, [], tables, run)
    elif layout == "pointwise":  # 1 x 1 kernels: row and column are the same whole second moment
        _step_long(shape_class.numel, members, members.cols, members.rows, tables, run)
    elif layout == "kernels":
        _step_kernels(shape_class, members, tables, run)
    elif layout == "contiguous":
        _depth_first.step_members(members, tables, run)
    else:
        _depth_first.step_members(_transposed(members), tables, run)


@functools.cache
def _layout_of(shape_class: ShapeClass) -> str | None:
    """How a class lies in memory; None where it is better stepped without compiled calls: empty, one row or column, strided."""
    if shape_class.joined:
        return "joined"
    if shape_class.shape == ANY_SHAPE:
        return "contiguous"
    if shape_class.numel == 0:
        return None
    if not shape_class.factored:
        strides = (shape_class.stride, shape_class.grad_stride)
        return "vector" if all(same_layout(shape_class.shape, stride, (1,)) for stride in strides) else None
    shape, strides = shape_class.shape, (shape_class.stride, shape_class.grad_stride)
    contiguous = contiguous_stride(shape)
    *lead, columns, rows = contiguous_stride(_transposed_shape(shape_class))
    if all(same_layout(shape, stride, contiguous) for stride in strides):
        if shape_class.numel // math.prod(shape[-2:]) > 1 and math.prod(shape[-2:]) <= _unrolled.MOST:
            return "pointwise" if shape[-2:] == (1, 1) else "kernels"
        return None if 1 in shape[-2:] else "contiguous"
    if all(same_layout(shape, stride, (*lead, rows, columns)) for stride in strides):
        return None if 1 in shape[-2:] else "transposed"
    return None


def _transposed_shape(shape_class: ShapeClass) -> tuple[int, ...]:
    *lead, rows, columns = shape_class.shape
    return (*lead, columns, rows)


def _transposed(members: Members) -> Members:
    """A transposed parameter steps like its transpose with the two factors swapped: their means are equal."""
    return members._replace(
        params=[x.mT for x in members.params],
        grads=[x.mT for x in members.grads],
        exp_avgs=[x.mT for x in members.exp_avgs],
        rows=members.cols,
        cols=members.rows,
        draws=[x[SWAPPED] for x in members.draws],
    )


def _step_kernels(shape_class: ShapeClass, members: Members, tables: list[Tensor], run: Runner) -> None:
    all_sums = tables[0].new_zeros(len(tables), 2).unbind()
    # All views first: after a large kernel Python finds nothing in cache, and each takes 5 us instead of 1.
    calls = [
        _kernel_calls(shape_class, members, i, *of_member) for i, of_member in enumerate(zip(tables, all_sums, strict=True))
    ]
    for call in chain(*calls):
        run(*call)


def _kernel_calls(shape_class: ShapeClass, members: Members, i: int, table: Tensor, sums: Tensor) -> list[tuple[Any, ...]]:
    """The calls that step member i: first what sums its parts, then what applies them."""
    *lead, rows, columns = shape_class.shape
    n, size = math.prod(lead), rows * columns

    def parts(x: Tensor, size: int) -> tuple[Tensor, ...]:
        return (x.view(n, size),) if n <= SLICES else torch.split(x.view(n, size), SLICES)

    params, grads = parts(members.params[i], size), parts(members.grads[i], size)
    factors = list(zip(parts(members.rows[i], rows), parts(members.cols[i], columns), strict=True))
    exp_avgs = parts(members.exp_avgs[i], size) if members.exp_avgs else [None] * len(params)
    of_all = (sums, writable(members.rms[i]), writable(members.update_rms[i]), table, shape_class.numel)
    first, second = [], []
    for j, (p, g) in enumerate(zip(params, grads, strict=True)):
        k = p.shape[0]
        as_vector, key = _rows_of(k * size), (rows, columns, *size_variant(k))
        vector_key = (*key, *size_variant(*as_vector))
        squares = (p.view(as_vector), g.view(k, rows, columns), *factors[j], sums, table)
        draws = draws_from(members.draws[i], j * SLICES, 0) if members.draws else None
        first.append((_unrolled.kernel_statistics, vector_key, *squares))
        second.append((_unrolled.apply_kernels, key, p, g, *factors[j], exp_avgs[j], *of_all, draws))
    return [*first, *second]


@functools.cache
def _rows_of(numel: int) -> tuple[int, int]:
    """A vector cut into two or more equal rows, the longest that are summed in one go; a prime number of elements stays one."""
    columns = next(d for d in range(max(1, min(numel // 2, ROW_NUMEL)), 0, -1) if numel % d == 0)
    return (numel // columns, columns) if columns > 1 else (1, numel)


def _step_long(
    numel: int, members: Members, second_moments: list[Tensor], twins: list[Tensor], tables: list[Tensor], run: Runner
) -> None:
    shape = _rows_of(numel)
    variant = (bool(twins), *size_variant(*shape))
    _step_elementwise(_elementwise.step_elementwise, shape, variant, members, second_moments, twins, tables, run)


def _step_elementwise(
    function: Callable[..., None],
    shape: tuple[int, ...],
    variant: tuple[int, ...],
    members: Members,
    second_moments: list[Tensor],
    twins: list[Tensor],
    tables: list[Tensor],
    run: Runner,
) -> None:
    """Members whose second moment is as large as they are, one by one; `twins` are written as `second_moments` are."""
    none = [None] * len(tables)

    def lay_out(*arguments: Any) -> tuple[Any, ...]:
        p, g, second_moment, twin, exp_avg, rms, update_rms, table, draws = arguments
        twin, exp_avg = (x if x is None else x.view(shape) for x in (twin, exp_avg))
        large = p.view(shape), g.view(shape), second_moment.view(shape), twin, exp_avg
        return *large, writable(rms), writable(update_rms), table, draws

    large = (members.params, members.grads, second_moments, twins or none, members.exp_avgs or none)
    for arguments in zip(*large, members.rms, members.update_rms, tables, members.draws or none, strict=True):
        run(function, variant, *arguments, lay_out=lay_out)


def step_breadth_first(members: Members, tables: list[Tensor], run: Runner) -> None:
    """Calls of 1, 2, 4, 8, ... members, so that a class of any size, with any gradients missing, uses few graphs."""
    start, k, shape = 0, len(tables), members.params[0].shape
    while start < k:
        size = 1 << ((k - start).bit_length() - 1)
        part = Members(*(x[start : start + size] for x in members))
        run(step_class, (size, *size_variant(*shape)), part, torch.stack(tables[start : start + size]))
        start += size


def _on_meta(shape_class: ShapeClass, k: int) -> Members:
    """k members of a class on the meta device."""
    shape, stride, factored = shape_class.shape, shape_class.stride, shape_class.factored
    shape = (2,) if shape_class.joined else shape
    dtype = compute_dtype(shape_class.dtype)

    def make(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = dtype) -> list[Tensor]:
        return [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for _ in range(k)]

    def contiguous(shape: tuple[int, ...]) -> list[Tensor]:
        return make(shape, contiguous_stride(shape))

    return Members(
        params=make(shape, stride, shape_class.dtype),
        grads=make(shape, shape_class.grad_stride, shape_class.grad_dtype),
        rows=contiguous(shape[:-1]) if factored else [],
        cols=contiguous(shape[:-2] + shape[-1:]) if factored else [],
        exp_avg_sqs=[] if factored else contiguous(shape),
        exp_avgs=make(shape, stride) if shape_class.momentum else [],
        rms=contiguous(()),
        update_rms=contiguous(()),
        draws=[torch.empty(DRAWS, dtype=torch.int32, device="meta") for _ in range(k)] if shape_class.rounding else [],
    )
