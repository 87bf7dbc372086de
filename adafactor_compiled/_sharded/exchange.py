"""What the ranks of a mesh add up in a step, for all their parameters: one flat buffer and one all_reduce.

A second, small all_reduce follows where a parameter has both its rows and its columns (or its slices and either) split, and
another one, of a number each, for the parameters whose updates are cautious.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from adafactor_compiled._state.moments import factored_dims, is_cautious, momentum_of
from adafactor_compiled._state.options import Group, wants_rounding
from adafactor_compiled._state.placements import Origin, Split, origin_of, split_dims, split_of, window_of
from adafactor_compiled._state.views import moved
from adafactor_compiled._update.numbers import to_device

Shape = tuple[int, ...]


class Slot(NamedTuple):
    """One parameter's places in the buffers of its mesh."""

    number: int  # among the parameters of the mesh
    split: Split
    window: list[slice]  # of this rank's piece; empty where nothing is laid out by the place of a piece
    origin: Origin | None  # where that piece begins, if it can be rounded stochastically
    counts: bool  # of replicas only the first adds its sums
    owns_rows: bool  # of the ranks that hold the same rows only the first adds what it knows of them
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    third: dict[str, Tensor]

    def add(self, **terms: Tensor) -> None:
        if self.counts:
            for name, term in terms.items():
                self.first[name].copy_(term)


class Kind(NamedTuple):
    """What the places of a parameter depend on beside itself."""

    dims: tuple[int, int] | None  # see `factored_dims`
    rounds: bool  # stochastically
    cautious: bool

    @classmethod
    def of(cls, param: DTensor, group: Group) -> Kind:
        cautious = is_cautious(momentum_of(param.dtype, group))
        return cls(factored_dims(param.shape, group), wants_rounding(param.dtype, group), cautious)

    def described(self) -> str:
        factored = "not factored" if self.dims is None else f"factored over {self.dims}"
        return factored + ", rounded stochastically" * self.rounds + ", cautious" * self.cautious

    def seen(self, param: DTensor) -> DTensor:
        """With its rows and columns last."""
        return cast(DTensor, moved(param, self.dims))


class Exchange:
    """The buffers of the parameters on one mesh, and the process group that adds them up.

    The layout depends on the parameters that are not frozen, and not on which of them have a gradient. Ranks that disagree on
    the gradients thus take part in the same all_reduce, and learn from it that they do. A frozen parameter takes part while it
    has a gradient: that, and what is frozen, must be the same on all ranks, or they wait for each other.

    Args:
        mesh: the mesh, which this rank is part of.
        params: (position in the optimizer, parameter) of everything on this mesh that may get a gradient.
        kinds: what else its places depend on.

    Raises:
        RuntimeError: on every rank, where the ranks' parameters differ.
    """

    def __init__(self, mesh: DeviceMesh, params: Sequence[tuple[int, DTensor]], kinds: Sequence[Kind]) -> None:
        _check_agreement(mesh, params, kinds)
        self.params, self.kinds = params, kinds
        summed = sorted({dim for _, param in params for dim in split_dims(param)})
        self.group = _group_over(mesh, summed)
        self.ranks = math.prod(mesh.size(dim) for dim in summed)
        dtype = torch.float64 if any(param.dtype == torch.float64 for _, param in params) else torch.float32
        self.device = device = params[0][1].to_local().device
        seen = [kind.seen(param) for (_, param), kind in zip(params, kinds, strict=True)]
        terms = [_terms(split_of(x, kind.dims is not None), tuple(x.shape)) for x, kind in zip(seen, kinds, strict=True)]
        self.first, first = _buffer(len(params), [x for x, _ in terms], dtype, device)
        self.second, second = _buffer(0, [x for _, x in terms], dtype, device)
        self.third, third = _buffer(0, [{"agreeing": ()} if kind.cautious else {} for kind in kinds], dtype, device)
        self.slots = {
            position: _slot(i, x, kind, summed, (first[i], second[i], third[i]))
            for i, ((position, _), x, kind) in enumerate(zip(params, seen, kinds, strict=True))
        }
        # A read would make every step wait for the device: there the copy is looked at before the next step.
        self.tells_late = device.type != "cpu"
        self._unread: tuple[Tensor, Tensor, torch.Event] | None = None

    def clear(self) -> None:
        """Start a step."""
        if self._unread is not None:
            present, expected, copied = self._unread
            self._unread = None
            copied.synchronize()
            self._check(present, expected, "an update of the last step is wrong")
        self.first.zero_()
        self.second.zero_()
        self.third.zero_()

    def sum_first(self, positions: Sequence[int]) -> None:
        """Add up the first buffer.

        Args:
            positions: the parameters that have a gradient on this rank.

        Raises:
            RuntimeError: where another rank's are others.
        """
        if self.group is None:
            return
        n = len(self.params)
        expected = torch.zeros(n, dtype=self.first.dtype, device="cpu")
        expected[[self.slots[position].number for position in positions]] = self.ranks
        present = self.first[:n]
        present.copy_(to_device(expected / self.ranks, present.device))
        dist.all_reduce(self.first, group=self.group)
        if not self.tells_late:
            self._check(present, expected, "nothing was stepped")
            return
        copied = torch.Event(present.device)
        self._unread = present.to("cpu", non_blocking=True), expected, copied
        copied.record()

    def sum(self, buffer: Tensor) -> None:
        """Add up another buffer."""
        if buffer.numel() and self.group is not None:
            dist.all_reduce(buffer, group=self.group)

    def _check(self, present: Tensor, expected: Tensor, outcome: str) -> None:
        if torch.equal(present, expected):
            return
        wrong = int((present != expected).nonzero()[0])
        position, param = self.params[wrong]
        raise RuntimeError(
            f"the gradient of parameter {position} (shape {tuple(param.shape)}, placements {param.placements}) should be "
            f"None on all of {self.ranks} ranks or on none but is there on: {int(present[wrong])}; {outcome}"
        )


def _terms(split: Split, shape: Shape) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The shapes of what the ranks add up of a parameter, in the first round and in the second."""
    always: dict[str, Shape] = {"param_sq": (), "nonfinite": ()}
    if split in (Split.VECTOR, Split.SLICES):
        return {**always, "update_sq": ()}, {}
    lead, of_rows, of_columns = shape[:-2], shape[:-1], shape[:-2] + shape[-1:]
    if split is Split.ROWS:
        return {**always, "row": lead, "col_sq": of_columns, "weighted_sq": of_columns}, {}
    if split is Split.COLUMNS:
        return {**always, "row_sq": of_rows, "weighted_sq": of_rows}, {}
    return {**always, "row_sq": of_rows, "col_sq": of_columns}, {"row": lead, "weighted_sq": lead}


def _buffer(
    head: int, terms: list[dict[str, Shape]], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A flat buffer of `head` elements and the terms of each parameter, and these as views of it."""
    sizes = [math.prod(shape) for of_param in terms for shape in of_param.values()]
    flat = torch.zeros(head + sum(sizes), dtype=dtype, device=device)
    views = iter(torch.split(flat[head:], sizes))
    return flat, [{name: next(views).view(shape) for name, shape in of_param.items()} for of_param in terms]


def _slot(index: int, param: DTensor, kind: Kind, summed: list[int], terms: tuple[dict[str, Tensor], ...]) -> Slot:
    factored = kind.dims is not None
    split, split_by, coordinate = split_of(param, factored), split_dims(param), param.device_mesh.get_coordinate() or ()
    of_rows = [dim for dim, tensor_dim in split_by.items() if tensor_dim != param.ndim - 1]
    return Slot(
        index,
        split,
        window=window_of(param) if split is Split.GRID else [],
        origin=origin_of(param, factored) if kind.rounds else None,
        counts=all(coordinate[dim] == 0 for dim in summed if dim not in split_by),
        owns_rows=all(coordinate[dim] == 0 for dim in summed if dim not in of_rows),
        first=terms[0],
        second=terms[1],
        third=terms[2],
    )


def _group_over(mesh: DeviceMesh, dims: list[int]) -> dist.ProcessGroup | None:
    """The ranks that differ from this one along these mesh dimensions alone; None where there are no others."""
    if len(dims) < 2:
        return mesh.get_group(dims[0]) if dims else None
    coordinate = mesh.get_coordinate() or ()
    ranks = sorted(mesh.mesh[tuple(slice(None) if dim in dims else at for dim, at in enumerate(coordinate))].flatten().tolist())
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    # Not DeviceMesh._flatten: from then on DTensor gathers over the flattened dimension, which permutes the rows of what
    # two dimensions split unevenly (torch 2.13).
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group


def _check_agreement(mesh: DeviceMesh, params: Sequence[tuple[int, DTensor]], kinds: Sequence[Kind]) -> None:
    """Raise RuntimeError on every rank of the mesh unless all ranks list the same parameters and options."""
    mine = [
        f"parameter {i} of shape {tuple(x.shape)}, {x.dtype}, {kind.described()}, placements {x.placements}"
        for (i, x), kind in zip(params, kinds, strict=True)
    ]
    digests = _gathered(mesh, hashlib.sha256("\n".join(mine).encode()).hexdigest())
    if len(set(digests.values())) == 1:
        return
    lists = _gathered(mesh, mine)
    (a, first), (b, second) = next(((a, x), (b, y)) for a, x in lists.items() for b, y in lists.items() if x != y)
    i = next(i for i in range(max(len(first), len(second))) if first[i : i + 1] != second[i : i + 1])
    was = " and ".join(f"{(x[i : i + 1] or ['nothing'])[0]} on rank {rank}" for rank, x in ((a, first), (b, second)))
    raise RuntimeError(f"every rank should step the same DTensor parameters but there is {was}; nothing was stepped")


def _gathered(mesh: DeviceMesh, value: Any) -> dict[int, Any]:
    """The value of each rank of a mesh, by its global rank."""
    values = {dist.get_rank(): value}
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        received: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(received, values, group=group)
        values = {rank: x for of_rank in received for rank, x in of_rank.items()}
    return dict(sorted(values.items()))
