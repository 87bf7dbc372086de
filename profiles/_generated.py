"""What Inductor generates for a graph, and what each launch of it moves, before there is anything to launch it on.

`recorded()` stands in for the last stage of a compilation. All before it is torch.compile's own, guards included, and so are
the calls afterwards; in place of its kernels a graph notes the sizes that it was called with.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.dependencies import WeakDep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import AssertScalar, MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): tensors of a launch by the number of lists, blocks of a launch and
# elements of a block; and how many tensors `cat` takes (Shape.cu).
TENSORS, BLOCKS, BLOCK, CONCATENATED = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65_536, 128
KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.MULTILINE | re.DOTALL)


class Launch(NamedTuple):
    """A launch of a graph, or a call of aten from it."""

    name: str
    source: str  # the module of a Triton kernel; empty for aten
    moved: sympy.Expr  # bytes, of the sizes of a call
    times: int = 1  # what a call of aten launches, at least


class Graph:
    """A graph that was generated, and the sizes of the calls that it got."""

    def __init__(self, lowering: GraphLowering, launches: list[Launch], code: str) -> None:
        self.launches, self.code = launches, code
        self.calls: list[dict[sympy.Symbol, int]] = []
        self._inputs = list(lowering.graph_inputs.values())
        self._outputs = [
            x if isinstance(x, sympy.Expr) else (_plain(lowering, x.get_size()), x.get_dtype(), x.get_device())
            for x in lowering.graph_outputs
        ]

    def __call__(self, arguments: list[Any]) -> list[Any]:
        """Note the call, and give outputs of the right sizes."""
        symbols = zip(self._inputs, arguments, strict=True)
        sizes = {symbol: int(value) for symbol, value in symbols if isinstance(symbol, sympy.Symbol)}
        arguments.clear()
        self.calls.append(sizes)
        return [
            int(x.xreplace(sizes))
            if isinstance(x, sympy.Expr)
            else torch.empty([int(size.xreplace(sizes)) for size in x[0]], dtype=x[1], device=x[2])
            for x in self._outputs
        ]

    def moved(self) -> Iterator[tuple[Launch, int]]:
        """Each launch of each call, and its bytes."""
        for sizes in self.calls:
            for launch in self.launches:
                yield launch, int(launch.moved.xreplace(sizes))


@contextlib.contextmanager
def recorded(note: Callable[[Graph], None]) -> Iterator[None]:
    """Have each graph that is compiled noted, and launch nothing."""
    defined: list[tuple[str, Any]] = []
    define, compile_ = TritonScheduling.define_kernel, GraphLowering.compile_to_module

    def define_and_note(self: Any, source: str, nodes: Any, kernel: Any) -> str:
        name: str = define(self, source, nodes, kernel)
        defined.append((name, kernel))
        return name

    def generate(self: GraphLowering) -> Any:
        defined.clear()
        code, _ = self.codegen()
        sources = dict(KERNEL.findall(code.value))
        launches = [Launch(name, sources[name], _moved_by(self, kernel)) for name, kernel in defined]
        graph = Graph(self, [*launches, *_of_aten(self)], code.value)
        self.cache_key, self.cache_path, self.cache_linemap = "", "", []
        note(graph)
        return SimpleNamespace(call=graph, __file__="")

    TritonScheduling.define_kernel, GraphLowering.compile_to_module = define_and_note, generate
    try:
        yield
    finally:
        TritonScheduling.define_kernel, GraphLowering.compile_to_module = define, compile_


def _moved_by(lowering: GraphLowering, kernel: Any) -> sympy.Expr:
    """What a kernel reads and writes: elements, each once, since what it comes back to is taken to be in cache still.

    Kernels that share a launch go over memory on their own: what two of them read counts twice.
    """
    total = sympy.S.Zero
    for part in getattr(kernel, "sub_kernels", [kernel]):
        by_name: dict[str, set[Any]] = {}
        for node in part.features.scheduler_nodes():
            for dep in node.read_writes.reads | node.read_writes.writes:
                if not isinstance(dep, WeakDep) and dep.name not in lowering.removed_buffers:  # what is fused away
                    by_name.setdefault(dep.name, set()).add(dep)
        for name, deps in by_name.items():
            touched = sum((dep.get_numel() for dep in deps), sympy.S.Zero)
            total += sympy.Min(touched, lowering.get_numel(name)) * lowering.get_dtype(name).itemsize
    (plain,) = _plain(lowering, [total])
    return plain


def _plain(lowering: GraphLowering, expressions: Sequence[Any]) -> list[sympy.Expr]:
    """In terms of the sizes that a call brings."""
    sizevars = lowering.sizevars
    known = sizevars.shape_env.replacements
    return [sizevars.remove_precomputed_replacements(sympy.sympify(x)).xreplace(known) for x in expressions]


def _of_aten(lowering: GraphLowering) -> Iterator[Launch]:
    """What the wrapper calls beside kernels of its own, with what that reads."""
    for node in lowering.scheduler.nodes:
        if isinstance(node, ExternKernelSchedulerNode) and not isinstance(node.node, (MultiOutput, AssertScalar)):
            operation = getattr(node.node, "op_overload", None)
            name = operation._schema.name if operation is not None else type(node.node).__name__
            read = [x for x in node.node.inputs if hasattr(x, "get_numel")]
            (moved,) = _plain(lowering, [sum(x.get_numel() * x.get_dtype().itemsize for x in read)])
            yield Launch(name, "", moved, launches_of(name, [1] * len(read)))


def launches_of(name: str, numels: Sequence[int], lists: int = 1) -> int:
    """How many kernels an operation of aten launches on tensors of these sizes; a `_foreach_` one on so many lists of them."""
    if "_foreach_" in name:
        blocks = sum(-(-numel // BLOCK) for numel in numels)
        return max(-(-len(numels) // TENSORS[min(lists, 5)]), -(-blocks // BLOCKS)) + 2 * ("norm" in name)
    return -(-len(numels) // CONCATENATED) if name.startswith(("aten::cat", "aten::stack")) else 1


class Eager(TorchDispatchMode):
    """Notes what is launched outside of compiled graphs: the operations on GPU tensors that do not only make views."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, in_place = func._schema.name, func._schema.is_mutable
        lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
        read = [*(x for x in args if isinstance(x, Tensor)), *(x for of in lists for x in of)]
        written = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)] or (lists[0] if lists else read[:1])
        launches = name.startswith("aten::") and "empty" not in name and not func.is_view
        if launches and any(x.is_cuda for x in (*read, *written)):
            times = launches_of(name, [x.numel() for x in (lists[0] if lists else read[:1])], len(lists) + (not in_place))
            moved = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in (*read, *written))
            self.launches.append(Launch(name, "", sympy.Integer(moved), times))
        return result
