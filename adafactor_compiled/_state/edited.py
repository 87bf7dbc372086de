"""Numbers of a group that were set by hand: what a step reads is made of them, or they are refused by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adafactor_compiled._state.options import OPTIONS, Group

Types = tuple[type, ...]

NUMBER: Types = (int, float)
OR_NONE: Types = (int, float, type(None))
COUNT: Types = (int,)
READ: dict[str, Types] = {
    "lr": NUMBER,
    "clip_threshold": OR_NONE,
    "decay_rate": NUMBER,
    "beta1": OR_NONE,
    "weight_decay": NUMBER,
    "beta2_cap": OR_NONE,
    "rounding_seed": COUNT,
    "min_dim_size_to_factor": COUNT,
    "decay_offset": COUNT,
}


def settle(group: Group, index: int) -> None:
    """Make each a number of Python's, or a tensor without dimensions in the memory of the one that was given.

    Raises:
        RuntimeError: one is no number.
    """
    for name, types in READ.items():
        if type(group[name]) not in types and not (name == "lr" and group["relative_step"]):
            group[name] = _settled(name, group[name], types, index)
    eps = group["eps"]
    if type(eps) not in (tuple, list) or len(eps) != 2 or type(eps[0]) not in NUMBER or type(eps[1]) not in NUMBER:
        parts = eps if isinstance(eps, (tuple, list)) or not hasattr(eps, "tolist") else eps.tolist()
        if not isinstance(parts, (tuple, list)) or len(parts) != 2:
            raise _refused("eps", eps, index)
        group["eps"] = tuple(_settled("eps", x, NUMBER, index) for x in parts)


def _settled(name: str, value: Any, types: Types, index: int) -> Any:
    number = value
    if isinstance(value, Tensor):
        # Not read where that can be left to the device; and who gave a learning rate may write to it.
        if value.numel() == 1 and types is not COUNT:
            return value if name == "lr" else value.detach().reshape(())
        number = value.tolist() if value.device.type == "cpu" else value
    elif hasattr(value, "tolist"):
        number = value.tolist()
    while isinstance(number, list) and len(number) == 1:
        (number,) = number
    if not isinstance(number, types) or isinstance(number, bool):
        raise _refused(name, value, index)
    return number


def _refused(name: str, value: object, index: int) -> RuntimeError:
    expected = OPTIONS[name][1]
    return RuntimeError(f"`{name}` should be {expected} but is: {value!r} (parameter group {index}); nothing was stepped")
