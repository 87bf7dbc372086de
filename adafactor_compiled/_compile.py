"""The only place that calls torch.compile: options, limits, the cache of compiled passes, the check of the toolchain."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.utils._pytree import tree_map_only

from adafactor_compiled import _blocked
from adafactor_compiled._direct import Direct, example_of, independent_sizes, strided_example_of
from adafactor_compiled._fusion import JoinBlockLoops
from adafactor_compiled._progress import progress
from adafactor_compiled._unrolled import apply_kernels, kernel_statistics

CPU_OPTIONS: dict[str, Any] = {
    # Inductor fuses a pointwise node into a reduction's loop only where it stands before it: keep program order.
    "reorder_for_locality": False,
    # Fuse loops that share as little as one number (10 bytes otherwise): a parallel loop costs a small matrix 2 us.
    "score_fusion_memory_threshold": 1,
    # An update with momentum is read twice. Written out in between it would take the memory of a parameter and three passes.
    "realize_reads_threshold": 16,
    # Fused multiply-add: statistics of 768 x 3072 in 0.25 ms instead of 0.38.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Checks of what our own grouping has already established cost as much as the step of a small matrix.
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,
}

# Loads and stores with a stride, which Inductor would rather not vectorize at all: 3 x 3 kernels take half the time with it.
STRIDED = {"cpp.enable_tiling_heuristics": False}
# Passes over a matrix in blocks. Loops over blocks and rows stay apart because examples have strides of their own.
BLOCKS = {"_post_fusion_custom_pass": JoinBlockLoops()}
OPTIONS_OF: dict[Callable[..., Any], dict[str, Any]] = {
    kernel_statistics: STRIDED,
    apply_kernels: STRIDED,
    _blocked.statistics: BLOCKS,
    _blocked.step_matrix: BLOCKS,
}


class Pass(NamedTuple):
    """A function to compile and all that its graph depends on."""

    function: Callable[..., Any]
    device_type: str
    variant: Hashable


class Call(NamedTuple):
    """A pass and arguments of the shapes it may be called with, on the meta device."""

    key: Pass
    arguments: tuple[Any, ...]


@functools.cache
def compiled(key: Pass) -> Callable[..., Any]:
    """The pass under torch.compile, the same object each time it is asked for, in all optimizers of a process.

    Sizes are dynamic: one graph serves every shape of every network. What stays static is in the variant, so that a pass is
    one graph; `isolate_recompiles` keeps Dynamo's recompile limit, which counts by code object, to this one pass.
    """
    compile = functools.partial(torch.compile, key.function, dynamic=True, fullgraph=True, isolate_recompiles=True)
    if key.device_type != "cpu":
        return compile()
    options = OPTIONS_OF.get(key.function, {})
    example = strided_example_of if options is BLOCKS else example_of
    return Direct(key.function, lambda backend: compile(backend=backend), {**CPU_OPTIONS, **options}, example)


def size_variant(*sizes: int) -> tuple[int, ...]:
    """What a graph with these dynamic sizes depends on: which of them are 1."""
    return tuple(min(size, 2) for size in sizes)


_ready: dict[Pass, float] = {}  # and the seconds it took; of this process, as are the compiled passes


def compile_seconds(key: Pass) -> float | None:
    """What compiling a pass took in this process; None where it is not compiled."""
    return _ready.get(key)


def make_ready(calls: Sequence[Call], device: torch.device, show_progress: bool | None) -> None:
    """Compile the passes that are not compiled yet, by calling each on tensors made for it."""
    missing = [call for call in {call.key: call for call in calls}.values() if call.key not in _ready]
    for call in progress(missing, "compiling Adafactor", show_progress):
        start = time.perf_counter()
        function = compiled(call.key)
        if isinstance(function, Direct):
            function.compile(call.arguments)
        else:
            with independent_sizes():
                function(*tree_map_only(Tensor, functools.partial(torch.zeros_like, device=device), call.arguments))
        _ready[call.key] = time.perf_counter() - start


def toolchain_failure(error: BaseException) -> str | None:
    """What is wrong with the toolchain, where that is why a compilation failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InvalidCxxCompiler):
            return "no C++ compiler was found"
        if isinstance(seen, (CppCompileError, PermissionError, FileNotFoundError)):
            return f"the C++ compiler failed: {_first_line(seen)}"
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return None


def _first_line(error: BaseException) -> str:
    text = error.output if isinstance(error, CppCompileError) else str(error)
    return next((line for line in str(text).splitlines() if line.strip()), type(error).__name__)


REMEDY = (
    "install one (Debian and Ubuntu: `apt-get install g++`; conda: `conda install gxx`), name it in the environment "
    "variable CXX, or go without: `compile=False` takes the multi-tensor path with the same results"
)
