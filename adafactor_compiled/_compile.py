"""How passes are compiled: options, limits, the cache of compiled passes, the check of the toolchain."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from adafactor_compiled import _blocked
from adafactor_compiled._direct import Direct
from adafactor_compiled._elementwise import step_short_vector
from adafactor_compiled._helper import helped
from adafactor_compiled._progress import progress
from adafactor_compiled._unrolled import kernel_statistics

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
if _blocked.AVX2:
    # Inductor tries vector instructions out, with the C++ compiler: 4 s. All compilers know these; of newer ones that is open.
    CPU_OPTIONS["cpp.vec_isa_ok"] = True

# Loads with a stride, which Inductor would rather not vectorize at all: the sums of 3 x 3 kernels take half the time with it. A
# load of less than a vector takes as much code as eight others: they compile in half the time without.
STRIDED = {"cpp.enable_tiling_heuristics": False, "cpp.enable_loop_tail_vec": False}
ON_ONE_THREAD = {"cpp.threads": 1}  # a short vector is stepped before a second one has begun
OPTIONS_OF: dict[Any, dict[str, Any]] = {kernel_statistics: STRIDED, step_short_vector: ON_ONE_THREAD}
IN_BLOCKS = {_blocked.statistics, _blocked.step_matrix}
SUMS_ALONE = {_blocked.statistics, kernel_statistics}  # momentum and stochastic rounding are nothing to them


class Pass(NamedTuple):
    """A function to compile and all that its graph depends on."""

    function: Callable[..., Any]
    device_type: str
    variant: Hashable


def pass_of(
    function: Callable[..., Any],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    momentum: bool,
    rounding: bool,
    variant: tuple[int, ...],
) -> Pass:
    """The pass of a function for parameters and gradients of these dtypes, with these options."""
    options = () if function in SUMS_ALONE else (momentum, rounding)
    return Pass(function, device.type, (*dtypes, *options, *variant))


class Call(NamedTuple):
    """A pass and arguments of the shapes it may be called with, on the meta device."""

    key: Pass
    arguments: tuple[Any, ...]


@functools.cache
def compiled(key: Pass) -> Callable[..., Any]:
    """The pass compiled, the same object each time it is asked for, in all optimizers of a process.

    Sizes are dynamic: one graph serves every shape of every network. What stays static is in the variant, so that a pass is
    one graph.
    """
    function, device_type, variant = key
    if device_type == "cpu":
        return Direct(function, variant, {**CPU_OPTIONS, **OPTIONS_OF.get(function, {})}, function in IN_BLOCKS)
    # `isolate_recompiles` keeps Dynamo's recompile limit, which counts by code object, to this one pass.
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "isolate_recompiles": True}
    return torch.compile(function, **options)


def size_variant(*sizes: int) -> tuple[int, ...]:
    """What a graph with these dynamic sizes depends on: which of them are 1."""
    return tuple(min(size, 2) for size in sizes)


def blocks_variant(*sizes: int) -> tuple[int, ...]:
    """What a graph of sums over blocks depends on, the last size being that of a row."""
    return (*size_variant(*sizes), _blocked.fills_two_vectors(sizes[-1]))


_ready: dict[Pass, float] = {}  # and the seconds it took; of this process, as are the compiled passes


def compile_seconds(key: Pass) -> float | None:
    """What compiling a pass took in this process; None where it is not compiled."""
    return _ready.get(key)


def make_ready(
    calls: Sequence[Call], device: torch.device, show_progress: bool | None, kinds: Callable[[], list[Call]] = list
) -> None:
    """Compile the passes that are not compiled yet, by calling each on tensors made for it.

    Processes that do so at the same time, as ranks of a machine do, share the work.

    Args:
        calls: what is needed, one of each pass at least.
        device: of the tensors.
        show_progress: see `Adafactor`.
        kinds: the calls of all kinds of networks (`_kinds.py`). A pass that is one of theirs is compiled for their shapes,
            since which loops are worth two threads is up to those it is compiled for; and where there is anything to
            compile, another process goes on with them.
    """
    needed = {call.key: call for call in calls if call.key not in _ready}
    not_kept = [key for key in needed if isinstance(function := compiled(key), Direct) and not function.is_kept()]
    of_kinds = {call.key: call for call in kinds()} if not_kept else {}
    missing = [of_kinds.get(key, call) for key, call in needed.items()]
    missing.sort(key=lambda call: call.key.function is not kernel_statistics)  # the longest first: processes end together
    with helped([call for call in missing if call.key in not_kept], CPU_OPTIONS, list(of_kinds.values())):
        for _ in progress(list(missing), "compiling Adafactor", show_progress):
            start = time.perf_counter()
            call = next((call for call in missing if _compile(call, device, wait=False)), None)
            if call is None:  # other processes compile all that is left
                call = missing[0]
                _compile(call, device, wait=True)
            missing.remove(call)
            _ready[call.key] = time.perf_counter() - start


def _compile(call: Call, device: torch.device, wait: bool) -> bool:
    """Whether a pass is compiled now: not without `wait`, where another process is at it."""
    function = compiled(call.key)
    if isinstance(function, Direct):
        return function.compile(call.arguments, wait) is not None
    from adafactor_compiled._inductor import tracing

    with tracing():
        function(*tree_map_only(Tensor, functools.partial(torch.zeros_like, device=device), call.arguments))
    return True


def toolchain_failure(error: BaseException) -> str | None:
    """What is wrong with the toolchain, where that is why a compilation failed."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InvalidCxxCompiler):
            return "no C++ compiler was found"
        if isinstance(seen, (CppCompileError, PermissionError, FileNotFoundError)):
            return f"the C++ compiler failed: {_first_line(seen)}"
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return None


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "output", error))
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)


REMEDY = (
    "install one (Debian and Ubuntu: `apt-get install g++`; conda: `conda install gxx`), name it in the environment "
    "variable CXX, or go without: `compile=False` takes the multi-tensor path with the same results"
)
