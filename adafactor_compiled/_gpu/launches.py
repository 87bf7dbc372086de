"""A step on a GPU: a few launches of kernels, each for many members of any shapes.

What depends on shapes alone is laid out once for a plan. What a step finds anew is where tensors lie: the addresses of all that
kernels touch are read in each step, and go to the GPU where they have changed.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._gpu.layout import MATRICES, SHORT, SLICES, VECTORS, Kernels, Layout, Tables, kernels_of
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.layout import compute_dtype, contiguous_stride, group_by_key
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.numbers import Numbers, to_device
from adafactor_compiled._update.rounding import DRAWS

EXAMPLE = 4096  # elements
LEAST_PARTIAL = 4_194_304  # bytes for the sums of blocks, or a 32nd of the parameters, whatever is more


class Launch(NamedTuple):
    """Members that are stepped together."""

    kernels: Kernels
    shape_class: ShapeClass  # of the first
    positions: list[int]  # among the entries of a step
    tables: Tables  # on the host
    partial: int  # elements of the sums of blocks
    sums: int  # elements of the sums that are numbers
    there: There


class There:
    """What a launch has on the GPU, made on `stream`: a tensor that is used on another stream may go too soon."""

    def __init__(self) -> None:
        self.stream: int | None = None
        self.tables: Tables | None = None
        self.addresses: list[int] = []
        self.pointers: Tensor | None = None


class Ready(NamedTuple):
    """A launch with all that it takes."""

    launch: Launch
    tables: Tables
    pointers: Tensor
    aligned: bool  # whether 128 bits can be read at a time
    written: list[Tensor]
    numbers: list[Tensor]  # those of the members, each once, in the order of the last column of the pointers


def launches_of(classes: Iterable[tuple[ShapeClass, Sequence[int]]], unaligned: Collection[int] = ()) -> list[Launch]:
    """The launches that step these classes, each of which has kernels; what is `unaligned` is not read 128 bits at a time."""
    members = [(of, i) for of, positions in classes for i in positions]
    launches: list[Launch] = []
    part: list[int]
    for kernels, chosen in group_by_key(_kernels_of(of, i in unaligned) for of, i in members).items():
        chosen.sort(key=lambda j: -members[j][0].numel)  # what takes long begins first
        largest = max(LEAST_PARTIAL, sum(members[j][0].numel for j in chosen) * kernels.dtype.itemsize // 32)
        layout, part = Layout(kernels), []
        for j in chosen:
            of = members[j][0]
            if part and (layout.partial + layout.partial_of(of)) * compute_dtype(of.dtype).itemsize > largest:
                launches.append(_launch(layout, members, part))
                layout, part = Layout(kernels), []
            layout.add(of)
            part.append(j)
        launches.append(_launch(layout, members, part))
    return launches


def _kernels_of(of: ShapeClass, unaligned: bool) -> Kernels:
    kernels = kernels_of(of)
    assert kernels is not None
    return kernels._replace(sixteens=False) if unaligned else kernels


def _launch(layout: Layout, members: list[tuple[ShapeClass, int]], chosen: list[int]) -> Launch:
    positions = [members[j][1] for j in chosen]
    return Launch(layout.kernels, members[chosen[0]][0], positions, layout.tables(), layout.partial, layout.sums, There())


def prepare(launches: Sequence[Launch], entries: list[Entry], update_rms: list[Tensor], tables: list[Tensor]) -> list[Ready]:
    """Read all addresses, before anything is launched.

    Raises:
        RuntimeError: a tensor has no memory.
    """
    return [_ready(launch, entries, update_rms, tables) for launch in launches]


def _ready(launch: Launch, entries: list[Entry], update_rms: list[Tensor], tables: list[Tensor]) -> Ready:
    of, addresses, bits = launch.shape_class, [], 0
    written: list[Tensor] = []
    rows: dict[int, int] = {}  # of the numbers, by their id
    numbers: list[Tensor] = []
    for i in launch.positions:
        position, p, g, state, _ = entries[i]
        v, w = (state["exp_avg_sq_row"], state["exp_avg_sq_col"]) if of.factored else (state["exp_avg_sq"],) * 2
        if launch.kernels.swapped or launch.kernels.kind in (VECTORS, SHORT):  # of two copies the columns are read
            v, w = w, v
        exp_avg = state["exp_avg"] if of.momentum else v
        of_member = [x.data_ptr() for x in (p, g, v, w, exp_avg, state["RMS"], update_rms[i])]
        written += (p, v, w, exp_avg, state["RMS"], update_rms[i])
        if not all(of_member):
            raise RuntimeError(f"parameter {position} (shape {tuple(p.shape)}) has state without memory; nothing was stepped")
        bits |= of_member[0] | of_member[1] | of_member[2] | of_member[3] | of_member[4]
        addresses += of_member
        if id(tables[i]) not in rows:
            rows[id(tables[i])] = len(rows)
            numbers.append(tables[i])
        addresses.append(rows[id(tables[i])])
    on_device, pointers = _there(launch, addresses)
    aligned = launch.kernels.sixteens and bits % 16 == 0
    if aligned != launch.kernels.sixteens:
        try_out(launch.kernels._replace(sixteens=False))
    return Ready(launch, on_device, pointers, aligned, written, numbers)


def _there(launch: Launch, addresses: list[int]) -> tuple[Tables, Tensor]:
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


def _of_capture(launch: Launch, addresses: list[int]) -> tuple[Tables, Tensor]:
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


def _host_table(addresses: list[int]) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device="cpu")


def run_launch(ready: Ready, numbers: Tensor, draws: Tensor | None) -> None:
    """Step the k members of a launch.

    Args:
        ready: the launch.
        numbers: `ready.numbers`, stacked.
        draws: for stochastic rounding, of shape [k, DRAWS].
    """
    of = ready.launch.kernels
    from adafactor_compiled._gpu.steps import STEPS  # it imports Triton, which builds for CPUs lack

    with torch.cuda.device(of.device) if of.device.type == "cuda" else nullcontext():
        STEPS[of.kind](ready, numbers, draws)
    torch.autograd.graph.increment_version(ready.written)  # as operations of torch do by themselves


@functools.cache
def try_out(of: Kernels) -> None:
    """Compile kernels, by a launch of theirs with a small member of zeros."""
    shape, stride = _example_of(of)
    shape_class = ShapeClass(shape, stride, stride, of.dtype, of.grad_dtype, of.device, True, of.momentum, of.rounding)
    layout = Layout(of)
    layout.add(shape_class)
    example = _launch(layout, [(shape_class, 0)], [0])
    state = compute_dtype(of.dtype)
    dtypes = of.dtype, of.grad_dtype, state, state, of.momentum.dtype if of.momentum else state, state, state
    tensors = [_zeros(dtype, of.device) for dtype in dtypes]
    tables, pointers = _there(example, [*(x.data_ptr() for x in tensors), 0])
    draws = torch.zeros(1, DRAWS, dtype=torch.int32, device=of.device) if of.rounding else None
    numbers = _zeros(state, of.device)[: len(Numbers._fields)].fill_(0.5)
    run_launch(Ready(example, tables, pointers, of.sixteens, [], []), numbers, draws)


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
