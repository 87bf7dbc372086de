"""The options of a parameter group: their names, and what a value must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._state.layout import HALF

Group = dict[str, Any]
Test = Callable[[object], bool]

# How a step is run, not what it computes: these belong to the optimizer at hand, never to a checkpoint.
EXECUTION = ("foreach", "compile", "fused", "capturable")
# What the state looks like, and what transformers' looks like: a checkpoint must be made with what comes to the same.
LAYOUT: Mapping[str, Any] = {"min_dim_size_to_factor": 0, "factor_dims": "last"}

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(holds: Callable[[Any], bool]) -> Test:
    return lambda value: _is_number(value) and math.isfinite(value) and holds(value)  # type: ignore[arg-type]


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _one_of(*choices: str) -> Test:
    return lambda value: isinstance(value, str) and value in choices


def _is_lr(value: object) -> bool:
    if isinstance(value, Tensor):  # its value stays on its device: reading it would wait for that device
        return value.numel() == 1 and value.is_floating_point()
    return value is None or _at_least_zero(value)


def _is_eps(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_at_least_zero, value))


def _is_momentum_dtype(value: object) -> bool:
    return value in (None, torch.float32, torch.bfloat16, torch.float16)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


_at_least_zero, _is_bool_or_none = _number(lambda x: x >= 0), _or_none(_is_bool)

# name: (test, what it must be)
OPTIONS: Mapping[str, tuple[Test, str]] = {
    "lr": (_is_lr, "None, a finite number >= 0 or a floating-point tensor with one element"),
    "eps": (_is_eps, "two finite numbers >= 0"),
    "clip_threshold": (_or_none(_number(lambda x: x > 0)), "None or a finite number > 0"),
    "decay_rate": (_number(lambda x: x <= 0), "a finite number <= 0"),
    "beta1": (_or_none(_number(lambda x: 0 <= x < 1)), "None or a number in [0, 1)"),
    "weight_decay": (_at_least_zero, "a finite number >= 0"),
    "scale_parameter": (_is_bool, "a bool"),
    "relative_step": (_is_bool, "a bool"),
    "warmup_init": (_is_bool, "a bool"),
    "foreach": (_is_bool_or_none, "None or a bool"),
    "compile": (_is_bool_or_none, "None or a bool"),
    "fused": (_is_bool_or_none, "None or a bool"),
    "maximize": (_is_bool, "a bool"),
    "capturable": (_is_bool, "a bool"),
    "stochastic_rounding": (_is_bool, "a bool"),
    "rounding_seed": (_is_int, "an int"),
    "nonfinite": (_one_of("propagate", "skip"), '"propagate" or "skip"'),
    "min_dim_size_to_factor": (_is_count, "an int >= 0"),
    "factor_dims": (_one_of("last", "largest"), '"last" or "largest"'),
    "beta2_cap": (_or_none(_number(lambda x: 0 < x < 1)), "None or a number between 0 and 1"),
    "decay_offset": (_is_count, "an int >= 0"),
    "momentum_dtype": (_is_momentum_dtype, "None, torch.float32, torch.bfloat16 or torch.float16"),
    "cautious": (_is_bool, "a bool"),
    "weight_decay_scale": (_one_of("lr", "none"), '"lr" or "none"'),
}


def plain(group: Mapping[str, Any]) -> Group:
    """A group with Python's numbers and bools for numpy's, for tensors on the host (but `lr`) and for 0 and 1 as bools."""
    return {key: _plain(key, value) if key in OPTIONS else value for key, value in group.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if name == "lr" or value.device.type != "cpu":  # what lies elsewhere would have to be waited for
            return value
        value = value.detach()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if name == "eps" and isinstance(value, (tuple, list)):
        return type(value)([_plain("", x) for x in value])
    of_bool = OPTIONS[name][0] in (_is_bool, _is_bool_or_none) if name else False
    return bool(value) if of_bool and type(value) is int and value in (0, 1) else value


def check_options(group: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError for the first option of a group that is not what it must be."""
    for name, (is_valid, expected) in OPTIONS.items():
        value = group[name]
        if name == "lr" and group["relative_step"] is True:
            continue  # a schedule may have written its report there; it is not read
        if not is_valid(value):
            raise ValueError(f"`{name}` should be {expected} but is: {value!r}{where}")
    if group["warmup_init"] and not group["relative_step"]:
        raise ValueError("`warmup_init=True` requires `relative_step=True`")
    if group["cautious"] and group["beta1"] is None:
        raise ValueError(f"`cautious=True` compares a momentum with its gradient and needs `beta1`{where}")
    if group["lr"] is None and not group["relative_step"]:
        raise ValueError(
            "`lr` should be a number or a tensor when `relative_step=False` but is: None; "
            f"pass `lr`, or let the optimizer choose it with `relative_step=True`{where}"
        )
    _check_path(group, where)


def _check_path(group: Mapping[str, Any], where: str) -> None:
    """Raise for flags that ask for two paths at once."""
    if group["foreach"] is False and group["compile"] is True:
        raise ValueError(
            f"`compile=True` compiles the multi-tensor path and cannot go with `foreach=False`; drop one of the two{where}"
        )
    if not group["fused"]:
        return
    for name in ("foreach", "compile"):
        if group[name] is True:
            raise RuntimeError(f"`fused` and `{name}` cannot be `True` together{where}")  # in torch's words, and as it does
        if group[name] is False:
            path = "the reference path" if name == "foreach" else "nothing to be compiled"
            raise RuntimeError(f"`fused=True` asks for kernels and `{name}=False` for {path}; drop one of the two{where}")


def check_manual_lr(lr: object, relative_step: object) -> None:
    if lr is not None and relative_step:
        raise ValueError("Cannot combine manual `lr` and `relative_step=True` options")


def wants_rounding(dtype: torch.dtype, group: Mapping[str, Any]) -> bool:
    """Whether a parameter of `dtype`, or its momentum, is rounded stochastically."""
    in_half = dtype in HALF or (group["beta1"] is not None and group["momentum_dtype"] in HALF)
    return group["stochastic_rounding"] and in_half


def check_parameter(param: Tensor, index: int, error: type[Exception] = ValueError) -> None:
    if param.is_complex():
        raise error(
            f"Adafactor does not support complex parameters but parameter {index} of shape {tuple(param.shape)} is "
            f"{param.dtype}; pass torch.view_as_real of it"
        )
    if param.dtype not in PARAMETER_DTYPES:
        raise error(
            f"Adafactor steps parameters of {', '.join(map(str, PARAMETER_DTYPES))} but parameter {index} of shape "
            f"{tuple(param.shape)} is {param.dtype}"
        )


def check_gradient(param: Tensor, grad: Tensor, index: int) -> None:
    """Raise RuntimeError for a gradient that does not fit its parameter, or that one that was frozen should not have."""
    check_parameter(param, index, RuntimeError)
    if grad.is_sparse or grad.layout is not torch.strided:
        raise RuntimeError("Adafactor does not support sparse gradients.")
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"the gradient of parameter {index} (shape {tuple(param.shape)} on {param.device}) should have its shape and "
            f"device but has shape {tuple(grad.shape)} on {grad.device}; nothing was stepped"
        )
    if not grad.is_floating_point():
        raise RuntimeError(
            f"the gradient of parameter {index} (shape {tuple(param.shape)}) should be floating-point but is "
            f"{grad.dtype}; nothing was stepped"
        )
