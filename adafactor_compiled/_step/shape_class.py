"""Shape classes: which parameters one call can step together.

Members of a class share everything that a compiled graph depends on. Numbers are never part of it: members of one class may
belong to different groups and have seen different numbers of steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ShapeClass(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    grad_stride: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    momentum: bool
    rounding: bool = False  # stochastically
    plain: bool = True  # no subclass of tensors, which may mean anything by its operations

    @property
    def factored(self) -> bool:
        return len(self.shape) >= 2

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def shape_class_of(param: Tensor, grad: Tensor, momentum: bool, rounding: bool = False, plain: bool = True) -> ShapeClass:
    strides = param.stride(), grad.stride()
    return ShapeClass(tuple(param.shape), *strides, param.dtype, grad.dtype, param.device, momentum, rounding, plain)
