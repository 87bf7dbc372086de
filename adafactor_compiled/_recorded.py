"""Calls that go straight to Inductor's kernel.

Inductor writes a wrapper around the kernel of a pass: it asks tensors for their sizes and strides, allocates what the kernel
writes on its way, and calls it. For a small matrix that takes as long as the kernel does. With tensors of the same sizes and
strides all of it comes out the same. What the wrapper passes on is therefore noted once, and then passed again with other
tensors; what is written on the way is where it was in the last call, still in cache. A step of 1024 x 16 takes half as long.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _disable_current_modes

from adafactor_compiled._kept import Code, Made
from adafactor_compiled._shape_class import check_of

SCRATCH_BYTES = 4 << 20  # what the kernels of a process share, one after the other
LINE = 64  # bytes of a line of cache
KERNEL = "cpp_fused_0"
# All that a wrapper may mention. With anything else in it, another kernel say, there would be more to a call than its kernel.
HARMLESS = {"clear", "size", "stride", "empty_strided_cpu", "reinterpret_tensor", KERNEL, "torch"}
HARMLESS |= {"float64", "float32", "bfloat16", "float16", "int64", "int32", "bool"}


def names_of(signature: inspect.Signature) -> str:
    """Parameters with their defaults, as source."""
    return ", ".join(x.name if x.default is x.empty else f"{x.name}={x.default!r}" for x in signature.parameters.values())


def recorded(call: Callable[..., None], code: Code, made: Made, signature: inspect.Signature) -> Callable[..., None]:
    """A pass that returns None, as `Recorded` where its wrapper does no more than that allows for.

    Args:
        call: the pass.
        code: Inductor's code for it.
        made: how its arguments go with that.
        signature: of the pass.
    """
    if not isinstance(code, MethodType) or made.inputs[0] != next(iter(signature.parameters)) or not _one_at_a_time():
        return call
    mentioned = set(code.__func__.__code__.co_names)
    return Recorded(call, code, made, signature) if mentioned <= HARMLESS else call


def _one_at_a_time() -> bool:
    """Whether Python's global lock, which a kernel holds, keeps calls from using the memory between them at once."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


class Recorded:
    """The pass, called as a whole with sizes that are new to it, and by its kernel alone with others."""

    def __init__(self, call: Callable[..., None], code: MethodType, made: Made, signature: inspect.Signature) -> None:
        self._call, self._wrapper, self._made, self._parameters = call, code.__func__, made, names_of(signature)
        self._inputs = eval(f"lambda {self._parameters}: [{', '.join(made.inputs)}]")
        self._numbers = [i for i, x in enumerate(signature.parameters.values()) if x.annotation is int]
        self._again: dict[Any, Callable[..., bool] | None] = {}  # by the shape of the first argument, and all numbers

    def __call__(self, *arguments: Any) -> None:
        self.laid_out(_as_they_are, *arguments)

    def laid_out(self, lay_out: Callable[..., Sequence[Any]], *arguments: Any) -> None:
        """The pass on `lay_out(*arguments)`, which are views of these arguments; a kernel can do without them."""
        key = arguments[0].shape
        if self._numbers:
            key = (key, *[arguments[i] for i in self._numbers])
        again = self._again.get(key)
        if again is not None and again(*arguments):
            return
        in_layout = lay_out(*arguments)
        self._call(*in_layout)
        if again is not None or key not in self._again:
            self._again[key] = self._record(self._inputs(*arguments), self._inputs(*in_layout))

    def _record(self, inputs: list[Any], in_layout: list[Any]) -> Callable[..., bool] | None:
        """The call with inputs like these, False where they are not like them; None where it needs the wrapper."""
        tensors = {name: x for name, x in zip(self._made.inputs, inputs, strict=True) if isinstance(x, Tensor)}
        views = {name: x for name, x in zip(self._made.inputs, in_layout, strict=True) if name in tensors}
        names = {id(x): name for name, x in views.items()}
        passed = self._passed_to_kernel(in_layout)
        if passed is None:
            return None
        own = {f"_{i}": x for i, x in enumerate(passed) if isinstance(x, Tensor) and id(x) not in names}
        scratch = _in_scratch(own, list(views.values()))
        if scratch is None or any(x.data_ptr() != views[name].data_ptr() for name, x in tensors.items()):
            return None
        known = {
            "_like": check_of(list(tensors.values())),
            "_count": increment_version,
            "_kernel": self._wrapper.__globals__[KERNEL],
            **scratch,
        }
        written = [self._made.inputs[i] for i in self._made.written]
        given = [names.get(id(x), f"_{i}") if isinstance(x, Tensor) else repr(x) for i, x in enumerate(passed)]
        then = f"(_count([{', '.join(written)}]), _kernel({', '.join(given)}), True)[2]"
        again: Callable[..., bool] = eval(f"lambda {self._parameters}: _like({', '.join(tensors)}) and {then}", known)
        return again

    def _passed_to_kernel(self, inputs: list[Any]) -> tuple[Any, ...] | None:
        """By the wrapper, in front of a kernel that does nothing; None where it calls the kernel more than once, or never."""
        passed: list[tuple[Any, ...]] = []
        noting = {**self._wrapper.__globals__, KERNEL: lambda *arguments: passed.append(arguments)}
        FunctionType(self._wrapper.__code__, noting)(None, list(inputs))
        return passed[0] if len(passed) == 1 else None


def as_a_whole(call: Callable[..., Any]) -> Callable[..., Any]:
    """A pass with its wrapper, which allocates what a profiler is to see."""
    return call._call if isinstance(call, Recorded) else call


def _as_they_are(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def _in_scratch(tensors: dict[str, Tensor], inputs: list[Tensor]) -> dict[str, Tensor] | None:
    """Tensors in the shared memory that overlap each other as these do; None where they overlap inputs, or are too large.

    Short ones come first, so that what is as long in two passes lies in one place, and each core finds the lines of cache there
    that it wrote itself: with those of the other core the sums of 256 x 256 x 3 x 3 take twice as long.
    """
    of_inputs = {x.untyped_storage().data_ptr() for x in inputs}
    begins: dict[int, int] = {}
    end = 0
    for storage in sorted((x.untyped_storage() for x in tensors.values()), key=lambda storage: storage.nbytes()):
        if storage.data_ptr() in of_inputs:
            return None
        if storage.data_ptr() not in begins:
            begins[storage.data_ptr()] = end
            end += -(-storage.nbytes() // LINE) * LINE
    if end > SCRATCH_BYTES:
        return None
    with _disable_current_modes():
        return {name: _placed(x, begins[x.untyped_storage().data_ptr()]) for name, x in tensors.items()}


def _placed(x: Tensor, begin: int) -> Tensor:
    offset = begin // x.element_size() + x.storage_offset()
    return torch.empty(0, dtype=x.dtype).set_(_scratch().untyped_storage(), offset, x.shape, x.stride())


@functools.cache
def _scratch() -> Tensor:
    return torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
