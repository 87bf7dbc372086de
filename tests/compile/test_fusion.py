"""One loop over blocks: where it is made, where it would be wrong, and what happens where it cannot be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from adafactor_compiled._compile import fusion, options
from adafactor_compiled._compile.examples import Pass, example_of
from adafactor_compiled._compile.passes import pass_of
from adafactor_compiled._update import matrices
from adafactor_compiled._update.matrices import materialize


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache(), torch.no_grad():
        yield


def compile_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    chosen = {**options.options_of(matrices.statistics, "cpu", False), **fusion.options()}
    return torch.compile(function, dynamic=True, fullgraph=True, options=chosen)


def key_of(function: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype) -> Pass:
    return pass_of(function, shape, torch.device("cpu"), (dtype, dtype), None, False)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many nests of sums over rows and over columns each member has in one node after the pass."""
    seen: list[int] = []
    join = fusion._join

    def noting(nodes: fusion.Nodes, blocks: tuple[Any, ...]) -> fusion.Nodes:
        nodes = join(nodes, blocks)
        sums = [
            node
            for node in nodes
            if any(len(summed) == 1 and len(loops) == len(blocks) + 1 for loops, summed in fusion._loops_of(node))
            and all(loops[: len(blocks)] == blocks for loops, _ in fusion._loops_of(node))
        ]
        seen.append(len(sums))
        return nodes

    monkeypatch.setattr(fusion, "_join", noting)
    return seen


@pytest.mark.skipif(not fusion.options(), reason="loops are joined on proven releases of torch alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 32, 48), (3, 5, 32, 48)], ids=["matrix", "slices"])
def test_rows_and_columns_share_a_loop(joined: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    key = key_of(matrices.statistics, shape, dtype)
    compile_pass(matrices.statistics)(*example_of(key))
    assert joined == [1], "sums over the rows and sums over the columns of blocks should be in one loop over the blocks"


def rows_of_another_block(g: Tensor, out: Tensor) -> None:
    rows = materialize(g.square().sum(-1).flip(0))
    out.copy_((g * rows.unsqueeze(-1)).square().sum(-2))


def rows_of_all_blocks(g: Tensor, out: Tensor) -> None:
    rows = g.square().sum(-1)
    share = materialize(rows / materialize(rows.sum(0)))
    out.copy_((g * share.unsqueeze(-1)).square().sum(-2))


@pytest.mark.parametrize("function", [rows_of_another_block, rows_of_all_blocks])
def test_columns_that_need_other_blocks_are_not_joined(function: Callable[..., None]) -> None:
    g = torch.randn(40, 16, 24, dtype=torch.float64)
    out, expected = torch.zeros(40, 24, dtype=torch.float64), torch.zeros(40, 24, dtype=torch.float64)
    compile_pass(function)(g, out)
    function(g, expected)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0.0)


@pytest.mark.skipif(not fusion.options(), reason="loops are joined on proven releases of torch alone")
def test_a_failure_leaves_the_loops_as_they_are(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: Any) -> Any:
        raise AttributeError("another release has other nodes")

    monkeypatch.setattr(fusion, "_join", failing)
    p, g, row, ones, table = example_of(key_of(matrices.statistics, (6, 32, 48), torch.float32))
    g.normal_()
    expected = matrices.statistics(p, g, row.clone(), ones, table)
    torch.testing.assert_close(compile_pass(matrices.statistics)(p, g, row, ones, table), expected)
    assert "not joined" in caplog.text


def test_an_unknown_release_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "99.0.0")
    assert fusion.options() == {}
