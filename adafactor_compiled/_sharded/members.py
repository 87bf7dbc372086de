"""This rank's pieces as members of launches: which have kernels, and where ranks add up what they sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._fused.launches import kernels_of, skips_by_itself
from adafactor_compiled._fused.members import Member, Placed, member_of
from adafactor_compiled._fused.pieces import COLUMNS, NEITHER, ROWS, Piece
from adafactor_compiled._sharded.exchange import Slot
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import factored_dims
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.placements import Origin, Split, address_of, local, split_dims, split_of
from adafactor_compiled._state.shape_class import class_of
from adafactor_compiled._state.views import origin_in

SPLITS = {Split.VECTOR: NEITHER, Split.SLICES: NEITHER, Split.ROWS: ROWS, Split.COLUMNS: COLUMNS}


def member_of_piece(entry: Entry, update_rms: Tensor) -> Member | None:
    """This rank's piece of a DTensor; None for what no kernels step, as where rows and columns are both split.

    Raises:
        ValueError: it is to be rounded stochastically, and cannot be.
    """
    param, group = cast(DTensor, entry.param), entry.group
    factored, piece = factored_dims(param.shape, group) is not None, param.to_local()
    split = SPLITS.get(split_of(param, factored))
    if split is None or piece.dtype != param.dtype:  # a DTensor whose `data` was set, which its piece does not learn of
        return None
    if split_dims(param) and group["nonfinite"] == "skip" and not skips_by_itself(piece.device):
        return None  # whether it is to be undone is another number that ranks add up, which only operations of torch do
    names = [key for key, x in entry.state.items() if isinstance(x, DTensor)]
    state = {**entry.state, **{key: entry.state[key].to_local() for key in names}}
    of_rank = entry._replace(param=piece, grad=local(entry.grad), state=state)
    of, of_piece = class_of(of_rank)._replace(factored=factored), split if split_dims(param) else None
    origin = origin_in(param, group, entry.position) if wants_rounding(param.dtype, group) else Origin()
    if kernels_of(of, of_piece) is None:
        return None
    placed = Placed(param, param.device_mesh, tuple(param.placements), address_of(param), names, of_piece, origin)
    return member_of(of_rank, of, update_rms, placed)


def pieces_of(members: Sequence[Member], slots: Mapping[int, Slot]) -> list[Piece | None]:
    """Of each member; None for what is a whole parameter."""
    return [None if x.placed is None or x.placed.split is None else _piece_of(x, slots[x.position]) for x in members]


def _piece_of(x: Member, slot: Slot) -> Piece:
    shape = x.param.shape
    rows, columns = shape[-2:] if len(shape) > 1 else (1, math.prod(shape))
    agree = slot.third["agreeing"].data_ptr() if slot.third else 0
    assert x.placed is not None
    assert x.placed.split is not None
    return Piece(slot.first["param_sq"].data_ptr(), agree, x.placed.split, x.param.numel(), rows, columns)
