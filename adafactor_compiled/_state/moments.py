"""The state of a parameter: transformers' keys, shapes and dtypes; made, checked and completed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import UninitializedParameter

from adafactor_compiled._state import placements
from adafactor_compiled._state.layout import compute_dtype, contiguous_stride, same_layout
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.warn import warn

State = dict[str, Any]


SECOND_MOMENTS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")  # in the order of the fields of Member
KEYS = ("step", "RMS", "exp_avg", *SECOND_MOMENTS)  # ours; users keep other things in a state


class Momentum(NamedTuple):
    dtype: torch.dtype
    cautious: bool


def is_cautious(momentum: Momentum | None) -> bool:
    return momentum is not None and momentum.cautious


def momentum_of(dtype: torch.dtype, group: Group) -> Momentum | None:
    """That of a parameter of `dtype`."""
    if group["beta1"] is None:
        return None
    return Momentum(group["momentum_dtype"] or compute_dtype(dtype), group["cautious"])


def factored_dims(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, int] | None:
    """Which dimensions are the rows and the columns, in this order; None where the second moment is kept whole."""
    if len(shape) < 2:
        return None
    dims = sorted(largest_dims(shape)) if group["factor_dims"] == "largest" else [len(shape) - 2, len(shape) - 1]
    if min(shape[dim] for dim in dims) < group["min_dim_size_to_factor"]:
        return None
    return dims[0], dims[1]


def largest_dims(shape: Sequence[int]) -> list[int]:
    """The second largest dimension and the largest one; of equal ones the last."""
    return sorted(range(len(shape)), key=lambda dim: (shape[dim], dim))[-2:]


def shapes_of(param: Tensor, group: Mapping[str, Any]) -> dict[str, list[int]]:
    """The dimensions of a parameter that each tensor of its state has."""
    every, factored = list(range(param.ndim)), factored_dims(param.shape, group)
    if factored is None:
        dims = {"exp_avg_sq": every}
    else:
        rows, columns = factored
        dims = {"exp_avg_sq_row": [i for i in every if i != columns], "exp_avg_sq_col": [i for i in every if i != rows]}
    return dims | ({} if group["beta1"] is None else {"exp_avg": every}) | {"RMS": []}


def check(state: State, param: Tensor, group: Group, index: int) -> None:
    """Raise RuntimeError for a state that cannot be this parameter's."""
    dims_of = shapes_of(param, group)
    other = next((key for key in SECOND_MOMENTS if key not in dims_of and state.get(key) is not None), None)
    if other and (isinstance(state["step"], Tensor) or state["step"] > 0):
        raise RuntimeError(
            f"the second moment of parameter {index} (shape {tuple(param.shape)}) should be {' and '.join(dims_of)} but is "
            f"`{other}`; `factor_dims` and `min_dim_size_to_factor` stay as they are once steps were taken; nothing was stepped"
        )
    for key, dims in dims_of.items():
        value, shape = state.get(key), [param.shape[dim] for dim in dims]
        if value is not None and list(getattr(value, "shape", [])) != shape:
            raise RuntimeError(
                f"`{key}` of parameter {index} (shape {tuple(param.shape)}) should have shape {tuple(shape)} but has "
                f"{tuple(getattr(value, 'shape', ()))}; nothing was stepped"
            )


def complete(state: State, param: Tensor, group: Group) -> None:
    """Add what a parameter's state lacks, and bring what is there to the dtype, device and layout that go with it.

    State on the meta device, of a parameter that has memory by now, has nothing in it: it begins anew, at step 0.
    """
    lost = [key for key, x in state.items() if isinstance(x, Tensor) and x.is_meta and not param.is_meta]
    for key in lost:
        del state[key]
    if lost and not torch.compiler.is_compiling() and state.get("step", 0) > 0:
        warn("state on the meta device begins anew; load checkpoints once parameters have memory")
    step = 0 if lost else state.get("step", 0)
    if isinstance(step, Tensor) and is_left_by_inference(step):
        step = step.clone()
    # An int would be part of an outer compiled graph: one graph for each step. What is in a tensor stays there, unread.
    if group["capturable"] or torch.compiler.is_compiling() or isinstance(step, Tensor):
        state["step"] = torch.as_tensor(step, dtype=torch.float32, device=param.device)
    else:
        state["step"] = int(step)
    momentum, dims_of = momentum_of(param.dtype, group), shapes_of(param, group)
    for key in [key for key in SECOND_MOMENTS if key in state and key not in dims_of]:  # of no steps yet, see `check`
        del state[key]
    for key, dims in dims_of.items():
        dtype = momentum.dtype if key == "exp_avg" and momentum is not None else compute_dtype(param.dtype)
        state[key] = _fitted(state.get(key), key, dims, param, dtype)
    if group["capturable"] and not torch.compiler.is_compiling():
        # CUDA graphs made by torch.compile then update these in place; others they would copy in, and not step at all.
        for value in state.values():
            if isinstance(value, Tensor):  # users keep other things there
                torch._dynamo.mark_static_address(value)


def is_to_be_stepped(param: Tensor) -> bool:
    """Whether it may get a gradient, as far as its shape is known."""
    return param.requires_grad and not isinstance(param, UninitializedParameter)


def is_left_by_inference(x: Tensor) -> bool:
    """Whether it was made in an inference mode that has ended: it cannot be written to any more."""
    return not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled()


def _is_unwritable(x: Tensor) -> bool:
    """Or with the negative bit, which a kernel would not see."""
    return not torch.compiler.is_compiling() and (x.is_neg() or is_left_by_inference(x))


def own_tensors(state: State) -> list[Tensor]:
    """What a step may write to."""
    return [x for key, x in state.items() if key in KEYS and isinstance(x, Tensor)]


def make_missing(states: dict[Any, State], groups: Sequence[Group]) -> None:
    """Make the state of parameters that are to be stepped and have none: tools put some into the groups by hand."""
    with torch.inference_mode(False), torch.no_grad():  # steps outside of it could not write to what is made in it
        for group in groups:
            for param in filter(is_to_be_stepped, group["params"]):
                if not states.get(param):
                    complete(states.setdefault(param, {}), param, group)


def forget_replaced(states: dict[Any, State], groups: Sequence[Group]) -> None:
    """Drop the state of parameters that have left their groups and were never stepped: what makes it would make it again.

    Tools put copies of their own in the place of parameters, and `state_dict` knows no state of others.
    """
    kept = {id(param) for group in groups for param in group["params"]}
    for param in [x for x in states if isinstance(x, Tensor) and id(x) not in kept]:
        step = states[param].get("step", 1)
        if (isinstance(step, Tensor) and step.is_meta) or step == 0:
            del states[param]


def _fitted(value: Any, key: str, dims: list[int], param: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself, where it fits; zeros for none."""
    shape = [param.shape[dim] for dim in dims]
    fits = isinstance(value, Tensor) and value.dtype == dtype and value.device == param.device and not _is_unwritable(value)
    if isinstance(param, DTensor) and key != "RMS":
        if value is None:
            return placements.zeros(param, dims, dtype)
        return value if fits and isinstance(value, DTensor) else placements.placed(value, param, dims, dtype)
    stride = param.stride() if key == "exp_avg" else contiguous_stride(tuple(shape))  # a momentum is laid out as its parameter
    if fits and same_layout(tuple(shape), value.stride(), stride):
        kept: Tensor = value
        return kept
    if key == "exp_avg":
        new = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    else:
        new = torch.zeros(shape, dtype=dtype, device=param.device)
    if isinstance(value, Tensor):
        return new.copy_(value)
    return new if value is None else new.fill_(value)
