"""The compiled graphs of a process: what makes them, when they are ready, and whether torch compiles at all right now."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from adafactor_compiled._compile.calls import LONG_SUM, Graph
from adafactor_compiled._compile.progress import progress
from adafactor_compiled._state.layout import compute_dtype
from adafactor_compiled._state.moments import is_cautious
from adafactor_compiled._update import multi_tensor
from adafactor_compiled._update.members import Members
from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled._update.rounding import DRAWS

CPU = {"cpp.enable_floating_point_contract_flag": "fast"}  # fused multiply-add: a tenth of a step
# It would put guards on sizes, and so compile in a step; with dynamic sizes it never applies.
ELSEWHERE = {"triton.mix_order_reduction": False}
# Sizes are dynamic. Two that are equal in an example would have to be equal in every call: all differ, also from the constants
# of a graph. Which loops get several threads is decided by the sizes of an example too, whatever network comes first.
TYPICAL = (40, 24, 1040)


def _step(lists: tuple[Any, ...], table: Tensor, *rest: Any) -> Tensor:
    return multi_tensor.step([Members(*lists, table, Numbers.of(table), *rest)])[0]  # type: ignore[call-arg]


def run(graph: Graph, members: Members) -> Tensor:
    """Step the members of a call; gives the RMS of each and of its update, shape [2, k]."""
    measured: Tensor = compiled(graph)(members[:6], members.table.contiguous(), *members[8:])
    return measured


@functools.cache
def compiled(graph: Graph) -> Callable[..., Any]:
    """What steps the members of a call, the same object each time it is asked for, in all optimizers of a process."""
    known, wanted = torch._inductor.list_options(), CPU if graph.device.type == "cpu" else ELSEWHERE
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    return _one_at_a_time(torch.compile(_own_code(_step), dynamic=True, fullgraph=True, options=options))


def example_of(graph: Graph) -> Members:
    """Members of zeros to compile a graph with."""
    dtype, device, k = compute_dtype(graph.dtype), graph.device, range(graph.k)
    shape = tuple(
        1 if size == 1 else typical + LONG_SUM * (size > 2)
        for size, typical in zip(graph.sizes, TYPICAL[-len(graph.sizes) :], strict=True)
    )

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in k]

    table = torch.full((graph.k, len(Numbers._fields)), 0.5, dtype=dtype, device=device)
    return Members(
        zeros(*shape, dtype=graph.dtype),
        zeros(*shape, dtype=graph.grad_dtype),
        zeros(*(shape[:-1] if graph.factored else shape)),
        zeros(*shape[: graph.slices], shape[-1]) if graph.factored else [],
        zeros(*shape) if graph.twins else [],
        zeros(*shape, dtype=graph.momentum.dtype) if graph.momentum else [],
        table,
        Numbers.of(table),
        torch.zeros(graph.k, DRAWS, dtype=torch.int32, device=device) if graph.rounding else None,
        is_cautious(graph.momentum),
        graph.transposed,
    )


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
_ready: dict[tuple[Graph, int], float] = {}  # a graph and an environment: the seconds that it took
_making = threading.RLock()


def seconds_of(graph: Graph) -> float | None:
    """What compiling a graph took in this process; None where it is not compiled."""
    return next((seconds for (of, _), seconds in _ready.items() if of == graph), None)


def make_ready(graphs: Iterable[Graph], where: int, show_progress: bool | None) -> None:
    """Compile what is not compiled yet in this environment, by calling each with an example.

    Args:
        graphs: the graphs.
        where: the `environment`.
        show_progress: see `Adafactor`.
    """
    with _making:
        missing = [graph for graph in dict.fromkeys(graphs) if (graph, where) not in _ready]
        for graph in progress(missing, "compiling Adafactor", show_progress):
            start = time.perf_counter()
            run(graph, example_of(graph))
            _ready[graph, where] = time.perf_counter() - start


class _Current(threading.local):
    environment = -1


_current = _Current()
_environments = itertools.count()
_seen: list[int] = []  # those that the present functions may have graphs for
LIMIT = 8  # graphs of a code object, as Dynamo counts them


def environment() -> int | None:
    """A number for all that graphs depend on beside their arguments, as Dynamo sees it now; None where it compiles nothing.

    That is the number of threads, autocast, the default device and dtype and more, and whether graphs have been reset. A
    probe, compiled like a call and made before each step, is compiled anew for each of them, and tells which one it is for.
    """
    for _ in range(2):
        if _compiled_probe()(_PROBED)[1] and len(_seen) <= LIMIT:
            return _current.environment
        # A function that Dynamo met in a dispatch mode, or has made LIMIT graphs of, it never compiles again: ask another.
        _compiled_probe.cache_clear()
        if len(_seen) >= LIMIT:  # the calls soon have as many
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
