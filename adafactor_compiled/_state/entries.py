"""The parameters that take part in a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from adafactor_compiled._state.moments import State, is_to_be_stepped
from adafactor_compiled._state.options import Group, check_gradient


class Entry(NamedTuple):
    """A parameter that takes part in a step."""

    position: int  # counted over all groups
    param: Tensor
    grad: Tensor
    state: State
    group: Group


PLAIN = (Tensor, Parameter)


def entries_of(groups: Sequence[Group], state: Mapping[Tensor, State]) -> list[Entry]:
    """The parameters that have a gradient."""
    entries, position = [], -1
    for group in groups:
        for param in group["params"]:
            position += 1
            grad = param.grad
            if grad is not None:
                entries.append(Entry(position, param, _readable(param, grad, position), state[param], group))
    return entries


def _readable(param: Tensor, grad: Tensor, position: int) -> Tensor:
    """A gradient as a kernel can read it: with the negative bit of a view of a complex tensor and zeros without memory, as
    autograd has them, written out, and placed as its parameter is, a sum taken that is still due over the ranks.

    Raises:
        RuntimeError: the memory of parameter or gradient was given back.
    """
    if (
        isinstance(param, DTensor)
        and isinstance(grad, DTensor)
        and grad.shape == param.shape
        and grad.placements != param.placements
    ):
        return grad.redistribute(param.device_mesh, param.placements)
    if torch.compiler.is_compiling():
        return grad
    plain = type(grad) is Tensor and type(param) in PLAIN and grad.layout is param.layout is torch.strided
    if plain and not (grad.data_ptr() and param.data_ptr()) and grad.numel() and not grad.is_meta:
        for name, x in (("", param), ("the gradient of ", grad)):
            if x.numel() and not x.untyped_storage().nbytes():
                raise without_memory(name, position, param)
        return grad.clone()
    return grad.resolve_neg() if grad.is_neg() else grad


def without_memory(what: str, position: int, param: Tensor) -> RuntimeError:
    return RuntimeError(f"{what}parameter {position} (shape {tuple(param.shape)}) has no memory; nothing was stepped")


def entries_of_all(groups: Sequence[Group], state: Mapping[Tensor, State]) -> list[Entry]:
    """Every parameter that may get a gradient and has a shape, as if each were its own gradient, with copies of the states."""
    params = [(param, group) for group in groups for param in group["params"] if is_to_be_stepped(param)]
    return [Entry(-1, param, param.detach(), dict(state.get(param, {})), group) for param, group in params]


def entry_of(param: Tensor, group: Group, i: int, groups: Sequence[Group], state: Mapping[Tensor, State]) -> Entry:
    """Parameter i of a group; one that is not among `groups`, as copies of groups are not, counts behind them.

    Raises:
        RuntimeError: its gradient does not fit it.
    """
    index = next((index for index, other in enumerate(groups) if other is group), len(groups))
    position, grad = sum(len(other["params"]) for other in groups[:index]) + i, param.grad
    assert grad is not None
    check_gradient(param, grad, position)
    return Entry(position, param, _readable(param, grad, position), state[param], group)


def path_of(group: Group, param: Tensor | None = None) -> str:
    """How a group asks to be stepped."""
    if isinstance(param, DTensor):
        return "sharded"
    foreach, compile, fused = group["foreach"], group["compile"], group["fused"]
    if foreach is False:
        return "reference"
    if fused or (fused is None and foreach is None and compile is None):
        return "fused"
    return "multi_tensor" if compile is False else "compiled"
