"""Checkpoints: what is saved, what is loaded, and what is refused."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import UninitializedParameter
from torch.optim import Optimizer

from adafactor_compiled._state import placements
from adafactor_compiled._state.layout import compute_dtype
from adafactor_compiled._state.moments import State, complete, factored_dims, is_to_be_stepped, shapes_of
from adafactor_compiled._state.options import (
    EXECUTION,
    LAYOUT,
    OPTIONS,
    Group,
    check_options,
    plain,
    wants_rounding,
)
from adafactor_compiled._state.views import origin_in


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Within it `Optimizer.load_state_dict` checks what it loads, and leaves the state's dtypes as they are."""
    loaded: dict[str, Any] = {}

    # Other hooks may replace the dict that is loaded: this one comes after theirs, and the other one before theirs.
    def prepare(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        loaded.update(checked(state_dict, optimizer.param_groups))
        _check_replaced(loaded, optimizer)
        return loaded

    def keep_dtypes(_: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        groups = [group for group in optimizer.param_groups for _ in group["params"]]
        states = {i: adopt(state, params[i], groups[i]) for i, state in loaded_states(loaded)}
        for i, state in states.items():
            complete(state, params[i], groups[i])
            optimizer.state[params[i]] = state

    hooks = (
        optimizer.register_load_state_dict_pre_hook(prepare),
        optimizer.register_load_state_dict_post_hook(keep_dtypes, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def asks_for_state(optimizer: Optimizer) -> bool:
    """Whether a step is only to make state: torch.distributed.checkpoint steps with zeros at `lr` 0 where it finds none.

    With a rate of the optimizer's own such a step would decay weights, and in any case count.
    """
    groups = optimizer.param_groups
    if optimizer.state or torch.compiler.is_compiling() or any(group["lr"] is None or group["lr"] for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return not any(grad.any() for grad in grads if not grad.is_meta)


def portable(state: State) -> State:
    """A copy whose step count is an int, as transformers reads it; 0 where it has no memory."""
    step = state.get("step", 0)
    count = {"step": 0 if isinstance(step, Tensor) and step.is_meta else int(step)} if "step" in state else {}
    return {**state, **count}


def adopt(loaded: State, param: Tensor, group: Group) -> State:
    """The state of a checkpoint for `param`: copied, in the state's own dtype (never a half-precision parameter's)."""
    loaded = {**loaded, "step": int(loaded["step"]), "RMS": torch.as_tensor(loaded.get("RMS", 0.0)).reshape(())}
    dims = shapes_of(param, {**group, "beta1": 0.0})
    return {key: _adopted(key, value, param, dims) if isinstance(value, Tensor) else value for key, value in loaded.items()}


def _adopted(key: str, value: Tensor, param: Tensor, of_dims: dict[str, list[int]]) -> Tensor:
    dims, dtype = of_dims.get(key), compute_dtype(param.dtype)
    if dims is None:  # another tool's: as it was
        return value.detach().to(param.device, copy=True)
    if isinstance(param, DTensor) and key != "RMS":
        return placements.placed(value, param, dims, dtype)
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().to(device=param.device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def checked(state_dict: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """A checkpoint with the groups' missing options filled in from `groups`.

    Raises:
        ValueError: a parameter count, an option or a parameter's state that does not fit.
    """
    saved_groups = state_dict["param_groups"]
    lengths, saved_lengths = ([len(group["params"]) for group in x] for x in (groups, saved_groups))
    if lengths != saved_lengths:
        raise ValueError(
            f"the checkpoint's groups should have {lengths} parameters but have {saved_lengths}; nothing was loaded"
        )
    filled = []
    _check_origin(saved_groups)
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        kept = (*EXECUTION, *LAYOUT)
        own = {key: value for key, value in group.items() if key in OPTIONS and (key not in saved or key in kept)}
        filled.append(plain({**saved, **own}))
        check_options(filled[-1], f" (parameter group {index} of the checkpoint)")
    indices = [index for saved in saved_groups for index in saved["params"]]
    params = [param for group in groups for param in group["params"]]
    of_params = [(saved, group) for saved, group in zip(saved_groups, filled, strict=True) for _ in saved["params"]]
    for position, (index, param, (saved, group)) in enumerate(zip(indices, params, of_params, strict=True)):
        if wants_rounding(param.dtype, group) and not isinstance(param, UninitializedParameter):
            origin_in(param, group, position)
        if state_dict["state"].get(index):
            _check_layout(param, saved, group, position)
            _check_loaded(state_dict["state"][index], param, group, position)
    return {**state_dict, "param_groups": filled}


def _check_origin(saved_groups: list[Group]) -> None:
    """Raise ValueError for a checkpoint of another optimizer, whose options have other names and other meanings."""
    for index, saved in enumerate(saved_groups):
        others = [key for key in saved if key != "params" and key not in OPTIONS]
        if others and not any(name in saved for name in ("clip_threshold", "decay_rate", "relative_step")):
            raise ValueError(
                "the checkpoint should be of this class or of transformers' Adafactor but is another optimizer's: its "
                f"parameter group {index} has {', '.join(map(str, others))} and none of clip_threshold, decay_rate, "
                "relative_step; `adafactor_compiled.convert` converts those of other Adafactors; nothing was loaded"
            )


def _check_replaced(state_dict: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise ValueError where a flat checkpoint has lost the state of parameters that took the places of others.

    torch.distributed.checkpoint takes out of it what the optimizer has a state of, which `state_dict` makes for those.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if {id(x) for x in optimizer.state} <= set(map(id, params)):
        return
    states = (state_dict["state"].get(index) for group in state_dict["param_groups"] for index in group["params"])
    for position, (param, state) in enumerate(zip(params, states, strict=True)):
        if is_to_be_stepped(param) and state == {} == optimizer.state.get(param):
            raise ValueError(
                f"the checkpoint's state of parameter {position} (shape {tuple(param.shape)}), which was put into its group by "
                "hand, is empty; where torch unflattens it, call `optimizer.state_dict()` first; nothing was loaded"
            )


def _check_layout(param: Tensor, saved: Group, group: Group, index: int) -> None:
    """Raise ValueError where the second moment of a parameter is kept otherwise than that of its checkpoint."""
    theirs = {**LAYOUT, **saved}
    if factored_dims(param.shape, theirs) != factored_dims(param.shape, group):
        was, own = (", ".join(f"{name}={x[name]!r}" for name in LAYOUT) for x in (theirs, group))
        raise ValueError(
            f"the checkpoint has the second moment of parameter {index} (shape {tuple(param.shape)}) as with {was}, this "
            f"optimizer as with {own}; construct it with the former; nothing was loaded"
        )


def loaded_states(state_dict: dict[str, Any]) -> Iterator[tuple[int, State]]:
    """(position over all groups, state) of a checkpoint's parameters."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for position, index in enumerate(indices):
        if state_dict["state"].get(index):  # empty where a tool looked for what was never stepped
            yield position, state_dict["state"][index]


def _check_loaded(loaded: State, param: Tensor, group: Group, index: int) -> None:
    """Raise ValueError where a checkpoint's state cannot be this parameter's."""
    shape = tuple(param.shape)
    dims = shapes_of(param, {**group, "beta1": 0.0 if "exp_avg" in loaded else None})
    where = f"of parameter {index} (shape {shape})"
    missing = [key for key in ("step", *dims) if key not in loaded and key != "RMS"]
    if missing:
        raise ValueError(f"the checkpoint's state {where} lacks {', '.join(missing)}; nothing was loaded")
    step = loaded["step"]
    if not _is_count(step.item() if isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta else step):
        raise ValueError(f"the checkpoint's `step` {where} should be a count >= 0 but is: {step!r}; nothing was loaded")
    for key, of_dims in dims.items():
        value, expected = loaded.get(key, 0.0), tuple(shape[dim] for dim in of_dims)
        if key == "RMS" and (isinstance(value, numbers.Real) or getattr(value, "shape", None) == (1,)):
            value = torch.as_tensor(value).reshape(())
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            was = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"the checkpoint's `{key}` {where} should have shape {expected} but is: {was!r}; nothing was loaded"
            )
        if param.numel() and not value.is_meta and not torch.isfinite(value).all():  # the RMS of no elements is NaN
            raise ValueError(f"the checkpoint's `{key}` {where} should be finite but holds NaN or inf; nothing was loaded")


def _is_count(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value) and float(value) >= 0
