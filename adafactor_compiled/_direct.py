"""Compiled passes that are called without Dynamo's guards.

A call through Dynamo costs 35 us, half of it to establish what a `Pass` and the plan of a step already say: dtypes, ranks,
layouts and which sizes are 1. For a small matrix that is more than its step. So only the first call goes through Dynamo; the
graph that it ends in, whose sizes are dynamic, is called directly from then on: 18 us.

What such a call needs is kept on disk (`_kept.py`). What traces and compiles is imported where a pass is not found there.

Without guards a graph must hold for all arguments that its `Pass` allows. It is therefore made from examples, never from a
step's own tensors, whose sizes may happen to be equal: Dynamo would take them for one size. A guard that a size is at most
4,096 goes with the others, on purpose: for longer sums Inductor would use another, slower form.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from adafactor_compiled import _kept
from adafactor_compiled._kept import Code, Made
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


@contextmanager
def tracing() -> Iterator[None]:
    """Within it, sizes that happen to be equal in a first call stay independent in the graph.

    Dynamo's cache of what operations return stays off: with sizes that are symbols its keys take a tenth of a compilation.
    """
    import torch._dynamo.config as dynamo_config
    import torch.fx.experimental._config as symbolic_shapes_config

    with symbolic_shapes_config.patch(use_duck_shape=False), dynamo_config.patch(fake_tensor_cache_enabled=False):  # type: ignore[attr-defined]
        yield


def through_dynamo(function: Callable[..., Any], **options: Any) -> Graph:
    """`isolate_recompiles` keeps Dynamo's recompile limit, which counts by code object, to this one pass."""
    options |= {"dynamic": True, "fullgraph": True, "isolate_recompiles": True}
    return torch.compile(function, **options)


class Reached(NamedTuple):
    """What a call through Dynamo ends in."""

    graph: Any  # as Inductor returns it
    inputs: list[str]
    outputs: Sequence[Tensor]


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
        self._reached: Reached | None = None

    def __call__(self, *arguments: Any) -> Any:
        graph = self._graphs.get(torch.get_num_threads()) or self.compile(arguments)
        assert graph is not None
        if profiled():
            with range_of_pass(self._function.__name__):
                return graph(*arguments)
        return graph(*arguments)

    def for_now(self) -> Graph:
        """What to call instead in the same number of threads, and while no profiler starts or stops: 3 us less."""
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
        if graph is None:  # Dynamo is off: nothing is compiled, and nothing is kept
            return self._function
        self._graphs[torch.get_num_threads()] = graph
        return graph

    @functools.cached_property
    def _checked(self) -> Graph:
        return through_dynamo(self._function, backend=self._backend)

    def _load(self, made: Made) -> Graph:
        from torch._dynamo.utils import counters

        counters["adafactor_compiled"]["passes_found"] += 1
        return _direct(_kept.code_of(made, self._options), made, self._function)

    def _trace(self, arguments: tuple[Any, ...], place: Path | None) -> Graph | None:
        examples = tree_map_only(Tensor, strided_example_of if self._in_blocks else example_of, arguments)
        with tracing():
            result = self._checked(*examples)
        reached, self._reached = self._reached, None
        if reached is None:
            return None
        outputs = None if result is None else [next(i for i, x in enumerate(reached.outputs) if x is y) for y in result]
        compiled = _compiled_in(reached.graph)
        if compiled is None:
            graph = reached.graph
            return _direct(lambda inputs: graph(*inputs), Made("", reached.inputs, [], outputs), self._function)
        made = Made(compiled.source_code, reached.inputs, sorted(compiled.mutated_input_idxs), outputs)
        if place is not None and not compiled.constants:
            _kept.write(place, made)
        return _direct(compiled.current_callable, made, self._function)

    def _backend(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Graph:
        """Inductor, noting which graph a call reaches and what it returns."""
        from torch._inductor.compile_fx import compile_fx

        options = self._options
        if self._in_blocks:
            from adafactor_compiled._fusion import JoinBlockLoops

            options = {**options, "_post_fusion_custom_pass": JoinBlockLoops()}
        inner = cast(Graph, compile_fx(graph, examples, config_patches=options))
        inputs = _inputs_of(graph)

        def reached(*values: Any) -> Any:
            outputs = inner(*values)
            self._reached = Reached(inner, inputs, outputs)
            return outputs

        return reached


def _inputs_of(graph: fx.GraphModule) -> list[str]:
    """Dynamo names the source of each input: `L['p'].size()[1]`."""
    sources = [node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder"]
    return [re.sub(r"L\['(\w+)'\]", r"\1", source) for source in sources]


def _compiled_in(graph: Any) -> Any:
    """Inductor's `CompiledFxGraph`, which AOTAutograd has wrapped; None where it is not found."""
    while graph is not None and not hasattr(graph, "current_callable"):
        graph = getattr(graph, "compiled_fn", None) or getattr(graph, "__wrapped__", None)
    return graph


def _direct(code: Code, made: Made, function: Callable[..., Any]) -> Graph:
    """The call of a graph.

    One function from the arguments of the pass to Inductor's code: each call of another function in between would take
    0.5 us, and what wraps that code for autograd 6 us. All that it does here is to count the versions of what is written.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = [x.name if x.default is x.empty else f"{x.name}={x.default!r}" for x in signature.parameters.values()]
    lines = f"count([{', '.join(made.inputs[i] for i in made.written)}]), code([{', '.join(made.inputs)}])"
    call: Graph = eval(f"lambda {', '.join(parameters)}: ({lines})[1]", {"count": increment_version, "code": code})
    fields = made.outputs
    if fields is None:
        return call
    make = signature.return_annotation._make

    def direct(*arguments: Any) -> Any:
        outputs = call(*arguments)
        return make([outputs[i] for i in fields])

    return direct
