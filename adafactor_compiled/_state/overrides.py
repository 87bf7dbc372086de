"""Parts of transformers' Adafactor that a subclass or an instance has replaced by its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.warn import warn

REMEDIES = {
    "_get_options": "set `beta1` for momentum; what has two dimensions or more is factored",
    "_rms": "override `_get_lr` to scale the learning rate otherwise, or set `clip_threshold`",
    "_approx_sq_grad": "pass a parameter as a vector (`param.view(-1)`) to keep its whole second moment",
}


def check_all(optimizer: object, own: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse what was overridden since, on the class perhaps; `own` are the parts by name."""
    for name in REMEDIES:
        check(name, getattr(optimizer, name), own[name])


def check(name: str, value: object, own: Callable[..., Any]) -> None:
    """Refuse what a step would not call; say of `_get_lr` what it costs.

    Raises:
        TypeError: another part than `_get_lr` is overridden.
    """
    if value is own:
        return
    if name in REMEDIES:
        raise TypeError(f"`{name}` should not be overridden: steps do not call it; {REMEDIES[name]}")
    warn(
        "`_get_lr` is overridden, and so steps take the reference path, one parameter at a time and uncompiled, which is "
        "slower; to step compiled, set `lr` with `relative_step=False`, or use a learning-rate schedule"
    )


def with_lr_of(entries: list[Entry], get_lr: Callable[..., Any]) -> list[Entry]:
    """The entries in groups whose steps take the reference path, and their learning rates from `get_lr`.

    Raises:
        RuntimeError: a parameter is sharded; nothing has changed.
    """
    groups: dict[int, Group] = {}
    for entry in entries:
        if isinstance(entry.param, DTensor):
            raise RuntimeError(
                f"`_get_lr` should not be overridden for sharded parameters but is, and parameter {entry.position} is one; set "
                "`lr`, or use a learning-rate schedule"
            )
        group = entry.group
        if id(group) not in groups:
            groups[id(group)] = {**group, "foreach": False, "compile": False, "get_lr": (get_lr, group)}
    return [entry._replace(group=groups[id(entry.group)]) for entry in entries]
