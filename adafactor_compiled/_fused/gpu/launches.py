"""A step on a GPU: a few launches of kernels, each for many members of any shapes.

What depends on shapes alone is laid out once for a plan. What a step finds anew is where tensors lie: the addresses of all that
kernels touch are read in each step, and go to the GPU where they have changed.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._fused.forms import MATRICES, SLICES
from adafactor_compiled._fused.gpu.layout import SHORT, VECTORS, Cut, Kernels, Layout, Room, Tables, cut_of
from adafactor_compiled._fused.pieces import ADDRESSES, COL, COUNT, EXP_AVG, ROW, STATISTICS, STEP, Piece
from adafactor_compiled._state.layout import compute_dtype, contiguous_stride, group_by_key
from adafactor_compiled._state.moments import is_cautious
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.numbers import Numbers, to_device
from adafactor_compiled._update.rounding import DRAWS, swapped

EXAMPLE = 4096  # elements
LEAST_PARTIAL = 4_194_304  # bytes for the sums of blocks, or a 32nd of the parameters, whatever is more


class Launch:
    """Members that are stepped together; see `_fused/launches.py`."""

    def __init__(self, kernels: Kernels, cuts: Sequence[Cut], positions: list[int]) -> None:
        self.kernels, self.cuts, self.shape_class, self.positions = kernels, cuts, cuts[0].of, positions
        self.ran = False
        self.share([None] * len(cuts))

    def share(self, pieces: Sequence[Piece | None]) -> None:
        self.layout = Layout(self.kernels, self.cuts, pieces)
        self.forget()

    def forget(self) -> None:
        self.there = There()
        self.room: Room | None = None  # of pieces, between two calls

    def run(self, addresses: array[int], numbers: array[float] | Tensor, draws: Tensor | None, call: int = STEP) -> None:
        """See `_fused/launches.py`; numbers are a tensor."""
        of = self.kernels
        if call not in _calls_of(of):
            return
        tables, pointers, aligned = _there(self, addresses)
        if of.sixteens and not aligned:
            try_out(of._replace(sixteens=False))
        room = self._room() if call == _calls_of(of)[0] else self.room
        assert room is not None
        draws = swapped(draws) if draws is not None and of.swapped else draws
        _run(of, call, tables, pointers, aligned and of.sixteens, numbers, draws, room)
        self.ran = call == STEP
        self.room = None if self.ran else room._replace(partial=None)

    def _room(self) -> Room:
        layout, of, state = self.layout, self.kernels, compute_dtype(self.kernels.dtype)
        partial, kept = (_empty(n, state, of.device) if n else None for n in (layout.partial, layout.kept))
        return Room(partial, kept, _empty(layout.sums, torch.float64, of.device))


def _calls_of(of: Kernels) -> list[int]:
    if of.split is None:
        return [STEP]
    return [STATISTICS, COUNT, STEP] if is_cautious(of.momentum) else [STATISTICS, STEP]


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=dtype, device=device)


@dataclass(slots=True)
class There:
    """What a launch has on the GPU, made on `stream`: a tensor that is used on another stream may go too soon."""

    stream: int | None = None
    tables: Tables | None = None
    addresses: array[int] | None = None
    aligned: bool = False  # whether these are multiples of 16
    pointers: Tensor | None = None


def launches_of(members: Sequence[tuple[ShapeClass, Kernels, Cut]]) -> list[Launch]:
    """The launches that step these members; positions are those in this list."""
    launches: list[Launch] = []
    for kernels, chosen in group_by_key(kernels for _, kernels, _ in members).items():
        cuts = {i: members[i][2] for i in chosen}
        chosen.sort(key=lambda i: -members[i][0].numel)  # what takes long begins first
        numel, state = sum(members[i][0].numel for i in chosen), compute_dtype(kernels.dtype).itemsize
        left = most = max(LEAST_PARTIAL, numel * kernels.dtype.itemsize // 32)
        parts: list[list[int]] = [[]]
        for i in chosen:
            partial = cuts[i].units * cuts[i].partial * state
            if parts[-1] and partial > left:
                parts.append([])
                left = most
            left -= partial
            parts[-1].append(i)
        launches += [Launch(kernels, [cuts[i] for i in part], part) for part in parts]
    return launches


def _there(launch: Launch, addresses: array[int]) -> tuple[Tables, Tensor, bool]:
    """The tables of a launch on its device, and whether all that is read begins at multiples of 16."""
    there, device = launch.there, launch.kernels.device
    if _is_capturing(device):
        return _of_capture(launch, addresses)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if there.tables is None or there.stream != stream:
        there.tables = Tables(*(to_device(x, device) for x in launch.layout.tables))
        there.stream, there.pointers = stream, None
    if there.pointers is None or there.addresses != addresses:
        there.pointers, there.addresses = to_device(_host_table(launch.kernels, addresses), device), addresses
        there.aligned = _are_aligned(addresses)
    return there.tables, there.pointers, there.aligned


def _of_capture(launch: Launch, addresses: array[int]) -> tuple[Tables, Tensor, bool]:
    """While a CUDA graph is captured: what is there already, or copies that the graph will make whenever it is replayed. They
    are not made yet, so that no other step may use them. What a graph reads and does not make, on either side, stays as long as
    the process.
    """
    there, device = launch.there, launch.kernels.device

    def copied(table: Tensor) -> Tensor:
        pinned = table.pin_memory()
        _captured.append(pinned)
        return to_device(pinned, device)

    known = there.pointers if there.addresses == addresses else None
    _captured.append((there.tables, known))
    tables = Tables(*map(copied, launch.layout.tables)) if there.tables is None else there.tables
    pointers = copied(_host_table(launch.kernels, addresses)) if known is None else known
    return tables, pointers, _are_aligned(addresses)


_captured: list[Any] = []


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _host_table(of: Kernels, addresses: array[int]) -> Tensor:
    if of.swapped or of.kind in (VECTORS, SHORT):  # of two copies the columns are read
        addresses = addresses[:]
        addresses[ROW::ADDRESSES], addresses[COL::ADDRESSES] = addresses[COL::ADDRESSES], addresses[ROW::ADDRESSES]
    return torch.frombuffer(addresses, dtype=torch.int64).clone()  # no default device, and no memory of Python's


def _are_aligned(addresses: array[int]) -> bool:
    return not any(x & 15 for i in range(EXP_AVG + 1) for x in addresses[i::ADDRESSES])  # of these elements are read


def _run(of: Kernels, *arguments: Any) -> None:
    from adafactor_compiled._fused.gpu.steps import step  # it imports Triton, which builds for CPUs lack

    with torch.cuda.device(of.device) if of.device.type == "cuda" else nullcontext():
        step(of, *arguments)


@functools.cache
def try_out(of: Kernels) -> None:
    """Compile kernels, by a launch of theirs with a small member of zeros."""
    shape, stride = _example_of(of)
    shape_class = ShapeClass(shape, stride, stride, of.dtype, of.grad_dtype, of.device, True, of.momentum, of.rounding)
    example = Launch(of, [cut_of(of, shape_class)], [0])
    exchanged = _empty(EXAMPLE, torch.float64, of.device).zero_()
    if of.split is not None:
        at, whole = exchanged.data_ptr(), shape[-2:] if len(shape) > 1 else (1, *shape)
        example.share([Piece(at, at, of.split, shape_class.numel, *whole)])
    state = compute_dtype(of.dtype)
    dtypes = of.dtype, of.grad_dtype, state, state, of.momentum.dtype if of.momentum else state, state, state
    tensors = [_empty(EXAMPLE, dtype, of.device).zero_() for dtype in dtypes]
    addresses = array("q", [*(x.data_ptr() for x in tensors), 0])
    draws = torch.zeros(1, DRAWS, dtype=torch.int32, device=of.device) if of.rounding else None
    numbers = _empty(len(Numbers._fields), state, of.device).fill_(0.5)
    for call in _calls_of(of):
        example.run(addresses, numbers, draws, call)


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
