"""A parameter group that is about to be added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import UninitializedParameter

from adafactor_compiled._state import names, options, placements, views
from adafactor_compiled._state.options import Group


def checked_parameters(group: Group, defaults: Group, groups: Sequence[Group]) -> Any:
    """The parameters (or named ones) of a group that joins others, as a list.

    Raises:
        ValueError: an option or a parameter that is not what it must be, or one that is there twice.
        TypeError: from torch, for what is no tensor, or a set, whose order differs from run to run.
    """
    names.check_names(group)
    merged = {**defaults, **group}
    if "lr" in group and not options.OPTIONS.keys() <= group.keys():  # in another optimizer's group it may be a report
        options.check_manual_lr(group["lr"], merged["relative_step"])
    options.check_options(merged, f" (parameter group {len(groups)})")
    params = group["params"]
    if isinstance(params, set):
        return params
    params = [params] if isinstance(params, Tensor) else list(params)
    tensors = [param[1] if isinstance(param, tuple) else param for param in params]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return params
    if len(set(tensors)) < len(tensors):
        raise ValueError(
            f"parameter group {len(groups)} holds a parameter twice, which a step would step twice; pass each once, as in "
            "`list(dict.fromkeys(params))`"
        )
    for index, tensor in enumerate(tensors, sum(len(other["params"]) for other in groups)):
        if isinstance(tensor, UninitializedParameter):  # it has a shape once the model has run
            continue
        if tensor.requires_grad:  # what is frozen may be packed or complex
            options.check_parameter(tensor, index)
        placements.check_placements(tensor, index)
        if options.wants_rounding(tensor.dtype, merged):
            views.origin_in(tensor, merged, index)
    return params
