"""Parts of a step by transformers' names and with its results, as other tools call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from adafactor_compiled._state.moments import State, factored_dims
from adafactor_compiled._state.options import LAYOUT, Group
from adafactor_compiled._update.numbers import unscaled_lr
from adafactor_compiled._update.reference import approx_sq_grad, rms


def get_lr(param_group: Group, param_state: State) -> Any:
    """The learning rate of a parameter's last step, as transformers' AdafactorSchedule asks for it."""
    step, of_param = param_state["step"], param_state["RMS"]
    lr = unscaled_lr(param_group, step.clamp(min=1.0) if isinstance(step, Tensor) else max(step, 1))
    if not param_group["scale_parameter"]:
        return lr
    least = param_group["eps"][1]
    return (of_param.clamp(min=least) if isinstance(of_param, Tensor) else max(least, of_param)) * lr


def get_options(param_group: Group, param_shape: Sequence[int]) -> tuple[bool, bool]:
    """Whether the second moment is factored, and whether there is a momentum."""
    return factored_dims(param_shape, {**LAYOUT, **param_group}) is not None, param_group["beta1"] is not None


PARTS: Mapping[str, Callable[..., Any]] = {
    "_get_lr": get_lr,
    "_get_options": get_options,
    "_rms": rms,
    "_approx_sq_grad": approx_sq_grad,
}
