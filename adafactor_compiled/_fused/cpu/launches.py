"""A step on a CPU: one launch for all members of the same types, whatever their shapes."""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._fused.cpu import build
from adafactor_compiled._fused.cpu.layout import Cut, Kernels
from adafactor_compiled._fused.pieces import STEP, Piece
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import is_cautious
from adafactor_compiled._state.shape_class import ShapeClass
from adafactor_compiled._update.numbers import LEAST_SHARE

SOURCE = Path(__file__).with_name("step.cpp")
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16"}
LINE = 64  # bytes


class Launch:
    """Members that are stepped together; `positions` are theirs among those of a step, in the order of their addresses."""

    def __init__(self, kernels: Kernels, shape_class: ShapeClass, positions: list[int], cuts: list[Cut]) -> None:
        self.kernels, self.shape_class, self.positions = kernels, shape_class, positions
        first = [(not cut.large, -cut.slices * cut.rows * cut.columns, i) for i, cut in enumerate(cuts)]
        order = [i for *_, i in sorted(first)]  # large ones, then what takes long
        self._large = sum(cut.large for cut in cuts)
        self._members = array("q", [x for i in order for x in (i, *cuts[i])])
        self.ran = False
        self.share([None] * len(cuts))

    def forget(self) -> None:
        pass

    def share(self, pieces: Sequence[Piece | None]) -> None:
        self._pieces = array("q", [x for piece in pieces for x in (*(piece or (0,) * len(Piece._fields)), 0)])
        self._shared = any(pieces)
        self._sizes: list[int] | None = None
        self._kept = bytearray()

    def run(self, addresses: array[int], numbers: array[float] | Tensor, draws: Tensor | None, call: int = STEP) -> array[int]:
        """See `_fused/launches.py`."""
        if isinstance(numbers, Tensor):
            numbers = array("d", numbers.flatten().tolist())
        library, count = library_of(self.kernels), len(self.positions)
        members = [_address(self._members), _address(self._pieces), count, self._large]
        if self._sizes is None:
            launch = array("q", [*members, *bytes(14)])
            library.sizes(_address(launch))
            *self._sizes, kept = launch[4:7]
            self._kept = bytearray(kept + LINE)
        scratch_each, room_each = self._sizes
        threads = torch.get_num_threads() if library.threads and not _forked else 1
        # Memory of Python's, since a mode of torch may make something else of a tensor.
        scratch = bytearray(2 * scratch_each + threads * room_each + LINE)
        report = array("q", bytes(8 * (count + 1)))  # of each member whether it was skipped; and whether all is done
        found = [_address(addresses), _address(numbers), 0 if draws is None else draws.data_ptr(), _address(report)]
        memory = [_line_of(scratch), _line_of(self._kept)]
        launch = array("q", [*members, *self._sizes, 0, *found, *memory, call, self._shared, threads, 0, 0])
        try:
            library.step(_address(launch))
        finally:  # an interrupt comes when the call is over
            self.ran = bool(report[count])
        return report[:count]


def _address(x: array[Any]) -> int:
    return x.buffer_info()[0]


def _line_of(memory: bytearray) -> int:
    """The first multiple of `LINE` in it."""
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return -(-begin // LINE) * LINE


class Library(NamedTuple):
    """What is compiled for members of some types."""

    step: Any
    sizes: Any
    threads: bool  # whether it may use more than one


@functools.cache
def library_of(of: Kernels) -> Library:
    """Compiled if it is not there yet.

    Raises:
        Unavailable: it cannot be.
    """
    momentum = "A" if of.momentum is None else TYPES[of.momentum.dtype]
    types = f"PARAM={TYPES[of.dtype]}", f"GRAD={TYPES[of.grad_dtype]}", f"MOMENTUM={momentum}"
    flags = f"MOVES={of.momentum is not None:d}", f"ROUNDING={of.rounding:d}", f"CAUTIOUS={is_cautious(of.momentum):d}"
    library = build.load(SOURCE, (*types, *flags, f"LEAST={LEAST_SHARE}"))
    step, sizes = library.adafactor_step, library.adafactor_sizes
    step.argtypes = sizes.argtypes = [ctypes.c_void_p]
    step.restype = sizes.restype = None
    return Library(step, sizes, build.threads_of(library))


_forked = False


def _note_fork() -> None:
    """A forked child has the runtime of the threads, torch's or ours, but none of the threads that it would wait for."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def launches_of(members: Sequence[tuple[ShapeClass, Kernels, Cut]]) -> list[Launch]:
    """The launches that step these members; positions are those in this list."""
    launches = []
    for chosen in group_by_key(id(kernels) for _, kernels, _ in members).values():
        of, kernels, _ = members[chosen[0]]
        launches.append(Launch(kernels, of, chosen, [members[i][2] for i in chosen]))
    return launches
