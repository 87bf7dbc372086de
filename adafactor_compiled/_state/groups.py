"""A parameter group that is about to be added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adafactor_compiled._state import names, options, placements
from adafactor_compiled._state.options import Group


def checked_parameters(group: Group, defaults: Group, groups: Sequence[Group]) -> list[Any]:
    """The parameters (or named ones) of a group that joins others, as a list.

    Raises:
        ValueError: an option or a parameter that is not what it must be.
    """
    names.check_names(group)
    merged = {**defaults, **group}
    if "lr" in group:
        options.check_manual_lr(group["lr"], merged["relative_step"])
    options.check_options(merged, f" (parameter group {len(groups)})")
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    first = sum(len(other["params"]) for other in groups)
    for index, param in enumerate(params, first):
        tensor = param[1] if isinstance(param, tuple) else param
        options.check_parameter(tensor, index)
        placements.check_placements(tensor, index)
        if options.wants_rounding(tensor.dtype, merged["stochastic_rounding"]):
            placements.checked_origin(tensor, index)
    return params
