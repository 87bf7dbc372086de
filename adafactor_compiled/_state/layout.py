"""How tensors lie in memory, and which of them are alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch

HALF = (torch.bfloat16, torch.float16)

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def cached(function: Callable[..., Result]) -> Callable[..., Result]:
    """As `functools.cache`; while torch.compile traces, which would warn of that, the function itself."""
    kept = functools.cache(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Result:
        return function(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    call.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return call


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod([max(size, 1) for size in shape[i + 1 :]]) for i in range(len(shape)))


def same_layout(shape: tuple[int, ...], stride: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two strides of a shape address the same elements: that of a dimension of size 1 means nothing."""
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, other, strict=True))


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements fill their memory in some order of the dimensions, as that of a momentum then is too."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state and of all arithmetic for a parameter of `dtype`."""
    return torch.float32 if dtype in HALF else dtype


def group_by_key(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """The positions of each key, in order; keys in the order of their first position."""
    positions: dict[Key, list[int]] = {}
    for position, key in enumerate(keys):
        positions.setdefault(key, []).append(position)
    return positions
