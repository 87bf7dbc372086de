"""A step on a GPU: a few launches of kernels, each for many members of any shapes.

What depends on shapes alone is laid out once for a plan. What a step finds anew is where tensors lie: the addresses of all that
kernels touch are read in each step, and go to the GPU where they have changed.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.gpu.layout import MATRICES, SHORT, SLICES, VECTORS, Kernels, Layout, Tables
from adafactor_compiled._fused.pieces import COUNT, STATISTICS, STEP, Piece
from adafactor_compiled._state.layout import compute_dtype, contiguous_stride, group_by_key
from adafactor_compiled._state.moments import is_cautious
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.numbers import Numbers, to_device
from adafactor_compiled._update.rounding import DRAWS, swapped

ADDRESSES, ROW, COLUMN, READ = 8, 2, 3, 5  # of a member, as in tables.py; of the first five elements are read
EXAMPLE = 4096  # elements
LEAST_PARTIAL = 4_194_304  # bytes for the sums of blocks, or a 32nd of the parameters, whatever is more


class Launch:
    """Members that are stepped together; see `_fused/launches.py`."""

    def __init__(self, kernels: Kernels, members: Sequence[ShapeClass], positions: list[int], sent: Sent) -> None:
        self.kernels, self.shape_class, self.positions = kernels, members[0], positions
        self.members, self.sent, self.ran = members, sent, False
        self.share([None] * len(members))

    def share(self, pieces: Sequence[Piece | None]) -> None:
        layout = Layout(self.kernels)
        for of, piece in zip(self.members, pieces, strict=True):
            layout.add(of, piece)
        self.tables, self.there = layout.tables(), There()
        self.partial, self.sums, self.kept = layout.partial, layout.sums, layout.kept  # how many elements
        self.room: Room | None = None  # of pieces, between two calls

    def run(self, addresses: array[int], numbers: array[float] | Tensor, draws: Tensor | None, call: int = STEP) -> None:
        """See `_fused/launches.py`."""
        of = self.kernels
        if call not in _calls_of(of):
            return
        tables, pointers, aligned = _there(self, addresses)
        aligned = aligned and of.sixteens
        if aligned != of.sixteens:
            try_out(of._replace(sixteens=False))
        if not isinstance(numbers, Tensor):
            numbers = self.sent.numbers_of(numbers, of)
        if draws is not None and of.swapped:
            draws = swapped(draws)
        _run(Ready(self, tables, pointers, aligned, call), numbers, draws)
        if call == STEP:
            self.ran, self.room = True, None

    def forget(self) -> None:
        self.there, self.room = There(), None


def _calls_of(of: Kernels) -> list[int]:
    if of.split is None:
        return [STEP]
    return [STATISTICS, COUNT, STEP] if is_cautious(of.momentum) else [STATISTICS, STEP]


class Room(NamedTuple):
    """What kernels leave for those that follow."""

    kept: Tensor | None  # new averages of pieces, which are written when the step is sure
    sums: Tensor  # float64


class There:
    """What a launch has on the GPU, made on `stream`: a tensor that is used on another stream may go too soon."""

    def __init__(self) -> None:
        self.stream: int | None = None
        self.tables: Tables | None = None
        self.addresses: array[int] | None = None
        self.aligned = False  # whether these are multiples of 16
        self.pointers: Tensor | None = None


class Sent:
    """The numbers of one step on the GPU, which its launches share."""

    def __init__(self) -> None:
        self._of: array[float] | None = None
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def numbers_of(self, numbers: array[float], of: Kernels) -> Tensor:
        key = of.device, compute_dtype(of.dtype)
        if self._of is not numbers:  # another step
            self._of, self._there = numbers, {}
        if key not in self._there:
            rows = torch.tensor(numbers, dtype=key[1], device="cpu")
            self._there[key] = to_device(rows.view(-1, len(Numbers._fields)), of.device)
        return self._there[key]


class Ready(NamedTuple):
    """A launch with all that it takes."""

    launch: Launch
    tables: Tables
    pointers: Tensor
    aligned: bool  # whether 128 bits can be read at a time
    call: int

    @property
    def summed(self) -> bool:
        """Whether ranks have added up the sums of these, which are pieces."""
        return self.launch.kernels.split is not None and self.call != STATISTICS


def launches_of(members: Sequence[tuple[ShapeClass, Kernels]], unaligned: Collection[int] = ()) -> list[Launch]:
    """The launches that step these members; what is `unaligned` is not read 128 bits at a time."""
    launches: list[Launch] = []
    part: list[int]
    sent = Sent()
    kinds = (of._replace(sixteens=False) if i in unaligned else of for i, (_, of) in enumerate(members))
    for kernels, chosen in group_by_key(kinds).items():
        shapes = {i: members[i][0] for i in chosen}
        chosen.sort(key=lambda i: -members[i][0].numel)  # what takes long begins first
        itemsize, state = kernels.dtype.itemsize, compute_dtype(kernels.dtype).itemsize
        largest = max(LEAST_PARTIAL, sum(of.numel for of in shapes.values()) * itemsize // 32)
        layout, part, partial = Layout(kernels), [], 0
        for i in chosen:
            of_member = layout.partial_of(shapes[i]) * state
            if part and partial + of_member > largest:
                launches.append(Launch(kernels, [shapes[j] for j in part], part, sent))
                part, partial = [], 0
            partial += of_member
            part.append(i)
        launches.append(Launch(kernels, [shapes[j] for j in part], part, sent))
    return launches


def _there(launch: Launch, addresses: array[int]) -> tuple[Tables, Tensor, bool]:
    """The tables of a launch on its device, and whether all that is read begins at multiples of 16."""
    there, device = launch.there, launch.kernels.device
    if _is_capturing(device):
        return _of_capture(launch, addresses)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if there.tables is None or there.stream != stream:
        there.tables = Tables(*(to_device(x, device) for x in launch.tables))
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
    tables = Tables(*map(copied, launch.tables)) if there.tables is None else there.tables
    pointers = copied(_host_table(launch.kernels, addresses)) if known is None else known
    return tables, pointers, _are_aligned(addresses)


_captured: list[Any] = []


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _host_table(of: Kernels, addresses: array[int]) -> Tensor:
    if of.swapped or of.kind in (VECTORS, SHORT):  # of two copies the columns are read
        addresses = addresses[:]
        addresses[ROW::ADDRESSES], addresses[COLUMN::ADDRESSES] = addresses[COLUMN::ADDRESSES], addresses[ROW::ADDRESSES]
    return torch.frombuffer(addresses, dtype=torch.int64).clone()  # no default device, and no memory of Python's


def _are_aligned(addresses: array[int]) -> bool:
    return not any(x & 15 for i in range(READ) for x in addresses[i::ADDRESSES])


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
    example = Launch(of, [shape_class], [0], Sent())
    exchanged = _zeros(torch.float64, of.device)
    if of.split is not None:
        at, whole = exchanged.data_ptr(), shape[-2:] if len(shape) > 1 else (1, *shape)
        example.share([Piece(at, at, of.split, shape_class.numel, *whole)])
    state = compute_dtype(of.dtype)
    dtypes = of.dtype, of.grad_dtype, state, state, of.momentum.dtype if of.momentum else state, state, state
    tensors = [_zeros(dtype, of.device) for dtype in dtypes]
    tables, pointers, _ = _there(example, array("q", [*(x.data_ptr() for x in tensors), 0]))
    draws = torch.zeros(1, DRAWS, dtype=torch.int32, device=of.device) if of.rounding else None
    numbers = _zeros(state, of.device)[: len(Numbers._fields)].fill_(0.5)
    for call in _calls_of(of):
        _run(Ready(example, tables, pointers, of.sixteens, call), numbers, draws)


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
