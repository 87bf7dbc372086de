"""Shape classes: which parameters one call can step together.

Members of a class share everything that a compiled graph depends on. Numbers are never part of it: members of one class may
belong to different groups and have seen different numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

ANY_LENGTH = (-1,)  # the shape of short vectors that are stepped together
ANY_SHAPE = (-1, -1)  # the shape of matrices that are stepped one after the other
JOINED_NUMEL = 8_192  # up to here one thread is as quick as several, and copying a vector twice costs less than its operations

Key = TypeVar("Key", bound=Hashable)


class ShapeClass(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    grad_stride: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    momentum: bool
    rounding: bool = False  # stochastically

    @property
    def factored(self) -> bool:
        return len(self.shape) >= 2

    @property
    def joined(self) -> bool:
        """Whether these are short vectors of any lengths."""
        return self.shape == ANY_LENGTH

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def shape_class_of(param: Tensor, grad: Tensor, momentum: bool, rounding: bool = False) -> ShapeClass:
    strides = param.stride(), grad.stride()
    return ShapeClass(tuple(param.shape), *strides, param.dtype, grad.dtype, param.device, momentum, rounding)


def joined(shape_class: ShapeClass) -> ShapeClass:
    """What short vectors on a CPU have in common with those of other lengths; any other class as it is."""
    if shape_class.factored or not 0 < shape_class.numel <= JOINED_NUMEL or shape_class.device.type != "cpu":
        return shape_class
    contiguous = contiguous_stride(shape_class.shape)
    if not all(same_layout(shape_class.shape, x, contiguous) for x in (shape_class.stride, shape_class.grad_stride)):
        return shape_class
    return shape_class._replace(shape=ANY_LENGTH, stride=(1,), grad_stride=(1,))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod([max(size, 1) for size in shape[i + 1 :]]) for i in range(len(shape)))


def same_layout(shape: tuple[int, ...], stride: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two strides of a shape address the same elements: that of a dimension of size 1 means nothing."""
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, other, strict=True))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state and of all arithmetic for a parameter of `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether other tensors, one for each, have the same types, dtypes, devices, shapes and strides."""
    fixed: dict[str, Any] = {  # its stub has the type of one of these lists
        "dynamic_dims_sizes": [list(x.shape) for x in tensors],
        "dynamic_dims_strides": [list(x.stride()) for x in tensors],
    }
    check: Callable[..., bool] = TensorGuards(*tensors, **fixed).check
    return check


def group_by_class(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The positions of each key, in order; classes in the order of their first member."""
    classes: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        classes.setdefault(key, []).append(position)
    return classes
