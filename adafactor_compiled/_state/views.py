"""Parameters that are factored over other dimensions than their last two, as views whose last two these are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import factored_dims
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import Origin, origin_of


def is_moved(entry: Entry) -> bool:
    return dims_last(entry.param, entry.group) is not entry.param


def with_dims_last(entries: list[Entry], positions: Sequence[int]) -> list[Entry]:
    """The entries, those at `positions` as views."""
    if not positions:
        return entries
    entries = list(entries)
    for i in positions:
        entries[i] = _moved(entries[i])
    return entries


def dims_last(x: Tensor, group: Group) -> Tensor:
    """A parameter, or what has its dimensions, with rows and columns last."""
    return moved(x, factored_dims(x.shape, group))


def moved(x: Tensor, dims: tuple[int, int] | None) -> Tensor:
    return x if dims in (None, (x.ndim - 2, x.ndim - 1)) else x.detach().movedim(dims, (-2, -1))


def origin_in(param: Tensor, group: Group, index: int) -> Origin:
    """Where a parameter, or this rank's piece of it, begins for stochastic rounding.

    Raises:
        ValueError: it cannot be rounded stochastically.
    """
    if not isinstance(param, DTensor):
        return Origin()
    dims = factored_dims(param.shape, group)
    origin = origin_of(cast(DTensor, moved(param, dims)), dims is not None)
    if origin is None:
        raise ValueError(
            "`stochastic_rounding` draws by an element's place and needs pieces contiguous in slices, rows and columns "
            f"but parameter {index} of shape {tuple(param.shape)} has placements {param.placements} on {param.device_mesh}"
        )
    return origin


def _moved(entry: Entry) -> Entry:
    state, group = dict(entry.state), entry.group
    row, column = factored_dims(entry.param.shape, group) or (-2, -1)
    state["exp_avg_sq_row"] = state["exp_avg_sq_row"].movedim(row, -1)
    state["exp_avg_sq_col"] = state["exp_avg_sq_col"].movedim(column - 1, -1)
    if entry.group["beta1"] is not None:
        state["exp_avg"] = dims_last(state["exp_avg"], group)
    return entry._replace(param=dims_last(entry.param, group), grad=dims_last(entry.grad, group), state=state)
