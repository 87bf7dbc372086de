"""The compiled passes of a process: what makes them, when they are ready, and whether torch compiles at all right now."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._compile.examples import ANY, NARROW, OF_KERNELS, Pass, example_of, magnitude
from adafactor_compiled._compile.options import OVER_ROWS, SUMS_ALONE, members_of_a_call, options_of
from adafactor_compiled._compile.progress import progress
from adafactor_compiled._state.moments import Momentum
from adafactor_compiled._update import matrices


def pass_of(
    function: Callable[..., Any],
    sizes: Sequence[int],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    momentum: Momentum | None,
    rounding: bool,
) -> Pass:
    """The pass of a function for parameters and gradients of these dtypes and, as far as that matters, of these sizes."""
    if function in SUMS_ALONE:
        momentum, rounding = None, False
    fixed = 2 if function in OF_KERNELS else 0
    magnitudes = (*sizes[:fixed], *map(magnitude, sizes[fixed:]))
    narrow = device.type == "cpu" and matrices.AVX2 and function in OVER_ROWS and not matrices.fills_two_vectors(sizes[-1])
    k = members_of_a_call(function, len(sizes) - fixed)
    return Pass(function, device, *dtypes, momentum, rounding, k, magnitudes, NARROW if narrow else ANY)


@functools.cache
def compiled(key: Pass) -> Callable[..., Any]:
    """The pass compiled, the same object each time it is asked for, in all optimizers of a process."""
    short = key.function.__name__ in ("step_vectors", "vector_sums", "apply_vector") and len(key.sizes) == 1
    options = options_of(key.function, key.device.type, short)
    return _one_at_a_time(torch.compile(_own_code(key.function), dynamic=True, fullgraph=True, options=options))


def _one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    """Where settings of torch belong to the process, not to a thread, a call that sets some changes what another compiles."""
    if torch.__version__ >= "2.13":
        return call

    def locked(*arguments: Any) -> Any:
        with _making:
            return call(*arguments)

    return locked


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: Dynamo counts the graphs of each, and makes 8 at most."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


_numbers = itertools.count()
_ready: dict[tuple[Pass, int], float] = {}  # a pass and an environment: the seconds that it took
_making = threading.RLock()


def seconds_of(key: Pass) -> float | None:
    """What compiling a pass took in this process; None where it is not compiled."""
    return next((seconds for (of, _), seconds in _ready.items() if of == key), None)


def make_ready(keys: Iterable[Pass], where: int, show_progress: bool | None) -> None:
    """Compile the passes that are not compiled yet in this environment, by calling each with an example.

    Args:
        keys: the passes.
        where: the `environment`.
        show_progress: see `Adafactor`.
    """
    with _making:
        missing = [key for key in dict.fromkeys(keys) if (key, where) not in _ready]
        for key in progress(missing, "compiling Adafactor", show_progress):
            start = time.perf_counter()
            compiled(key)(*example_of(key))
            _ready[key, where] = time.perf_counter() - start


class _Current(threading.local):
    environment = -1


_current = _Current()
_environments = itertools.count()
_seen: list[int] = []  # those that the present passes may have graphs for
LIMIT = 8  # graphs of a code object, as Dynamo counts them


def environment() -> int | None:
    """A number for all that graphs depend on beside their arguments, as Dynamo sees it now; None where it compiles nothing.

    That is the number of threads, autocast, the default device and dtype and more, and whether graphs have been reset. A
    probe, compiled like a pass and called before each step, is compiled anew for each of them, and tells which one it is for.
    """
    for _ in range(2):
        if _compiled_probe()(_PROBED)[1] and len(_seen) <= LIMIT:
            return _current.environment
        # A function that Dynamo met in a dispatch mode, or has made LIMIT graphs of, it never compiles again: ask another.
        _compiled_probe.cache_clear()
        if len(_seen) >= LIMIT:  # the passes soon have as many
            compiled.cache_clear()
            _seen.clear()
            _ready.clear()
    return None


_PROBED = torch.zeros(1, device="cpu")


def _probe(x: Tensor) -> tuple[Tensor, bool]:
    return x.detach(), torch.compiler.is_compiling()


def _numbered(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
    number = next(_environments)
    _seen.append(number)

    def run(*arguments: Any) -> Any:
        _current.environment = number
        return graph(*arguments)

    return run


@functools.cache
def _compiled_probe() -> Callable[[Tensor], tuple[Tensor, bool]]:
    return _one_at_a_time(torch.compile(_own_code(_probe), backend=_numbered, dynamic=False))
