"""Other compilers for the passes of the compiled path, where Inductor would cost seconds; and a count of what they compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

from adafactor_compiled import _compile

Compiler = Callable[[_compile.Pass], Callable[..., Any]]


def uncompiled(key: _compile.Pass) -> Callable[..., Any]:
    return key.function


def aot_eager(key: _compile.Pass) -> Callable[..., Any]:
    function = torch.compile(key.function, backend="aot_eager", dynamic=True, fullgraph=True, isolate_recompiles=True)

    def call(*arguments: Any) -> Any:  # the direct calls of the CPU never ask whether a tensor requires gradients
        return function(*tree_map_only(Tensor, Tensor.detach, arguments))

    return call


@contextmanager
def compiled_by(compiler: Compiler) -> Iterator[None]:
    """Have every pass of the compiled path come from `compiler` instead of Inductor, from an empty cache."""
    users = [m for name, m in sys.modules.items() if name.startswith("adafactor_compiled") and hasattr(m, "compiled")]
    cached = functools.cache(compiler)
    with pytest.MonkeyPatch.context() as patch:
        for module in users:
            patch.setattr(module, "compiled", cached)
        patch.setattr(_compile, "_ready", type(_compile._ready)())
        yield


def graphs() -> int:
    """How many graphs this process has compiled, through Dynamo or past it, or found where another has kept them."""
    passes = counters["adafactor_compiled"]
    return int(counters["stats"]["unique_graphs"] + passes["passes_compiled"] + passes["passes_found"])
