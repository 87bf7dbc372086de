"""Other compilers for the passes of the compiled path, where Inductor would cost seconds; and a count of what was compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from adafactor_compiled._compile import passes
from adafactor_compiled._step import calls, routes
from adafactor_compiled._update import blocks, chunks

Compiler = Callable[[passes.Pass], Callable[..., Any]]


def uncompiled(key: passes.Pass) -> Callable[..., Any]:
    return key.function


def aot_eager(key: passes.Pass) -> Callable[..., Any]:
    of = key.function
    own = FunctionType(of.__code__.replace(co_name=f"{of.__name__}_for_a_test"), of.__globals__)
    return torch.compile(own, backend="aot_eager", dynamic=True, fullgraph=True)


@contextmanager
def compiled_by(compiler: Compiler) -> Iterator[None]:
    """Have every pass of the compiled path come from `compiler` instead of Inductor, from an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "compiled", functools.cache(compiler))
        patch.setattr(passes, "_ready", type(passes._ready)())
        yield


def graphs() -> int:
    """How many graphs this process has compiled, the probe of the environment included."""
    with torch.no_grad():
        passes.environment()
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def cut_otherwise(**constants: int) -> Iterator[None]:
    """Have matrices cut by other constants of blocks.py, or convolutions by another SLICES of chunks.py."""
    caches = blocks.blocking_of, routes.route_of, calls.passes_of
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(chunks if name == "SLICES" else blocks, name, value)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()
