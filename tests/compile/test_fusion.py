"""One loop over blocks: where it is made, and where it would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adafactor_compiled._blocked import materialize
from adafactor_compiled._direct import Direct
from adafactor_compiled._numbers import Numbers
from torch import Tensor
from torch._inductor.utils import fresh_cache

from adafactor_compiled import _blocked, _fusion
from adafactor_compiled._compile import CPU_OPTIONS


class Scheduled(Exception):
    pass


def compile_pass(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    with fresh_cache():
        return Direct(function, (), CPU_OPTIONS, in_blocks=True).compile(arguments)


@pytest.fixture
def nests(monkeypatch: pytest.MonkeyPatch) -> list[list[_fusion.Loops]]:
    """The nests of loops of each node after the pass, which ends the compilation."""
    seen: list[list[_fusion.Loops]] = []
    join = _fusion._join

    def noting(nodes: _fusion.Nodes, blocks: tuple[Any, ...]) -> _fusion.Nodes:
        seen.extend(_fusion._loops_of(node) for node in join(nodes, blocks))
        raise Scheduled

    monkeypatch.setattr(_fusion, "_join", noting)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 32, 48), (3, 5, 32, 48)], ids=["matrix", "slices"])
def test_rows_and_columns_share_a_loop(nests: list[list[_fusion.Loops]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p, g = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    with pytest.raises(Exception, match="Scheduled"):
        compile_pass(_blocked.statistics, (p, g, torch.rand(shape[:-1]), torch.rand(len(Numbers._fields))))
    sums = [loops for loops in nests if any(len(reduced) == 1 and len(outer) == len(shape) - 1 for outer, reduced in loops)]
    assert len(sums) == 1, "sums over the rows and sums over the columns of blocks should be in one loop over the blocks"
    blocks = sums[0][0][0][:-1]
    assert all(outer[: len(blocks)] == blocks for outer, _ in sums[0])


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
    compiled = compile_pass(function, (g, torch.zeros(40, 24, dtype=torch.float64)))
    out, expected = torch.zeros(40, 24, dtype=torch.float64), torch.zeros(40, 24, dtype=torch.float64)
    compiled(g, out)
    function(g, expected)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0.0)
