"""The fused kernels of all devices, by one vocabulary.

A *member* is a parameter that kernels step, with its gradient and state. A *launch* steps many members of the same types, on
one device, from tables: where the tensors of each lie (`ADDRESSES`), its `Numbers`, and how each is cut into units of work,
which shapes alone decide. On a CPU a launch is a call of C++ (cpu/), on a GPU some kernels of Triton's (gpu/).

Of a parameter that ranks share, a member is the *piece* of this one. Its launch is called twice: what it sums, ranks add up
before the second call; for cautious steps thrice.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adafactor_compiled._fused.cpu import launches as cpu
from adafactor_compiled._fused.cpu import layout as cpu_layout
from adafactor_compiled._fused.gpu import launches as gpu
from adafactor_compiled._fused.gpu import layout as gpu_layout
from adafactor_compiled._fused.pieces import ADDRESSES as ADDRESSES
from adafactor_compiled._fused.pieces import STEP, Piece
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.shape_class import ShapeClass

Kernels = cpu_layout.Kernels | gpu_layout.Kernels


class Launch(Protocol):
    """Members that are stepped together; `positions` are theirs among those of a step."""

    shape_class: ShapeClass  # of its first member
    positions: list[int]
    ran: bool  # whether the last run did all of it

    @property
    def kernels(self) -> Kernels: ...

    def forget(self) -> None:
        """Keep nothing on the device: in the memory of a CUDA graph, where it may lie, nothing may stay."""

    def share(self, pieces: Sequence[Piece | None]) -> None:
        """Say which members are pieces."""

    def run(
        self, addresses: array[int], numbers: array[float] | Tensor, draws: Tensor | None, call: int = STEP
    ) -> array[int] | None:
        """Step the members, or take the statistics of those that are pieces.

        Args:
            addresses: `ADDRESSES` of each, of memory that was checked.
            numbers: rows of `Numbers`; a tensor of [rows, len(Numbers)] on the device of the members, or on the host.
            draws: for stochastic rounding, int32 of shape [members, DRAWS].

        Returns:
            Of each member whether it was skipped for a gradient with NaN or inf, 1 or 0; None where kernels skip none.
        """


def kernels_of(of: ShapeClass, split: int | None = None) -> Kernels | None:
    """None for what has no kernels: it is stepped by operations of torch; `split` says what ranks split of a piece."""
    if gpu_layout.is_gpu(of.device):
        return gpu_layout.kernels_of(of, split)
    return cpu_layout.kernels_of(of, split)


def skips_by_itself(device: torch.device) -> bool:
    """Whether kernels look at gradients before they write: those of a CPU do."""
    return device.type == "cpu" and not gpu_layout.is_gpu(device) and not torch.compiler.is_compiling()


class Planned(NamedTuple):
    """What shapes alone decide of a member."""

    of: ShapeClass
    kernels: Kernels
    cut: Any  # into units of work, as those who launch these kernels know it


def planned(of: ShapeClass, split: int | None = None, aligned: bool = True) -> Planned:
    """Of a member that has kernels, see `kernels_of`; `aligned`, parameter and gradient begin at multiples of 16."""
    kernels = kernels_of(of, split)
    assert kernels is not None
    if isinstance(kernels, cpu_layout.Kernels):
        return Planned(of, kernels, cpu_layout.cut_of(of, split))
    return Planned(of, kernels._replace(sixteens=kernels.sixteens and aligned), gpu_layout.cut_of(kernels, of))


def launches_of(members: Sequence[Planned]) -> list[Launch]:
    """The launches that step these members of one step."""
    launches: list[Launch] = []
    for on_gpu, chosen in group_by_key(isinstance(x.kernels, gpu_layout.Kernels) for x in members).items():
        some: list[Any] = [members[i] for i in chosen]
        for launch in gpu.launches_of(some) if on_gpu else cpu.launches_of(some):
            launch.positions = [chosen[i] for i in launch.positions]
            launches.append(launch)
    return launches


_ready: dict[Kernels, float] = {}  # the seconds that it took


def make_ready(kernels: Kernels) -> None:
    """Have kernels compiled.

    Raises:
        Unavailable: on a CPU; whatever Triton raises, on a GPU.
    """
    if kernels not in _ready:
        start = time.perf_counter()
        if isinstance(kernels, cpu_layout.Kernels):
            cpu.library_of(kernels)
        else:
            gpu.try_out(kernels)
        _ready[kernels] = time.perf_counter() - start


def is_ready(kernels: Kernels) -> bool:
    return kernels in _ready


def seconds_of(kernels: Kernels) -> float | None:
    """What compiling took in this process; None where nothing is compiled."""
    return _ready.get(kernels)
