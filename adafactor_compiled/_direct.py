"""Compiled passes that are called without Dynamo's guards.

A call through Dynamo costs 35 us, half of it to establish what a `Pass` and the plan of a step already say: dtypes, ranks,
layouts and which sizes are 1. For a small matrix that is more than its step. Inductor's code, whose sizes are dynamic, is
called directly instead: 18 us.

What such a call needs is kept on disk (`_kept.py`). What traces and compiles (`_inductor.py`) is imported where a pass is not
found there.

Without guards a graph must hold for all arguments that its `Pass` allows. It is therefore made from examples, never from a
step's own tensors, whose sizes may happen to be equal. A guard that a size is at most 4,096 goes with the others, on purpose:
for longer sums Inductor would use another, slower form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from adafactor_compiled import _kept
from adafactor_compiled._kept import Code, Made
from adafactor_compiled._ranges import profiled, range_of_pass
from adafactor_compiled._recorded import as_a_whole, names_of, recorded

Graph = Callable[..., Any]

EXAMPLE_SIZE = 4096  # the most elements that Inductor sums in one plain loop: no example is larger in any dimension


def example_of(x: Tensor) -> Tensor:
    """Zeros of the dtype and rank of `x`, no larger than its graph needs; on the CPU, also for a tensor on the meta device."""
    return torch.zeros([min(size, EXAMPLE_SIZE) for size in x.shape], dtype=x.dtype, device="cpu")


def strided_example_of(x: Tensor) -> Tensor:
    """An example with strides of its own, of a graph for any strides but the last: none of its loops are merged."""
    sizes = example_of(x).shape
    padded = torch.zeros([size + (dim > 0) for dim, size in enumerate(sizes)], dtype=x.dtype, device="cpu")
    return padded[tuple(slice(size) for size in sizes)]


class Direct:
    """A pass over plain tensors that returns None or a named tuple of tensors, compiled for any sizes.

    Args:
        function: the pass.
        variant: what its graph depends on, beside Inductor's options.
        options: Inductor's options.
        in_blocks: whether it goes over a matrix in blocks, in one loop (`_fusion.py`). Loops over blocks and rows stay apart
            because its examples have strides of their own.
    """

    def __init__(self, function: Callable[..., Any], variant: Hashable, options: dict[str, Any], in_blocks: bool):
        self._function, self._options, self._in_blocks = function, options, in_blocks
        self._name = f"{function.__module__}.{function.__qualname__} {variant}"
        self._graphs: dict[int, Graph] = {}  # by the number of threads, which a graph contains

    def __call__(self, *arguments: Any) -> Any:
        graph = self._graphs.get(torch.get_num_threads()) or self.compile(arguments)
        assert graph is not None
        if profiled():
            with range_of_pass(self._function.__name__):
                return as_a_whole(graph)(*arguments)
        return graph(*arguments)

    def for_now(self) -> Graph:
        """What to call instead in the same number of threads, and while no profiler starts or stops."""
        graph = self._graphs.get(torch.get_num_threads())
        return self if graph is None or profiled() else graph

    def is_kept(self) -> bool:
        """Whether another process, or an earlier one, has compiled it for this number of threads."""
        return _kept.read(_kept.place_of(self._name)) is not None

    def compile(self, arguments: tuple[Any, ...], wait: bool = True) -> Graph | None:
        """Find the graph for this number of threads, or make it with examples.

        Args:
            arguments: of the shapes that the pass may be called with; they may be on the meta device.
            wait: for another process that is making it; otherwise None is returned.
        """
        place = _kept.place_of(self._name)
        with _kept.claimed(place, wait) as ours:
            if not ours:
                return None
            made = _kept.read(place)
            graph = self._trace(arguments, place) if made is None else self._load(made)
        self._graphs[torch.get_num_threads()] = graph
        return graph

    def _load(self, made: Made) -> Graph:
        from torch._dynamo.utils import counters

        counters["adafactor_compiled"]["passes_found"] += 1
        return _direct(_kept.code_of(made, self._options), made, self._function)

    def _trace(self, arguments: tuple[Any, ...], place: Path | None) -> Graph:
        from torch._dynamo import config
        from torch._dynamo.utils import counters
        from torch._inductor.cpp_builder import get_cpp_compiler

        from adafactor_compiled._inductor import compile_pass

        if config.disable:  # nothing is to be compiled
            return self._function
        get_cpp_compiler()  # where there is none, the error comes now
        examples = tree_map_only(Tensor, strided_example_of if self._in_blocks else example_of, arguments)
        compiled, made = compile_pass(self._function, examples, self._options, self._in_blocks)
        counters["adafactor_compiled"]["passes_compiled"] += 1
        if place is not None and not compiled.constants:
            _kept.write(place, made)
        return _direct(cast(Code, compiled.current_callable), made, self._function)


def _direct(code: Code, made: Made, function: Callable[..., Any]) -> Graph:
    """The call of Inductor's code, or of its kernel alone where that can be (`_recorded.py`).

    One function from the arguments of the pass to the code: each call of another function in between would take 0.5 us, and
    Inductor's own call of it 6 us. All that it does here is to count the versions of what is written.
    """
    signature = inspect.signature(function, eval_str=True)
    lines = f"_count([{', '.join(made.inputs[i] for i in made.written)}]), _code([{', '.join(made.inputs)}])"
    call: Graph = eval(f"lambda {names_of(signature)}: ({lines})[1]", {"_count": increment_version, "_code": code})
    if signature.return_annotation is None:
        return recorded(call, code, made, signature)
    make = signature.return_annotation._make
    return lambda *arguments: make(call(*arguments))
