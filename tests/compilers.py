"""Other compilers for the calls of the compiled path, where Inductor would cost seconds; and a count of what was compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from adafactor_compiled._compile import calls, graphs

Compiler = Callable[[graphs.Graph], Callable[..., Any]]


def uncompiled(_: graphs.Graph) -> Callable[..., Any]:
    return graphs._step


def aot_eager(_: graphs.Graph) -> Callable[..., Any]:
    of = graphs._step
    own = FunctionType(of.__code__.replace(co_name=f"{of.__name__}_for_a_test"), of.__globals__)
    return torch.compile(own, backend="aot_eager", dynamic=True, fullgraph=True)


@contextmanager
def compiled_by(compiler: Compiler) -> Iterator[None]:
    """Have every graph of the compiled path come from `compiler` instead of Inductor, from an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "compiled", functools.cache(compiler))
        patch.setattr(graphs, "_ready", type(graphs._ready)())
        yield


def count_graphs() -> int:
    """How many graphs this process has compiled, the probe of the environment included."""
    with torch.no_grad():
        graphs.environment()
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def viewed_otherwise(on_cpu: bool = True, **constants: int) -> Iterator[None]:
    """Have matrices passed by other constants of calls.py, or as to a graph for a GPU."""
    caches = calls.view_of, calls.graph_of
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(calls, name, value)
        if not on_cpu:
            matrix = calls._matrix
            patch.setattr(calls, "_matrix", lambda slices, rows, columns, _: matrix(slices, rows, columns, False))
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()
