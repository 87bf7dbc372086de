"""How a pass is traced and compiled: apart from what surrounds the step, and for any sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

from adafactor_compiled import _inductor
from adafactor_compiled._compile import CPU_OPTIONS
from adafactor_compiled._direct import Direct


class Pair(NamedTuple):
    x: Tensor
    y: Tensor | None


class Doubled(NamedTuple):
    total: Tensor
    x: Tensor


def double(pair: Pair, count: int, out: Tensor, factor: Tensor | None = None) -> Doubled:
    """All that a pass may take and give: tensors in a named tuple, a number, an argument that is left out, a write."""
    x = pair.x * 2 if factor is None else pair.x * factor
    out.copy_(x.sum(-1) / count)
    return Doubled(x.sum() + out[0], x.mT + 1)


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def arguments(rows: int, columns: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return Pair(torch.randn(rows, columns, generator=generator), None), columns, torch.zeros(rows)


def check(function: Direct, rows: int, columns: int) -> None:
    ours, theirs = arguments(rows, columns), arguments(rows, columns)
    result, expected = function(*ours), double(*theirs)
    assert isinstance(result, Doubled)
    torch.testing.assert_close(tuple(result), tuple(expected), check_stride=True)
    torch.testing.assert_close(ours[2], theirs[2])
    assert ours[2]._version == 1
    assert ours[0].x._version == 0


@pytest.mark.parametrize("size", [(5, 5), (5, 7)], ids=["square", "oblong"])
def test_one_graph_for_all_sizes(size: tuple[int, int]) -> None:
    """Sizes that are equal in the first call are not one in the graph."""
    function = Direct(double, (), CPU_OPTIONS, in_blocks=False)
    function.compile(arguments(*size))
    for rows, columns in ((5, 5), (3, 9), (64, 2), (2, 1000)):
        check(function, rows, columns)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} ran in the caller's mode")


@pytest.mark.parametrize("settings", [{}, {"cpp_wrapper": True}], ids=["as they are", "cpp_wrapper"])
def test_what_surrounds_a_step_does_not_reach_its_passes(settings: dict[str, Any]) -> None:
    function, examples = Direct(double, (), CPU_OPTIONS, in_blocks=False), arguments(5, 7)
    examples = (Pair(examples[0].x.to("meta"), None), 7, examples[2].to("meta"))
    with inductor_config.patch(settings):
        with torch.device("meta"), torch.enable_grad():
            function.compile(examples)
        check(function, 6, 8)


def test_traced_in_no_mode_of_the_caller() -> None:
    examples = arguments(5, 7)
    with Nothing():
        compiled, made = _inductor.compile_pass(double, examples, CPU_OPTIONS, in_blocks=False)
    assert compiled.current_callable is not None
    assert made.inputs == ["pair.x", "count", "out"]
    assert [made.inputs[i] for i in made.written] == ["out"]


def test_a_missing_compiler_is_found_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_inductor, "compile_pass", lambda *_: pytest.fail("traced"))
    with inductor_config.patch({"cpp.cxx": ("/nowhere/g++",)}), pytest.raises(InvalidCxxCompiler):
        Direct(double, (), CPU_OPTIONS, in_blocks=False).compile(arguments(5, 7))
