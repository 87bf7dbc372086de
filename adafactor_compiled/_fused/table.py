"""The table of a step: its members, their launches, and the look at all memory that these touch."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor

from adafactor_compiled._fused.gpu import layout as gpu_layout
from adafactor_compiled._fused.launches import ADDRESSES, Launch, launches_of
from adafactor_compiled._fused.members import Member
from adafactor_compiled._fused.pieces import NUMBERS, ROW, STEP, G, P, Piece
from adafactor_compiled._state.entries import without_memory
from adafactor_compiled._state.layout import compute_dtype
from adafactor_compiled._state.moments import State
from adafactor_compiled._update.numbers import Numbers, to_device

Kind = tuple[torch.device, torch.dtype]


@dataclass(slots=True)
class Found:
    """What a step finds anew of the members of a table."""

    addresses: array[int]  # `ADDRESSES` of each
    numbers: array[float] | Mapping[Kind, Tensor]  # rows, or those of devices and dtypes
    draws: Mapping[int, Tensor]  # of members that are rounded stochastically
    sent: dict[Kind, Tensor] = field(default_factory=dict)

    def numbers_of(self, device: torch.device, dtype: torch.dtype) -> array[float] | Tensor:
        """As kernels of a device take them; what is sent to one, all launches share."""
        if not isinstance(self.numbers, array):
            return self.numbers[device, dtype]
        if not gpu_layout.is_gpu(device):
            return self.numbers
        if (device, dtype) not in self.sent:
            rows = torch.tensor(self.numbers, dtype=dtype, device="cpu").view(-1, len(Numbers._fields))
            self.sent[device, dtype] = to_device(rows, device)
        return self.sent[device, dtype]


class Table:
    """Of members that step together, made once for them."""

    def __init__(self, members: Sequence[Member], launches: list[Launch] | None = None) -> None:
        self.members = members
        self.launches = launches = launches_of([x.planned for x in members]) if launches is None else launches
        self._written = [tensor for x in members for tensor in x.written]
        self._in_order = len(launches) == 1 and launches[0].positions == list(range(len(members)))
        self.kept = [tensor for x in members for tensor in x.kept.values()]
        self._kept_in = [x.kept_in for x in members]
        self._update_rms_at = [x.update_rms.data_ptr() for x in members]
        self._columns = _columns_of(members)
        self.sharded = [x.position for x in members if x.placed is not None]  # positions in the optimizer
        self._buffers: list[Tensor] = []  # where pieces have their sums
        self.done: list[int] = []  # members that the present run has stepped
        self._last = array("q")  # addresses of memory that was looked at
        of_spans = [(i, *span) for i, x in enumerate(members) for span in x.spans]
        self._spans = [(i * ADDRESSES + column, size, tensor is not None, i) for i, column, size, tensor in of_spans]
        self._grads = [(i, size) for _, size, written, i in self._spans if not written]
        self._apart: tuple[list[int], list[int]] = [], []  # where memory that is written begins and ends, in order, as of then

    def tensors(self, params: list[Tensor], grads: list[Tensor], states: Sequence[State]) -> list[Tensor]:
        """All that kernels touch: the parameters of all members, their gradients, then `kept` of their states.

        Raises:
            KeyError: a state lacks something.
        """
        return params + grads + [x for kept_in, state in zip(self._kept_in, states, strict=True) for x in kept_in(state)]

    def addresses_of(self, tensors: list[Tensor], rows: Sequence[int]) -> array[int]:
        """`ADDRESSES` of each member, whose tensors are as they were, and whose numbers stand in these rows.

        Raises:
            RuntimeError: memory was given back.
        """
        found = list(map(Tensor.data_ptr, tensors))
        if 0 in found:
            self._check_memory(tensors)
        addresses = array("q", self._columns(found + self._update_rms_at))
        addresses[NUMBERS::ADDRESSES] = array("q", rows)
        return addresses

    def _check_memory(self, tensors: Sequence[Tensor]) -> None:
        """Raise RuntimeError where a tensor that has elements has no memory."""
        members = self.members
        owners = [*((x, P) for x in members), *((x, G) for x in members), *((x, ROW) for x in members for _ in x.kept)]
        for (x, column), tensor in zip(owners, tensors, strict=True):
            if tensor.numel() and not tensor.data_ptr():
                raise _without_memory(x, column)

    def conflicts(self, addresses: array[int], grads: Sequence[Tensor]) -> set[int]:
        """The members that write to memory which another tensor of the step has too: kernels would race in it.

        Gradients may share memory: they are only read. Nothing is looked at again where all lies as it did before.

        Raises:
            RuntimeError: memory was given back.
        """
        if addresses == self._last or (self._have_only_gradients_moved(addresses) and self._are_apart(addresses, grads)):
            self._last = addresses
            return set()
        for i, x in enumerate(self.members):
            for column, size, tensor in x.spans:
                if not _is_there(grads[i] if tensor is None else tensor, size):
                    raise _without_memory(x, column)
        spans = sorted((addresses[at], addresses[at] + size, written, i) for at, size, written, i in self._spans)
        found = overlapping(spans)
        if not found:
            written_ones = [span for span in spans if span[2]]
            self._last, self._apart = addresses, ([x[0] for x in written_ones], [x[1] for x in written_ones])
        return found

    def _have_only_gradients_moved(self, addresses: array[int]) -> bool:
        """As they do in training, from step to step."""
        before = self._last[:]
        for column in (G, NUMBERS) if before else ():
            before[column::ADDRESSES] = addresses[column::ADDRESSES]
        return before == addresses

    def _are_apart(self, addresses: array[int], grads: Sequence[Tensor]) -> bool:
        """Whether gradients that have moved have memory, and it is none that is written."""
        starts, ends = self._apart
        for i, size in self._grads:
            grad, start = grads[i], addresses[i * ADDRESSES + G]
            if start == self._last[i * ADDRESSES + G]:
                continue
            if not _is_there(grad, size):
                return False
            before = bisect_left(starts, start + size)  # spans that begin before its end
            if before and ends[before - 1] > start:
                return False
        return True

    def share(self, buffers: list[Tensor], pieces_of: Callable[[], Sequence[Piece | None]]) -> None:
        """Say which members are pieces, with sums in these buffers, where that is not known yet."""
        if len(buffers) == len(self._buffers) and all(a is b for a, b in zip(buffers, self._buffers, strict=True)):
            return
        pieces, self._buffers = pieces_of(), buffers
        for launch in self.launches:
            launch.share([pieces[i] for i in launch.positions])

    def call(self, call: int, found: Found) -> None:
        """What comes before the step of pieces: writes nothing but their sums."""
        for launch in self.launches:
            self._run(launch, found, call)

    def run(self, found: Found) -> set[int]:
        """Step all members, where there are no conflicts; gives those that kernels skipped."""
        self.done = []
        skipped: set[int] = set()
        try:
            for launch in self.launches:
                positions = launch.positions
                launch.ran = False
                try:
                    flags = self._run(launch, found, STEP)
                finally:
                    self.done += positions if launch.ran else []
                if flags is not None and any(flags):
                    skipped |= {i for i, flag in zip(positions, flags, strict=True) if flag}
        finally:  # as operations of torch do by themselves
            all_done = len(self.done) == len(self.members)
            written = self._written if all_done else [x for i in self.done for x in self.members[i].written]
            torch.autograd.graph.increment_version(written)
        return skipped

    def _run(self, launch: Launch, found: Found, call: int) -> array[int] | None:
        of, positions = launch.kernels, launch.positions
        addresses = found.addresses if self._in_order else _chosen(found.addresses, positions)
        draws = torch.stack([found.draws[i] for i in positions]) if of.rounding else None
        return launch.run(addresses, found.numbers_of(launch.shape_class.device, compute_dtype(of.dtype)), draws, call)


def _columns_of(members: Sequence[Member]) -> Callable[[list[int]], tuple[int, ...]]:
    """The columns of each member from addresses of all parameters, all gradients, what is kept of each, and RMS of updates."""
    count = len(members)
    at, of_updates = 2 * count, 2 * count + sum(len(x.kept) for x in members)
    chosen: list[int] = []
    for i, x in enumerate(members):
        chosen += (i, count + i, *(at + place for place in x.places), of_updates + i, i)  # the last is to be put in
        at += len(x.kept)
    return itemgetter(*chosen)


def _chosen(table: array[int], positions: Sequence[int]) -> array[int]:
    chosen = array("q")
    for i in positions:
        chosen += table[i * ADDRESSES : (i + 1) * ADDRESSES]
    return chosen


def _without_memory(x: Member, column: int) -> RuntimeError:
    return without_memory({P: "", G: "the gradient of "}.get(column, "the state of "), x.position, x.param)


def _is_there(x: Tensor, size: int) -> bool:
    """Whether a storage has the memory, so many bytes, of a tensor."""
    return x.storage_offset() * x.itemsize + size <= x.untyped_storage().nbytes()


def overlapping(spans: list[tuple[int, int, bool, int]]) -> set[int]:
    """The owners of spans, in order of their starts, that overlap others of which one is written."""
    found: set[int] = set()
    still: list[tuple[int, int, bool, int]] = []
    for span in spans:
        still = [other for other in still if other[1] > span[0]]
        for other in still:
            if span[2] or other[2]:
                found |= {span[3], other[3]}
        still.append(span)
    return found
