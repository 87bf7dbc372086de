"""A member as it was when its place in a launch was decided: kernels, which know only addresses, rely on all of it.

Its tensors are looked at in each step, state included: see `_state/guard.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from adafactor_compiled._fused.launches import Planned, planned
from adafactor_compiled._fused.pieces import COL, EXP_AVG, RMS, ROW, G, P
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import State
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import Origin, address_of, piece_of
from adafactor_compiled._state.shape_class import ShapeClass


class Placed(NamedTuple):
    """Of a piece of a DTensor: what is looked at of the whole."""

    param: DTensor
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    address: int  # of the piece
    names: list[str]  # what of the state is a DTensor
    split: int | None  # see pieces.py; None for what is not split, and no piece
    origin: Origin


class Span(NamedTuple):
    """Memory of a member."""

    column: int  # of its address
    size: int  # bytes
    tensor: Tensor | None  # None for its gradient, the one that is not written


@dataclass(frozen=True, eq=False, slots=True)  # equal is what is the same: tensors would be compared by their elements
class Member:
    param: Tensor  # the whole, of a piece
    placed: Placed | None
    group: Group
    position: int  # counted over all groups
    of: ShapeClass  # of the parameter as kernels see it
    planned: Planned
    kept: dict[str, Tensor]  # what kernels touch of its state
    kept_in: Callable[[State], tuple[Tensor, ...]]  # the same of a state as it is now
    places: tuple[int, ...]  # among these, of the addresses of rows, columns, momentum and RMS
    update_rms: Tensor
    spans: tuple[Span, ...]
    written: list[Tensor]


def member_of(entry: Entry, of: ShapeClass, update_rms: Tensor, placed: Placed | None = None) -> Member:
    """An entry whose gradient and state were checked; of this rank's pieces, where they are `placed`."""
    position, p, g, state, group = entry
    columns = {ROW: "exp_avg_sq_row", COL: "exp_avg_sq_col"} if of.factored else {ROW: "exp_avg_sq"}
    columns |= ({} if of.momentum is None else {EXP_AVG: "exp_avg"}) | {RMS: "RMS"}
    spans = [Span(P, _bytes(p), p), Span(G, _bytes(g), None)]
    spans += [Span(at, _bytes(state[name]), state[name]) for at, name in columns.items()]
    kept, place = {name: state[name] for name in columns.values()}, dict(zip(columns, range(len(columns)), strict=True))
    written = [p, *kept.values(), update_rms]
    return Member(
        param=p if placed is None else placed.param,
        placed=placed,
        group=group,
        position=position,
        of=of,
        planned=planned(of, None if placed is None else placed.split, (p.data_ptr() | g.data_ptr()) % 16 == 0),
        kept=kept,
        kept_in=itemgetter(*kept),
        places=tuple(place.get(column, 0) for column in (ROW, COL, EXP_AVG, RMS)),
        update_rms=update_rms,
        spans=tuple(span for span in spans if span.size > 0),
        written=[x for x in written if not x.is_inference()],  # what was made in inference mode has no version
    )


def _bytes(x: Tensor) -> int:
    return bytes_of(x.shape, x.stride(), x.dtype)


def bytes_of(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """From the first element to the last one."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * dtype.itemsize


def are_placed(members: Sequence[Member], params: Sequence[Any], grads: Sequence[Any]) -> bool:
    """Whether what is placed is placed as it was, and gradients are as their parameters."""
    for x, p, g in zip(members, params, grads, strict=True):
        if x.placed is not None:
            _, mesh, placements, address, *_ = x.placed
            alike = type(p) is type(g) is DTensor and p.device_mesh is g.device_mesh is mesh
            if not alike or p.placements != placements or g.placements != placements or address_of(p) != address:
                return False
    return True


def of_this_rank(
    members: Sequence[Member], params: list[Tensor], grads: list[Tensor], states: list[State]
) -> tuple[list[Tensor], list[Tensor], list[State]]:
    """The same lists; of what is placed, the pieces of this rank.

    Raises:
        LookupError: a state lacks something.
    """
    params, grads, states = params[:], grads[:], states[:]
    for i, x in enumerate(members):
        if x.placed is not None:
            p, g, *of_state = (
                piece_of(whole) for whole in (params[i], grads[i], *(states[i][name] for name in x.placed.names))
            )
            params[i], grads[i], states[i] = p, g, {**states[i], **dict(zip(x.placed.names, of_state, strict=True))}
    return params, grads, states
