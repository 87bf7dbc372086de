"""The state of a parameter: transformers' keys, shapes and dtypes; made, completed and loaded here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adafactor_compiled import _placements
from adafactor_compiled._options import EXECUTION, OPTIONS, Group, check_options
from adafactor_compiled._rounding import wants_rounding
from adafactor_compiled._shape_class import compute_dtype

State = dict[str, Any]


def dims_of(key: str, ndim: int) -> list[int]:
    """Which dimensions of a parameter a tensor of its state has."""
    dims = [] if key == "RMS" else list(range(ndim))
    if key == "exp_avg_sq_row":
        del dims[-1]
    elif key == "exp_avg_sq_col":
        del dims[-2]
    return dims


def complete(state: State, param: Tensor, group: Group) -> None:
    """Add what a parameter's state lacks, and bring what is there to the parameter's device."""
    dtype = compute_dtype(param.dtype)

    def tensor(key: str) -> None:
        value, dims = state.get(key), dims_of(key, param.ndim)
        if value is None and isinstance(param, DTensor) and key != "RMS":
            state[key] = _placements.zeros(param, dims, dtype)
        elif value is None:
            state[key] = torch.zeros([param.shape[dim] for dim in dims], dtype=dtype, device=param.device)
        elif value.device != param.device:
            state[key] = value.to(param.device)

    step = state.get("step", 0)
    # An int would be part of an outer compiled graph: one graph for each step. What is in a tensor stays there, unread.
    if group["capturable"] or torch.compiler.is_compiling() or isinstance(step, Tensor):
        state["step"] = torch.as_tensor(step, dtype=torch.float32, device=param.device)
    else:
        state["step"] = int(step)
    if param.ndim >= 2:
        tensor("exp_avg_sq_row")
        tensor("exp_avg_sq_col")
    else:
        tensor("exp_avg_sq")
    if group["beta1"] is not None:
        exp_avg = state.get("exp_avg")
        if exp_avg is None or exp_avg.stride() != param.stride() or exp_avg.device != param.device:
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)  # laid out as the parameter is
            if exp_avg is not None:
                state["exp_avg"].copy_(exp_avg)
    tensor("RMS")
    if group["capturable"] and not torch.compiler.is_compiling():
        # CUDA graphs made by torch.compile then update these in place; others they would copy in, and not step at all.
        for value in state.values():
            torch._dynamo.mark_static_address(value)


def portable(state: State) -> State:
    """A copy whose step count is an int, as transformers reads it."""
    return {key: int(value) if key == "step" else value for key, value in state.items()}


def adopt(loaded: State, param: Tensor) -> State:
    """The state of a checkpoint for `param`: copied, in the state's own dtype (never a half-precision parameter's)."""
    loaded = {**loaded, "step": int(loaded["step"]), "RMS": torch.as_tensor(loaded.get("RMS", 0.0))}
    return {key: _adopted(key, value, param) if isinstance(value, Tensor) else value for key, value in loaded.items()}


def _adopted(key: str, value: Tensor, param: Tensor) -> Tensor:
    dtype = compute_dtype(param.dtype)
    if isinstance(param, DTensor) and key != "RMS":
        return _placements.placed(value, param, dims_of(key, param.ndim), dtype)
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
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        own = {key: value for key, value in group.items() if key in OPTIONS and (key not in saved or key in EXECUTION)}
        filled.append({**saved, **own})
        check_options(filled[-1], f" (parameter group {index} of the checkpoint)")
    indices = [index for saved in saved_groups for index in saved["params"]]
    params = [param for group in groups for param in group["params"]]
    rounds = [group["stochastic_rounding"] for group in filled for _ in group["params"]]
    for position, (index, param) in enumerate(zip(indices, params, strict=True)):
        if wants_rounding(param.dtype, rounds[position]):
            _placements.checked_origin(param, position)
        if index in state_dict["state"]:
            _check_loaded(state_dict["state"][index], param, position)
    return {**state_dict, "param_groups": filled}


def loaded_states(state_dict: dict[str, Any]) -> Iterator[tuple[int, State]]:
    """(position over all groups, state) of a checkpoint's parameters."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    for position, index in enumerate(indices):
        if index in state_dict["state"]:
            yield position, state_dict["state"][index]


def _check_loaded(loaded: State, param: Tensor, index: int) -> None:
    """Raise ValueError where a checkpoint's state cannot be this parameter's."""
    shape = tuple(param.shape)
    expected = (
        {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]} if len(shape) >= 2 else {"exp_avg_sq": shape}
    )
    where = f"of parameter {index} (shape {shape})"
    missing = [key for key in ("step", *expected) if key not in loaded]
    if missing:
        raise ValueError(f"the checkpoint's state {where} lacks {', '.join(missing)}; nothing was loaded")
    if "exp_avg" in loaded:
        expected["exp_avg"] = shape
    for key, expected_shape in expected.items():
        value = loaded[key]
        if not isinstance(value, Tensor) or tuple(value.shape) != expected_shape:
            was = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"the checkpoint's `{key}` {where} should have shape {expected_shape} but is: {was!r}; nothing was loaded"
            )
    for key in ("RMS", *expected):
        value = loaded.get(key, 0.0)
        if param.numel() and not _is_finite(value):  # the RMS of no elements is NaN
            raise ValueError(f"the checkpoint's `{key}` {where} should be finite but holds NaN or inf; nothing was loaded")


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return math.isfinite(value)
    return value.is_meta or bool(torch.isfinite(value).all())
