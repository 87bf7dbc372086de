"""Shape classes: which parameters one call can step together.

Members of a class share everything that a compiled graph depends on. Numbers are never part of it: members of one class may
belong to different groups and have seen different numbers of steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adafactor_compiled._state.entries import PLAIN, Entry
from adafactor_compiled._state.moments import Momentum, factored_dims, momentum_of
from adafactor_compiled._state.options import wants_rounding


class ShapeClass(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    grad_stride: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    factored: bool
    momentum: Momentum | None
    rounding: bool = False  # stochastically
    plain: bool = True  # no subclass of tensors, which may mean anything by its operations

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_pointwise(self) -> bool:
        """Whether rows and columns have one element, as of 1 x 1 kernels: both averages are the whole second moment."""
        return self.factored and self.shape[-2:] == (1, 1)


def class_of(entry: Entry) -> ShapeClass:
    _, param, grad, state, group = entry
    tensors = [grad, *(x for x in state.values() if isinstance(x, Tensor))]
    # A class of parameters may be derived from Parameter for its name alone.
    plain = all(type(x) is Tensor for x in tensors) and (type(param) in PLAIN or type(param.detach()) is Tensor)
    return ShapeClass(
        tuple(param.shape),
        param.stride(),
        grad.stride(),
        param.dtype,
        grad.dtype,
        param.device,
        factored_dims(param.shape, group) is not None,
        momentum_of(param.dtype, group),
        wants_rounding(param.dtype, group),
        plain and (torch.compiler.is_compiling() or not param.is_neg()),
    )
