"""This rank's pieces as members of launches: which have kernels, and where ranks add up what they sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

from torch.distributed.tensor import DTensor

from adafactor_compiled._fused.members import Member, Placed
from adafactor_compiled._fused.pieces import COLUMNS, NEITHER, ROWS, Piece
from adafactor_compiled._sharded.exchange import Slot
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import factored_dims
from adafactor_compiled._state.options import wants_rounding
from adafactor_compiled._state.placements import Origin, Split, address_of, local, split_dims, split_of
from adafactor_compiled._state.views import origin_in

SPLITS = {Split.VECTOR: NEITHER, Split.SLICES: NEITHER, Split.ROWS: ROWS, Split.COLUMNS: COLUMNS}


def placed_of(entry: Entry) -> Placed | None:
    """None for what no kernels step: rows and columns that are both split.

    Raises:
        ValueError: it is to be rounded stochastically, and cannot be.
    """
    param, group = cast(DTensor, entry.param), entry.group
    split = SPLITS.get(split_of(param, factored_dims(param.shape, group) is not None))
    if split is None:
        return None
    names = [key for key, x in entry.state.items() if isinstance(x, DTensor)]
    origin = origin_in(param, group, entry.position) if wants_rounding(param.dtype, group) else Origin()
    split, placements = split if split_dims(param) else None, tuple(param.placements)
    return Placed(param, param.device_mesh, placements, address_of(param), names, split, origin)


def localized(entry: Entry) -> Entry:
    """This rank's pieces alone."""
    state = {key: x.to_local() if isinstance(x, DTensor) else x for key, x in entry.state.items()}
    return entry._replace(param=cast(DTensor, entry.param).to_local(), grad=local(entry.grad), state=state)


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
