"""What the ranks of a mesh add up in a step, for all their parameters: one flat buffer and one all_reduce.

A second, small all_reduce follows where a parameter has both its rows and its columns (or its slices and either) split, and
another one, of a number each, for the parameters whose updates are cautious.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from adafactor_compiled._sharded.agreement import agreed, can_sum, group_over
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.moments import factored_dims, is_cautious, momentum_of
from adafactor_compiled._state.options import Group, wants_rounding
from adafactor_compiled._state.placements import Origin, Split, origin_of, split_dims, split_of, window_of
from adafactor_compiled._state.views import moved
from adafactor_compiled._update.numbers import to_device

Shape = tuple[int, ...]


class Slot(NamedTuple):
    """One parameter's places in the buffers of its mesh."""

    split: Split
    window: list[slice]  # of this rank's piece; empty where nothing is laid out by the place of a piece
    origin: Origin | None  # where that piece begins, if it can be rounded stochastically
    counts: bool  # of replicas only the first adds its sums
    owns_rows: bool  # of the ranks that hold the same rows only the first adds what it knows of them
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    third: dict[str, Tensor]

    def add(self, **terms: Tensor) -> None:
        for name, term in terms.items():
            self.first[name].copy_(term)


class Buffer(NamedTuple):
    flat: Tensor  # in float64 for parameters of any dtype: sums are few, and kernels know one kind
    replicas: list[Tensor]  # parts whose sums another rank adds


class Kind(NamedTuple):
    """What the places of a parameter depend on beside itself."""

    dtype: torch.dtype
    dims: tuple[int, int] | None  # see `factored_dims`
    rounds: bool  # stochastically
    cautious: bool

    @classmethod
    def of(cls, param: DTensor, group: Group) -> Kind:
        cautious = is_cautious(momentum_of(param.dtype, group))
        return cls(param.dtype, factored_dims(param.shape, group), wants_rounding(param.dtype, group), cautious)

    def described(self) -> str:
        factored = "not factored" if self.dims is None else f"factored over {self.dims}"
        return factored + ", rounded stochastically" * self.rounds + ", cautious" * self.cautious

    def seen(self, param: DTensor) -> DTensor:
        """With its rows and columns last."""
        return cast(DTensor, moved(param, self.dims))


class Exchange:
    """The buffers of the parameters on one mesh and device, and the process group that adds them up.

    Each parameter has a place where ranks count who has its gradient: those that disagree take part in the same all_reduce, and
    learn from it that they do. The sums of a parameter get places when it is to be stepped or first has a gradient, on all
    ranks alike, and keep them: to freeze parameters changes nothing.

    Args:
        mesh: the mesh, which this rank is part of.
        params: (position in the optimizer, parameter) of everything on this mesh and device.
        kinds: what else its places depend on.

    Raises:
        RuntimeError: on every rank, where the ranks' parameters differ.
    """

    def __init__(self, mesh: DeviceMesh, params: Sequence[tuple[int, DTensor]], kinds: Sequence[Kind]) -> None:
        self.mesh, self.params, self.kinds = mesh, params, kinds
        self._numbers = {position: i for i, (position, _) in enumerate(params)}
        mine = [
            f"parameter {i} of shape {tuple(x.shape)}, {kind.dtype}, {kind.described()}, placements {x.placements}"
            for (i, x), kind in zip(params, kinds, strict=True)
        ]
        wanted = [i for i, (_, x) in enumerate(params) if x.requires_grad or x.grad is not None]
        self._summed = agreed(mesh, mine, wanted)
        self._dims = sorted({dim for _, param in params for dim in split_dims(param)})
        self.group = group_over(mesh, self._dims)
        self.ranks = math.prod(mesh.size(dim) for dim in self._dims)
        self.device = device_of(params[0][1])
        there = self.device if self.group is None or can_sum(self.group, self.device) else torch.device(mesh.device_type)
        self._sent = there, torch.float64 if any(kind.dtype is torch.float64 for kind in kinds) else torch.float32
        # A read would make every step wait for the device: there the copy is looked at before the next step.
        self.tells_late = self.device.type != "cpu"
        self._unread: tuple[Tensor, Tensor, torch.Event] | None = None
        self._expected: tuple[list[int], Tensor] = [-1], torch.empty(0)
        self._present = torch.empty(0)
        self._lay_out()

    def _lay_out(self) -> None:
        """Those parameters together which the same ranks have: a rank adds the sums of all of them or of none."""
        split = {i: split_dims(self.params[i][1]) for i in self._summed}
        together = group_by_key(tuple(x) for x in split.values()).values()
        chosen = [list(split)[j] for run in together for j in run]
        counts = [_is_first(self.mesh, self._dims, split[i]) for i in chosen]
        ends = torch.tensor([0, *map(len, together)], device="cpu").cumsum(0).tolist()
        replicas = [(a, b) for a, b in pairwise(ends) if not counts[a]]
        seen = [self.kinds[i].seen(self.params[i][1]) for i in chosen]
        terms = [_terms(split_of(x, self.kinds[i].dims is not None), x.shape) for i, x in zip(chosen, seen, strict=True)]
        agreeing: list[dict[str, Shape]] = [{"agreeing": ()} if self.kinds[i].cautious else {} for i in chosen]
        with torch.inference_mode(False):  # steps outside of it could not write to what is made in it
            self.first, first = self._buffer(len(self.params) + 1, [x for x, _ in terms], replicas)
            self.second, second = self._buffer(0, [x for _, x in terms], [])
            self.third, third = self._buffer(0, agreeing, replicas)
        places = zip(first, second, third, strict=True)
        self.slots = {
            self.params[i][0]: _slot(x, self.kinds[i], self._dims, counts[j], of)
            for j, (i, x, of) in enumerate(zip(chosen, seen, places, strict=True))
        }

    def _buffer(
        self, head: int, terms: list[dict[str, Shape]], replicas: list[tuple[int, int]]
    ) -> tuple[Buffer, list[dict[str, Tensor]]]:
        """`head` numbers and the terms of each parameter, these also as views; `replicas` are ranges of parameters."""
        sizes = [[math.prod(shape) for shape in x.values()] for x in terms]
        starts = [head]
        for of_param in sizes:
            starts.append(starts[-1] + sum(of_param))
        flat = torch.zeros(starts[-1], dtype=torch.float64, device=self.device)
        views = iter(torch.split(flat[head:], [size for of_param in sizes for size in of_param]))
        of_params = [{name: next(views).view(shape) for name, shape in x.items()} for x in terms]
        return Buffer(flat, [flat[starts[a] : starts[b]] for a, b in replicas]), of_params

    def described(self) -> list[tuple[int, int, Kind, torch.device]]:
        """What it was made for: position, identity, kind and device of each parameter."""
        return [(i, id(x), kind, self.device) for (i, x), kind in zip(self.params, self.kinds, strict=True)]

    def clear(self) -> None:
        for buffer in (self.first, self.second, self.third):
            if buffer.flat.numel():
                buffer.flat.zero_()

    def told(self) -> RuntimeError | None:
        """That ranks have disagreed in the last step, where that could not be told then."""
        if self._unread is None:
            return None
        present, expected, copied = self._unread
        self._unread = None
        copied.synchronize()
        return self._error(present, expected, "an update of the last step is wrong")

    def sum_first(self, positions: Collection[int], disagreed: Tensor | None) -> Tensor | None:
        """Add up the first buffer; gives whether ranks disagree on gradients, 0-dim, where there are several.

        Args:
            positions: of the parameters that have a gradient on this rank.
            disagreed: whether those of another mesh do, which its ranks tell the others.
        """
        if self.group is None:
            return disagreed
        head = len(self.params) + 1
        numbers = [self._numbers[position] for position in positions if position in self._numbers]
        if numbers != self._expected[0]:
            expected = torch.zeros(head, dtype=torch.float64, device="cpu")
            expected[numbers] = 1
            self._expected = numbers, expected
        present = self.first.flat[:head].copy_(to_device(self._expected[1], self.device))
        if disagreed is not None:
            present[-1].copy_(disagreed)
        self.sum(self.first)
        self._present = present.clone()
        return (self._present != to_device(self._expected[1] * self.ranks, self.device)).any()

    def sum(self, buffer: Buffer) -> None:
        flat = buffer.flat
        if not flat.numel() or self.group is None:
            return
        for x in buffer.replicas:
            x.zero_()
        sent = flat.to(*self._sent)
        dist.all_reduce(sent, group=self.group)
        if sent is not flat:
            flat.copy_(sent)

    def found(self) -> RuntimeError | None:
        """That ranks disagree, as the first buffer says; or that is looked at before the next step."""
        if self.group is None:
            return None
        expected = self._expected[1] * self.ranks
        if not self.tells_late:
            return self._error(self._present, expected, "nothing was stepped")
        copied = torch.Event(self.device)
        self._unread = self._present.to("cpu", non_blocking=True), expected, copied
        copied.record()
        return None

    def admit(self, positions: Collection[int]) -> None:
        """Give places to the sums of parameters that have their first gradient, as all ranks have seen."""
        new = {self._numbers[position] for position in positions if position in self._numbers} - set(self._summed)
        if new:
            self._summed = sorted({*self._summed, *new})
            self._lay_out()

    def _error(self, present: Tensor, expected: Tensor, outcome: str) -> RuntimeError | None:
        if torch.equal(present, expected):
            return None
        wrong = int((present != expected).nonzero()[0])
        if wrong == len(self.params):
            return RuntimeError(f"ranks of another mesh disagree on gradients, and say there on which; {outcome}")
        position, param = self.params[wrong]
        return RuntimeError(
            f"the gradient of parameter {position} (shape {tuple(param.shape)}, placements {param.placements}) should be "
            f"None on all of {self.ranks} ranks or on none but is there on: {int(present[wrong])}; {outcome}"
        )


def device_of(param: DTensor) -> torch.device:
    """That of its piece, which is not its mesh's where parameters are offloaded."""
    return param.to_local().device


def _terms(split: Split, shape: Shape) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The shapes of what the ranks add up of a parameter, in the first round and in the second; _fused knows this order."""
    always: dict[str, Shape] = {"param_sq": (), "nonfinite": ()}
    if split in (Split.VECTOR, Split.SLICES):
        return {**always, "update_sq": ()}, {}
    lead, of_rows, of_columns = shape[:-2], shape[:-1], shape[:-2] + shape[-1:]
    if split is Split.ROWS:
        return {**always, "row": lead, "col_sq": of_columns, "weighted_sq": of_columns}, {}
    if split is Split.COLUMNS:
        return {**always, "row_sq": of_rows, "weighted_sq": of_rows}, {}
    return {**always, "row_sq": of_rows, "col_sq": of_columns}, {"row": lead, "weighted_sq": lead}


def _slot(param: DTensor, kind: Kind, summed: list[int], counts: bool, terms: tuple[dict[str, Tensor], ...]) -> Slot:
    factored = kind.dims is not None
    split, split_by = split_of(param, factored), split_dims(param)
    of_rows = [dim for dim, tensor_dim in split_by.items() if tensor_dim != param.ndim - 1]
    return Slot(
        split,
        window=window_of(param) if split is Split.GRID else [],
        origin=origin_of(param, factored) if kind.rounds else None,
        counts=counts,
        owns_rows=_is_first(param.device_mesh, summed, of_rows),
        first=terms[0],
        second=terms[1],
        third=terms[2],
    )


def _is_first(mesh: DeviceMesh, summed: Sequence[int], split: Collection[int]) -> bool:
    """Whether this rank is the first one of those that have the same of what these mesh dimensions split."""
    coordinate = mesh.get_coordinate() or ()
    return all(coordinate[dim] == 0 for dim in summed if dim not in split)
