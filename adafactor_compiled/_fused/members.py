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
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import State
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import Origin
from adafactor_compiled._state.shape_class import ShapeClass

STRIDED = torch.strided
P, G, ROW, COL, EXP_AVG, RMS = range(6)  # columns of addresses
NUMBERS = 7  # the last one, a row of numbers


class Placed(NamedTuple):
    """Of a piece of a DTensor: what is looked at of the whole."""

    param: DTensor
    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    address: int  # of the piece
    names: list[str]  # what of the state is a DTensor
    split: int | None  # see pieces.py; None for what is not split, and no piece
    origin: Origin


class Factor(NamedTuple):
    """A tensor of a member's state that has dimensions."""

    name: str
    tensor: Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)  # equal is what is the same: tensors would be compared by their elements
class Member:
    param: Tensor  # the whole, of a piece
    placed: Placed | None
    group: Group
    position: int  # counted over all groups
    of: ShapeClass  # of the parameter as kernels see it
    planned: Planned
    type: type
    device_index: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None  # None where all is contiguous, which is quicker to ask for
    grad_stride: tuple[int, ...]
    rows: Factor  # or all elements
    columns: Factor | None
    exp_avg: Factor | None
    rms: Tensor
    state_dtype: torch.dtype
    update_rms: Tensor
    update_rms_at: int
    spans: tuple[Span, ...]
    empty: bool  # a piece of nothing
    written: list[Tensor]
    looked_at: list[list[int]]  # addresses whose storages were looked at, the last ones


class Span(NamedTuple):
    """Memory of a member."""

    column: int  # of its address
    size: int  # bytes
    tensor: Tensor | None  # None for its gradient, the one that is not written


def member_of(entry: Entry, of: ShapeClass, update_rms: Tensor, placed: Placed | None = None) -> Member:
    """An entry whose gradient and state were checked; of this rank's pieces, where they are `placed`."""
    p, g, state = entry.param, entry.grad, entry.state

    def factor(name: str) -> Factor:
        x = state[name]
        return Factor(name, x, x.dtype, x.shape, x.stride())

    rms = state["RMS"]
    rows, columns = factor("exp_avg_sq_row" if of.factored else "exp_avg_sq"), factor("exp_avg_sq_col") if of.factored else None
    exp_avg = factor("exp_avg") if of.momentum is not None else None
    factors = [(column, x) for column, x in ((ROW, rows), (COL, columns), (EXP_AVG, exp_avg)) if x is not None]
    spans = [Span(P, bytes_of(p.shape, p.stride(), p.dtype), p), Span(G, bytes_of(g.shape, g.stride(), g.dtype), None)]
    spans += [Span(column, bytes_of(x.shape, x.stride, x.dtype), x.tensor) for column, x in factors]
    written = [p, *(x.tensor for _, x in factors), rms, update_rms]
    spans = [span for span in (*spans, Span(RMS, rms.element_size(), rms)) if span.size > 0]
    return Member(
        param=p if placed is None else placed.param,
        placed=placed,
        group=entry.group,
        position=entry.position,
        of=of,
        planned=planned(of, None if placed is None else placed.split),
        type=type(p),
        device_index=p.get_device(),
        dtype=p.dtype,
        grad_dtype=g.dtype,
        shape=p.shape,
        stride=None if p.is_contiguous() and g.is_contiguous() else p.stride(),
        grad_stride=g.stride(),
        rows=rows,
        columns=columns,
        exp_avg=exp_avg,
        rms=rms,
        state_dtype=rms.dtype,
        update_rms=update_rms,
        update_rms_at=update_rms.data_ptr(),
        spans=tuple(spans),
        empty=not p.numel(),
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
    index, shape, stride = x.device_index, x.shape, x.stride
    if (
        type(g) is not Tensor
        or type(p) is not x.type
        or g.layout is not STRIDED
        or p.dtype is not x.dtype
        or g.dtype is not x.grad_dtype
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
    elif p.stride() != stride or g.stride() != x.grad_stride:
        return None
    rms = state.get("RMS")
    if rms is not x.rms or rms.dtype is not x.state_dtype or rms.dim() or rms.get_device() != index:
        return None
    row = col = exp_avg = _address_of(x.rows, state, index)
    if x.columns is not None:
        col = _address_of(x.columns, state, index)
    if x.exp_avg is not None:
        exp_avg = _address_of(x.exp_avg, state, index)
    param, grad, of_rms = p.data_ptr(), g.data_ptr(), rms.data_ptr()
    if param and grad and row > 0 and col > 0 and exp_avg > 0 and of_rms:
        return param, grad, row, col, exp_avg, of_rms, x.update_rms_at
    if x.empty and row >= 0 and col >= 0 and exp_avg >= 0 and of_rms:
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


def _address_of(x: Factor, state: State, index: int) -> int:
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
