"""Whether tensors are still as they were: type, dtype, device, shape, strides, and what torch knows of views and modes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

try:  # private, and what compiled code is guarded by: 40 ns a tensor, where ten questions in Python take 400
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]


class Guard:
    """Of some tensors, all different; keeps none of them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if TensorGuards is None:
            self._looks = [_look(x) for x in tensors]
        else:
            self._count = len(tensors)
            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def holds(self, tensors: Sequence[Any]) -> bool:
        if TensorGuards is None:
            return self._looks == [_look(x) for x in tensors]
        return len(tensors) == self._count and self._guards.check(*tensors)


def are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether two lists are of the same objects: equal tensors are not."""
    return len(some) == len(others) and all(map(is_, some, others))


def _look(x: Any) -> tuple[object, ...]:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return (type(x),)
    of_views = x.is_neg(), x.is_conj(), x.is_inference(), torch.is_inference_mode_enabled()
    return type(x), x.dtype, x.device, x.shape, x.stride(), of_views
