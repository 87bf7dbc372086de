"""A step on a GPU: a few launches of kernels, each for many members of any shapes.

What depends on shapes alone is laid out once for a plan. What a step finds anew is where tensors lie: the addresses of all that
kernels touch are read in each step, and go to the GPU where they have changed.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.gpu.layout import MATRICES, SHORT, SLICES, VECTORS, Kernels, Layout, Tables, kernels_of
from adafactor_compiled._state.layout import compute_dtype, contiguous_stride, group_by_key
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.numbers import Numbers, to_device
from adafactor_compiled._update.rounding import DRAWS, SWAPPED

ADDRESSES, ROW, COLUMN, READ = 8, 2, 3, 5  # of a member, as in tables.py; of the first five elements are read
EXAMPLE = 4096  # elements
LEAST_PARTIAL = 4_194_304  # bytes for the sums of blocks, or a 32nd of the parameters, whatever is more


class Launch:
    """Members that are stepped together; see `_fused/launches.py`."""

    def __init__(self, layout: Layout, members: Sequence[ShapeClass], positions: list[int]) -> None:
        self.kernels, self.shape_class, self.positions = layout.kernels, members[positions[0]], positions
        self.tables, self.partial, self.sums = (
            layout.tables(),
            layout.partial,
            layout.sums,
        )  # elements of sums of blocks, numbers
        self.there = There()

    def run(self, addresses: array[int], numbers: array[float] | Tensor, draws: Tensor | None) -> None:
        """Step the members."""
        of, k = self.kernels, len(self.positions)
        if of.swapped or of.kind in (VECTORS, SHORT):  # of two copies the columns are read
            addresses = addresses[:]
            addresses[ROW::ADDRESSES], addresses[COLUMN::ADDRESSES] = addresses[COLUMN::ADDRESSES], addresses[ROW::ADDRESSES]
        bits = functools.reduce(or_, (x for i in range(READ) for x in addresses[i::ADDRESSES]))
        tables, pointers = _there(self, addresses)
        aligned = of.sixteens and bits % 16 == 0
        if aligned != of.sixteens:
            try_out(of._replace(sixteens=False))
        if not isinstance(numbers, Tensor):
            rows = torch.tensor(numbers, dtype=compute_dtype(of.dtype), device="cpu")
            numbers = to_device(rows.view(-1, len(Numbers._fields)), of.device)
        if draws is not None and of.swapped:
            draws = draws[:, SWAPPED]
        _run(Ready(self, tables, pointers, aligned, k), numbers, draws)


class There:
    """What a launch has on the GPU, made on `stream`: a tensor that is used on another stream may go too soon."""

    def __init__(self) -> None:
        self.stream: int | None = None
        self.tables: Tables | None = None
        self.addresses: array[int] | None = None
        self.pointers: Tensor | None = None


class Ready(NamedTuple):
    """A launch with all that it takes."""

    launch: Launch
    tables: Tables
    pointers: Tensor
    aligned: bool  # whether 128 bits can be read at a time
    count: int


def launches_of(members: Sequence[ShapeClass], unaligned: Collection[int] = ()) -> list[Launch]:
    """The launches that step these members, each of which has kernels; what is `unaligned` is not read 128 bits at a time."""
    launches: list[Launch] = []
    part: list[int]
    for kernels, chosen in group_by_key(_kernels_of(of, i in unaligned) for i, of in enumerate(members)).items():
        chosen.sort(key=lambda i: -members[i].numel)  # what takes long begins first
        largest = max(LEAST_PARTIAL, sum(members[i].numel for i in chosen) * kernels.dtype.itemsize // 32)
        layout, part = Layout(kernels), []
        for i in chosen:
            of = members[i]
            if part and (layout.partial + layout.partial_of(of)) * compute_dtype(of.dtype).itemsize > largest:
                launches.append(Launch(layout, members, part))
                layout, part = Layout(kernels), []
            layout.add(of)
            part.append(i)
        launches.append(Launch(layout, members, part))
    return launches


def _kernels_of(of: ShapeClass, unaligned: bool) -> Kernels:
    kernels = kernels_of(of)
    assert kernels is not None
    return kernels._replace(sixteens=False) if unaligned else kernels


def _there(launch: Launch, addresses: array[int]) -> tuple[Tables, Tensor]:
    """The tables of a launch on its device."""
    there, device = launch.there, launch.kernels.device
    if _is_capturing(device):
        return _of_capture(launch, addresses)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if there.tables is None or there.stream != stream:
        there.tables = Tables(*(to_device(x, device) for x in launch.tables))
        there.stream, there.pointers = stream, None
    if there.pointers is None or there.addresses != addresses:
        there.pointers, there.addresses = to_device(_host_table(addresses), device), addresses
    return there.tables, there.pointers


def _of_capture(launch: Launch, addresses: array[int]) -> tuple[Tables, Tensor]:
    """While a CUDA graph is captured: what is there already, or copies that the graph will make whenever it is replayed. They
    are not made yet, so that no other step may use them; and what a graph reads, on either side, stays as long as the process.
    """
    there, device = launch.there, launch.kernels.device

    def copied(table: Tensor) -> Tensor:
        pinned = table.pin_memory()
        _captured.append(pinned)
        return to_device(pinned, device)

    tables = Tables(*map(copied, launch.tables)) if there.tables is None else there.tables
    pointers = there.pointers if there.addresses == addresses else None
    pointers = copied(_host_table(addresses)) if pointers is None else pointers
    _captured.append((tables, pointers))
    return tables, pointers


_captured: list[Any] = []


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _host_table(addresses: array[int]) -> Tensor:
    return torch.frombuffer(addresses, dtype=torch.int64).clone()  # no default device, and no memory of Python's


def _run(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    of = ready.launch.kernels
    from adafactor_compiled._fused.gpu.steps import STEPS  # it imports Triton, which builds for CPUs lack

    with torch.cuda.device(of.device) if of.device.type == "cuda" else nullcontext():
        STEPS[of.kind](ready, numbers, draws)


@functools.cache
def try_out(of: Kernels) -> None:
    """Compile kernels, by a launch of theirs with a small member of zeros."""
    shape, stride = _example_of(of)
    shape_class = ShapeClass(shape, stride, stride, of.dtype, of.grad_dtype, of.device, True, of.momentum, of.rounding)
    layout = Layout(of)
    layout.add(shape_class)
    example = Launch(layout, [shape_class], [0])
    state = compute_dtype(of.dtype)
    dtypes = of.dtype, of.grad_dtype, state, state, of.momentum.dtype if of.momentum else state, state, state
    tensors = [_zeros(dtype, of.device) for dtype in dtypes]
    tables, pointers = _there(example, array("q", [*(x.data_ptr() for x in tensors), 0]))
    draws = torch.zeros(1, DRAWS, dtype=torch.int32, device=of.device) if of.rounding else None
    numbers = _zeros(state, of.device)[: len(Numbers._fields)].fill_(0.5)
    _run(Ready(example, tables, pointers, of.sixteens, 1), numbers, draws)


def _zeros(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(EXAMPLE, dtype=dtype, device=device)


def _example_of(of: Kernels) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and stride of a small member."""
    size = 16 if of.sixteens else 15  # no more than the columns of a tile that has all
    if of.kind == SLICES:
        rows, columns, contiguous = of.shape
        shape = (2, 2, rows, columns)
        return shape, contiguous_stride(shape) if contiguous else (2 * rows * columns, 1, 2 * columns, 2)
    if of.kind == MATRICES:
        transposed = bool(of.shape[-2])
        return ((3, size), (size, 1)) if transposed == of.swapped else ((size, 3), (3, 1))
    return (size,), (1,)
