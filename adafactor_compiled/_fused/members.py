"""A member as it was when its place in a launch was decided: what a step looks at before kernels, which know addresses, run.

Dtype, device, shape, strides and address of every tensor, state included, are looked at in each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._state.shape_class import ShapeClass

STRIDED = torch.strided


class Placed(NamedTuple):
    """Of a piece of a DTensor: what is looked at of the whole."""

    param: DTensor
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    address: int  # of the piece
    names: list[str]  # what of the state is a DTensor
    split: int | None  # see pieces.py; None for what is not split, and no piece
    origin: Origin


class Kept(NamedTuple):
    """A tensor of a member's state as it was."""

    name: str
    tensor: Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class Looks(NamedTuple):
    """How parameter and gradient were."""

    type: type
    device_index: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None  # None where all is contiguous, which is quicker to ask for
    grad_stride: tuple[int, ...]


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
    looks: Looks
    rows: Kept  # or all elements
    columns: Kept | None
    exp_avg: Kept | None
    rms: Tensor
    update_rms: Tensor
    update_rms_at: int
    spans: tuple[Span, ...]
    written: list[Tensor]
    looked_at: list[list[int]]  # addresses whose storages were looked at, the last ones


def member_of(entry: Entry, of: ShapeClass, update_rms: Tensor, placed: Placed | None = None) -> Member:
    """An entry whose gradient and state were checked; of this rank's pieces, where they are `placed`."""
    position, p, g, state, group = entry
    names = {ROW: "exp_avg_sq_row", COL: "exp_avg_sq_col"} if of.factored else {ROW: "exp_avg_sq"}
    names |= ({} if of.momentum is None else {EXP_AVG: "exp_avg"}) | {RMS: "RMS"}
    kept = {at: Kept(name, x, x.dtype, x.shape, x.stride()) for at, name in names.items() for x in (state[name],)}
    spans = [Span(P, bytes_of(p.shape, p.stride(), p.dtype), p), Span(G, bytes_of(g.shape, g.stride(), g.dtype), None)]
    spans += [Span(at, bytes_of(x.shape, x.stride, x.dtype), x.tensor) for at, x in kept.items()]
    written = [p, *(x.tensor for x in kept.values()), update_rms]
    contiguous = p.is_contiguous() and g.is_contiguous()
    return Member(
        param=p if placed is None else placed.param,
        placed=placed,
        group=group,
        position=position,
        of=of,
        planned=planned(of, None if placed is None else placed.split),
        looks=Looks(type(p), p.get_device(), p.dtype, g.dtype, p.shape, None if contiguous else p.stride(), g.stride()),
        rows=kept[ROW],
        columns=kept.get(COL),
        exp_avg=kept.get(EXP_AVG),
        rms=state["RMS"],
        update_rms=update_rms,
        update_rms_at=update_rms.data_ptr(),
        spans=tuple(span for span in spans if span.size > 0),
        written=[x for x in written if not x.is_inference()],  # what was made in inference mode has no version
        looked_at=[],
    )


def bytes_of(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """From the first element to the last one."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * dtype.itemsize


def addresses_in(x: Member, p: Tensor, g: Tensor, state: State) -> tuple[int, ...] | None:
    """Where the tensors of a member lie, all but its numbers; None where anything is not as it was, or has no memory."""
    kind, index, dtype, grad_dtype, shape, stride, grad_stride = x.looks
    if (
        type(g) is not Tensor
        or type(p) is not kind
        or g.layout is not STRIDED
        or p.dtype is not dtype
        or g.dtype is not grad_dtype
        or p.shape != shape
        or g.shape != shape
        or p.get_device() != index
        or g.get_device() != index
        or g.is_neg()
        or p.is_neg()
    ):
        return None
    if stride is None:
        if not (p.is_contiguous() and g.is_contiguous()):
            return None
    elif p.stride() != stride or g.stride() != grad_stride:
        return None
    rms, rows, columns, momentum = x.rms, x.rows, x.columns, x.exp_avg
    if state.get("RMS") is not rms or rms.dtype is not rows.dtype or rms.dim() or rms.get_device() != index:
        return None
    row = col = exp_avg = _address_of(rows, state, index)
    if columns is not None:
        col = _address_of(columns, state, index)
    if momentum is not None:
        exp_avg = _address_of(momentum, state, index)
    param, grad, of_rms = p.data_ptr(), g.data_ptr(), rms.data_ptr()
    there = param and grad and row > 0 and col > 0 and exp_avg > 0
    if of_rms and (there or (not p.numel() and row >= 0 and col >= 0 and exp_avg >= 0)):  # a piece may be empty
        return param, grad, row, col, exp_avg, of_rms, x.update_rms_at
    return None


def of_this_rank(x: Placed, p: Tensor, g: Tensor, state: State) -> tuple[Tensor, Tensor, State] | None:
    """The piece of a parameter, of its gradient and its state; None where they are not placed as they were."""
    if type(p) is not DTensor or type(g) is not DTensor or p.device_mesh is not x.mesh or g.device_mesh is not x.mesh:
        return None
    if p.placements != x.placements or g.placements != x.placements:
        return None
    state = state.copy()
    for name in x.names:
        whole = state.get(name)
        if type(whole) is not DTensor:
            return None
        state[name] = whole.to_local()
    piece = p.to_local()
    return None if piece.data_ptr() != x.address else (piece, g.to_local(), state)


def _address_of(x: Kept, state: State, index: int) -> int:
    """-1 where it is not as it was."""
    name, tensor, dtype, shape, stride = x
    if (
        state.get(name) is not tensor
        or tensor.dtype is not dtype
        or tensor.shape != shape
        or tensor.stride() != stride
        or tensor.get_device() != index
    ):
        return -1
    address: int = tensor.data_ptr()
    return address
