"""Parameters that are factored over other dimensions than their last two, as views whose last two these are."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.moments import factored_dims
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.placements import Origin, origin_of


def with_dims_last(entry: Entry) -> Entry:
    """An entry as views, with rows and columns last; itself where they are."""
    position, param, grad, state, group = entry
    dims = factored_dims(param.shape, group)
    if dims is None or moved(param, dims) is param:
        return entry
    row, col = state["exp_avg_sq_row"].movedim(dims[0], -1), state["exp_avg_sq_col"].movedim(dims[1] - 1, -1)
    of_momentum = {} if group["beta1"] is None else {"exp_avg": moved(state["exp_avg"], dims)}
    state = {**state, "exp_avg_sq_row": row, "exp_avg_sq_col": col, **of_momentum}
    return Entry(position, moved(param, dims), moved(grad, dims), state, group)


def moved(x: Tensor, dims: tuple[int, int] | None) -> Tensor:
    """A parameter, or what has its dimensions, with these last."""
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
