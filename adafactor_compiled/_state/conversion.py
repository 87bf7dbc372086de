"""A checkpoint of another optimizer, group by group and parameter by parameter: what `convert.py` has of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled._state.moments import State, factored_dims
from adafactor_compiled._state.options import LAYOUT, Group

# What no other optimizer has unless its converter says so.
NEUTRAL = {"beta2_cap": None, "decay_offset": 0, "momentum_dtype": None, "cautious": False, "weight_decay_scale": "lr"}


class Refused(ValueError):
    """What of a checkpoint cannot be carried over, one reason each; the message is the first and how many more there are."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(reasons[0] + f" (and {len(reasons) - 1} more, see `refusals`)" * (len(reasons) > 1))
        self.reasons = list(reasons)


def converted(
    state_dict: Mapping[str, Any],
    optimizer: Optimizer,
    options: Callable[[Group, Group, list[int], str], Group],
    state: Callable[[State, Group, Group, Tensor, str], State],
) -> dict[str, Any]:
    """A checkpoint of another optimizer as one of this one.

    `options` gets a saved group, the optimizer's own and the step counts; `state` a parameter's saved state, both groups
    and the parameter.
    """
    states, groups, reasons = {}, [], []
    for saved, group, pairs, where in _groups(state_dict, optimizer):
        steps = []
        for position, index, param in pairs:
            if state_dict["state"].get(index):
                described = f"of parameter {position} (shape {tuple(param.shape)})"
                try:
                    states[index] = state(state_dict["state"][index], saved, group, param, described)
                    steps.append(int(states[index]["step"]))
                except ValueError as error:
                    reasons.append(str(error))
        kept: Group = {key: saved[key] for key in ("params", "param_names", "initial_lr") if key in saved}
        own: Group = {key: group[key] for key in LAYOUT}
        try:
            groups.append({**kept, **own, **NEUTRAL, **options(saved, group, steps, where)})
        except ValueError as error:
            reasons.append(str(error))
        except KeyError as error:
            missing = f"the options should be those of the optimizer that is converted but lack {error}{where}"
            raise Refused([missing]) from error
    if reasons:
        raise Refused(reasons)
    return {"state": states, "param_groups": groups}


def _groups(
    state_dict: Mapping[str, Any], optimizer: Optimizer
) -> Iterator[tuple[Group, Group, list[tuple[int, int, Tensor]], str]]:
    """(saved group, the optimizer's, (position, index in the checkpoint, parameter) of each one, how to name the group)."""
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    lengths, saved_lengths = ([len(group["params"]) for group in x] for x in (groups, saved_groups))
    if lengths != saved_lengths:
        raise Refused([f"the checkpoint's groups should have {lengths} parameters but have {saved_lengths}"])
    position = 0
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        pairs = list(zip(range(position, position + len(group["params"])), saved["params"], group["params"], strict=True))
        position += len(pairs)
        yield saved, group, pairs, f" (parameter group {number} of the checkpoint)"


def field(saved: State, key: str, where: str) -> Any:
    if key not in saved:
        raise ValueError(f"the checkpoint's state {where} lacks {key}")
    return saved[key]


def last_two(saved: State, param: Tensor, where: str) -> Tensor | dict[int, Tensor]:
    """The second moment of a parameter under transformers' keys: the whole, or its means by the dimension that they lack."""
    if param.ndim < 2 or "exp_avg_sq" in saved:
        whole: Tensor = field(saved, "exp_avg_sq", where)
        return whole
    return {-1: field(saved, "exp_avg_sq_row", where), -2: field(saved, "exp_avg_sq_col", where)}


def factored_as(moment: Tensor | dict[int, Tensor], group: Group, param: Tensor, where: str) -> State:
    """A second moment under this optimizer's keys; one that is kept whole there and factored here becomes means."""
    dims = factored_dims(param.shape, group)
    if isinstance(moment, Tensor):
        if dims is None:
            return {"exp_avg_sq": moment}
        whole = moment.to(torch.promote_types(moment.dtype, torch.float32))
        return {"exp_avg_sq_row": whole.mean(dims[1]), "exp_avg_sq_col": whole.mean(dims[0])}
    by_dim = {dim % param.ndim: x for dim, x in moment.items()}
    if dims is None or set(by_dim) != set(dims):
        here = "kept whole" if dims is None else f"factored over {dims}"
        raise ValueError(
            f"the second moment {where} is factored over dimensions {tuple(sorted(by_dim))} there but {here} here, and one "
            "does not give the other; construct this optimizer with `factor_dims` and `min_dim_size_to_factor` that agree"
        )
    return {"exp_avg_sq_row": by_dim[dims[1]], "exp_avg_sq_col": by_dim[dims[0]]}
