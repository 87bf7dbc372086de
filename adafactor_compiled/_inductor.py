"""What Inductor makes of a pass: traced to a graph of operations by `make_fx`, not by Dynamo and AOTAutograd.

A pass is a plain function of tensors without gradients, none of which overlap: all there is to do is to note its operations
and to move its writes to the end. A pass compiles in a second less that way, the first one of a process in two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as symbolic_shapes_config
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode
from torch._guards import tracing as tracing_context
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from adafactor_compiled._fusion import join_block_loops
from adafactor_compiled._kept import Made

COPY = torch.ops.aten.copy_.default


@contextmanager
def tracing() -> Iterator[None]:
    """Within it, sizes that happen to be equal in a first call stay independent in the graph.

    The cache of what operations on fake tensors return stays off: with sizes that are symbols its keys take a tenth of a
    compilation.
    """
    with symbolic_shapes_config.patch(use_duck_shape=False), dynamo_config.patch(fake_tensor_cache_enabled=False):  # type: ignore[attr-defined]
        yield


def compile_pass(
    function: Callable[..., Any], examples: tuple[Any, ...], options: dict[str, Any], in_blocks: bool
) -> tuple[CompiledFxGraph, Made]:
    """A pass that returns None or a named tuple of tensors, compiled for any sizes.

    Args:
        function: the pass.
        examples: its arguments: tensors, numbers, None, and named tuples of them.
        options: Inductor's options.
        in_blocks: whether loops over blocks are joined (`_fusion.py`).
    """
    graph, inputs = _traced(function, examples)
    placeholders = graph.graph.find_nodes(op="placeholder")
    written = {node.args[0] for node in graph.graph.find_nodes(op="call_function", target=COPY)}
    values = [node.meta["val"] for node in placeholders]
    mode = detect_fake_mode(values)
    options = {**options, "fx_graph_cache": False}  # this package keeps it: Inductor's cache would once more
    if in_blocks:
        options["_post_fusion_custom_pass"] = join_block_loops
    with config.patch(options), V.set_fake_mode(mode), tracing_context(TracingContext(mode)):
        compiled = cast(CompiledFxGraph, compile_fx_inner(graph, values, is_inference=True))
    return compiled, Made(compiled.source_code, inputs, [i for i, node in enumerate(placeholders) if node in written])


def _traced(function: Callable[..., Any], examples: tuple[Any, ...]) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a pass, and the argument of the pass that each of its inputs is, as an expression."""
    paths, structure = tree_flatten_with_path(list(examples))
    names = list(inspect.signature(function).parameters)
    leaves = {re.sub(r"^\[(\d+)\]", lambda i: names[int(i[1])], keystr(path)): x for path, x in paths}
    inputs = {name: x for name, x in leaves.items() if x is not None}

    def on_inputs(*values: Any) -> tuple[Tensor, ...]:
        given = {**leaves, **dict(zip(inputs, values, strict=True))}
        result = function(*tree_unflatten(given.values(), structure))
        return () if result is None else tuple(result)

    functional = torch.func.functionalize(on_inputs, remove="mutations")
    with _disable_current_modes(), torch.no_grad(), tracing():
        graph = make_fx(functional, select_decomp_table(), tracing_mode="symbolic")(*inputs.values())
    graph.graph.eliminate_dead_code()
    output = graph.graph.output_node()
    outputs = cast(tuple[Any, ...], output.args[0])
    output.meta["user_visible_output_idxs"] = list(range(len(outputs)))  # or Inductor may lay them out in another way
    return graph, list(inputs)
