"""Calls of a kernel alone: what they compute, and where the whole pass is needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from adafactor_compiled import Adafactor, _recorded
from adafactor_compiled._blocked import materialize
from adafactor_compiled._compile import CPU_OPTIONS
from adafactor_compiled._direct import Direct
from adafactor_compiled._kept import Made
from adafactor_compiled._recorded import Recorded, recorded


def center(x: Tensor, out: Tensor, factor: Tensor | None, count: int) -> None:
    """It writes sums on its way, and means."""
    mean = materialize(materialize(x.sum(-1)) / count)
    centered = x - mean.unsqueeze(-1)
    out.copy_(centered if factor is None else centered * factor)


def arguments(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, None, int]:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return x, torch.zeros(rows, columns), None, columns


@pytest.fixture(scope="module")
def compiled() -> Iterator[Recorded]:
    with fresh_cache():
        function = Direct(center, (), CPU_OPTIONS, in_blocks=True)  # for any strides
        function.compile(arguments(5, 7))
        assert isinstance(function.for_now(), Recorded)
        yield function.for_now()


@pytest.fixture
def whole_calls(compiled: Recorded, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the pass where it was called as a whole, nothing being recorded yet."""
    seen: list[Any] = []
    call = compiled._call
    monkeypatch.setattr(compiled, "_call", lambda *arguments: (seen.append(arguments), call(*arguments)))
    monkeypatch.setattr(compiled, "_again", {})
    return seen


def check(function: Any, given: tuple[Any, ...], lay_out: Any = None) -> None:
    expected = torch.zeros_like(given[1])
    center(given[0], expected, *given[2:])
    read, written = given[0]._version, given[1]._version
    function(*given) if lay_out is None else function.laid_out(lay_out, *given)
    torch.testing.assert_close(given[1], expected)
    assert given[1]._version == written + 1
    assert given[0]._version == read


def test_sizes_that_were_seen_before_need_the_kernel_alone(compiled: Recorded, whole_calls: list[Any]) -> None:
    sizes = [(5, 7), (64, 300), (300, 64)]
    for seed in range(3):
        for rows, columns in sizes:
            check(compiled, arguments(rows, columns, seed))
    assert [given[0].shape for given in whole_calls] == sizes


def test_numbers_are_part_of_what_was_seen(compiled: Recorded, whole_calls: list[Any]) -> None:
    x, out, _, count = arguments(5, 7)
    for number in (count, 2 * count, count, 2 * count):
        check(compiled, (x, out, None, number))
    assert [given[3] for given in whole_calls] == [count, 2 * count]


@pytest.mark.parametrize("which", [0, 1], ids=["read", "written"])
def test_other_strides_need_the_whole_pass(compiled: Recorded, whole_calls: list[Any], which: int) -> None:
    plain, padded = arguments(8, 8), list(arguments(8, 8))
    padded[which] = torch.zeros(8, 11)[:, :8].copy_(padded[which])
    for given in (plain, tuple(padded), plain, plain):
        check(compiled, given)
    assert len(whole_calls) == 3


def test_views_are_made_for_the_whole_pass_alone(compiled: Recorded, whole_calls: list[Any]) -> None:
    def lay_out(x: Tensor, out: Tensor, factor: None, count: int) -> tuple[Any, ...]:
        laid_out.append(x)
        return x.view(6, 10), out.view(6, 10), factor, count

    laid_out: list[Tensor] = []
    for seed in range(3):
        x, out, _, _ = arguments(6, 10, seed)
        expected = torch.zeros(6, 10)
        center(x, expected, None, 10)
        compiled.laid_out(lay_out, x.view(60), out.view(60), None, 10)
        torch.testing.assert_close(out, expected)
    assert len(laid_out) == len(whole_calls) == 1


def test_a_layout_that_lies_elsewhere_always_needs_the_whole_pass(compiled: Recorded, whole_calls: list[Any]) -> None:
    for seed in range(3):
        x, out, _, count = arguments(6, 10, seed)
        check(compiled, (x, out, None, count), lay_out=lambda x, *rest: (x.clone(), *rest))
    assert len(whole_calls) == 3


def test_too_much_scratch_always_needs_the_whole_pass(
    compiled: Recorded, whole_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recorded, "SCRATCH_BYTES", 0)
    for _ in range(3):
        check(compiled, arguments(6, 10))
    assert len(whole_calls) == 3


def cpp_fused_0(*arguments: Any) -> None:
    """Stands for a kernel."""


cpp_fused_1 = cpp_fused_0
MADE, SIGNATURE = Made("", ["x", "out", "count"], [1]), inspect.signature(center, eval_str=True)


class Wrapper:
    """As Inductor writes it."""

    def harmless(self, args: list[Any]) -> Any:
        return cpp_fused_0(*args)

    def another_kernel(self, args: list[Any]) -> Any:
        cpp_fused_1(*args)
        return cpp_fused_0(*args)

    def an_operation(self, args: list[Any]) -> Any:
        torch.ops.aten.zero_(args[0])
        return cpp_fused_0(*args)


@pytest.mark.parametrize(("name", "expected"), [("harmless", True), ("another_kernel", False), ("an_operation", False)])
def test_a_wrapper_that_does_more_is_kept(name: str, expected: bool) -> None:
    code: MethodType = getattr(Wrapper(), name)
    assert isinstance(recorded(center, code, MADE, SIGNATURE), Recorded) == expected


def test_a_kernel_that_is_called_twice_needs_its_wrapper() -> None:
    function = Recorded(center, Wrapper().harmless, MADE, SIGNATURE)
    once, twice = lambda self, args: cpp_fused_0(args), lambda self, args: (cpp_fused_0(args), cpp_fused_0(args))
    for wrapper, expected in ((once, True), (twice, False)):
        function._wrapper = wrapper
        assert (function._passed_to_kernel([]) is not None) == expected


def test_memory_is_shared_as_it_was_but_not_with_inputs() -> None:
    x = torch.zeros(40)
    placed = _recorded._in_scratch({"a": x, "b": x[8:].view(4, 8), "c": torch.zeros(3, dtype=torch.float64)}, [])
    assert placed is not None
    a, b, c = placed.values()
    assert b.data_ptr() == a.data_ptr() + 8 * x.element_size()
    assert c.data_ptr() + c.nbytes <= a.data_ptr(), "the short one comes first"
    assert (b.shape, b.stride(), c.dtype) == ((4, 8), (8, 1), torch.float64)
    assert _recorded._in_scratch({"a": x[8:]}, [x]) is None


@pytest.mark.parametrize("shape", [(96, 48), (512, 160), (24, 40, 1, 1)])
def test_a_step_needs_a_whole_pass_once_for_a_shape(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    optimizer = Adafactor(params, compile=True, show_progress=False)
    recordings: list[Any] = []
    record = Recorded._record
    monkeypatch.setattr(Recorded, "_record", lambda self, *given: (recordings.append(self), record(self, *given))[1])
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(shape)
        optimizer.step()
    assert len(recordings) <= 1  # none, where another test has stepped this shape
    assert all(again is not None for function in recordings for again in function._again.values())
