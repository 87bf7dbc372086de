"""Compiled passes that are called without Dynamo's guards.

A call through Dynamo costs 35 us, half of it to establish what a `Pass` and the plan of a step already say: dtypes, ranks,
layouts and which sizes are 1. For a small matrix that is more than its step. So only the first call goes through Dynamo; the
graph that it ends in, whose sizes are dynamic, is called directly from then on: 18 us.

Without guards a graph must hold for all arguments that its `Pass` allows. It is therefore made from examples, never from a
step's own tensors, whose sizes may happen to be equal: Dynamo would take them for one size. A guard that a size is at most
4,096 goes with the others, on purpose: for longer sums Inductor would use another, slower form.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.fx.experimental._config as symbolic_shapes_config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from adafactor_compiled._ranges import profiled, range_of_pass

Graph = Callable[..., Any]

EXAMPLE_SIZE = 4096  # the most elements that Inductor sums in one plain loop: no example is larger in any dimension


def example_of(x: Tensor) -> Tensor:
    """Zeros of the dtype and rank of `x`, no larger than its graph needs; on the CPU, also for a tensor on the meta device."""
    return torch.zeros([min(size, EXAMPLE_SIZE) for size in x.shape], dtype=x.dtype)


def strided_example_of(x: Tensor) -> Tensor:
    """An example with strides of its own, of a graph for any strides but the last: none of its loops are merged."""
    sizes = example_of(x).shape
    padded = torch.zeros([size + (dim > 0) for dim, size in enumerate(sizes)], dtype=x.dtype)
    return padded[tuple(slice(size) for size in sizes)]


def independent_sizes() -> Any:
    """Within it, sizes that happen to be equal in a first call stay independent in the graph."""
    return symbolic_shapes_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]


class Direct:
    """A pass over plain tensors, compiled by `compile`, that returns None or a named tuple of tensors.

    `example` makes the examples for its arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        compile: Callable[[Callable[..., Any]], Graph],
        options: dict[str, Any],
        example: Callable[[Tensor], Tensor],
    ):
        self._name = function.__name__
        parameters = inspect.signature(function).parameters.values()
        self._parameters = [x.name if x.default is x.empty else f"{x.name}={x.default!r}" for x in parameters]
        self._options, self._example = options, example
        self._checked = compile(self._backend)
        self._graphs: dict[int, Graph] = {}  # by the number of threads, which a graph contains
        self._reached: tuple[Graph, list[str], Sequence[Tensor]] | None = None

    def __call__(self, *arguments: Any) -> Any:
        graph = self._graphs.get(torch.get_num_threads())
        if graph is None:
            graph = self.compile(arguments)
        if profiled():
            with range_of_pass(self._name):
                return graph(*arguments)
        return graph(*arguments)

    def for_now(self) -> Graph:
        """What to call instead in the same number of threads, and while no profiler starts or stops: 3 us less."""
        graph = self._graphs.get(torch.get_num_threads())
        return self if graph is None or profiled() else graph

    def compile(self, arguments: tuple[Any, ...]) -> Graph:
        """Make the graph for this number of threads, by a call on examples; the arguments may be on the meta device."""
        self._reached = None
        examples = tree_map_only(Tensor, self._example, arguments)
        with independent_sizes():
            result = self._checked(*examples)
        if self._reached is None:  # Dynamo is off: nothing is compiled, and nothing is kept
            return self._checked
        inner, inputs, outputs = self._reached
        graph = self._graphs[torch.get_num_threads()] = _direct(inner, inputs, self._parameters, outputs, result)
        self._reached = None
        return graph

    def _backend(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Graph:
        """Inductor, noting which graph a call reaches and what it returns."""
        inner = cast(Graph, compile_fx(graph, examples, config_patches=self._options))
        inputs = _inputs_of(graph)

        def reached(*values: Any) -> Any:
            outputs = inner(*values)
            self._reached = (inner, inputs, outputs)
            return outputs

        return reached


def _inputs_of(graph: fx.GraphModule) -> list[str]:
    """Expressions for the inputs of a graph over the arguments of its pass, for example `p.size()[1]`.

    Dynamo names the source of each input: `L['p'].size()[1]`.
    """
    sources = [node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder"]
    return [re.sub(r"L\['(\w+)'\]", r"\1", source) for source in sources]


def _direct(inner: Graph, inputs: list[str], parameters: list[str], outputs: Sequence[Tensor], result: Any) -> Graph:
    """The call of a graph; where the pass returned its outputs is seen from a first call's `outputs` and `result`.

    One function from the arguments of the pass to Inductor's code: each call of another function in between would take
    0.5 us, and what wraps that code for autograd 6 us. All that it does here is to count the versions of what is written.
    """
    code, written = _code_of(inner)
    lines = f"count([{', '.join(inputs[i] for i in written)}]), code([{', '.join(inputs)}])"
    call: Graph = eval(f"lambda {', '.join(parameters)}: ({lines})[1]", {"count": increment_version, "code": code})
    if result is None:
        return call
    make = type(result)._make
    order = [next(i for i, output in enumerate(outputs) if output is x) for x in result]

    def direct(*arguments: Any) -> Any:
        outputs = call(*arguments)
        return make([outputs[i] for i in order])

    return direct


def _code_of(inner: Graph) -> tuple[Graph, list[int]]:
    """Inductor's code in a graph, a function of a list, and which inputs it writes to."""
    graph: Any = inner
    while not hasattr(graph, "current_callable"):
        wrapped = getattr(graph, "compiled_fn", None) or getattr(graph, "__wrapped__", None)
        if wrapped is None:
            return lambda inputs: inner(*inputs), []
        graph = wrapped
    return graph.current_callable, sorted(graph.mutated_input_idxs)
