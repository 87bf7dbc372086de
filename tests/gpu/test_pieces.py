"""The kernels of a GPU for pieces of parameters that ranks share, in Triton's interpreter, beside whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import BFLOAT16, FLOAT32
from interpreter import Memory, said_to_be_moved
from parameters import params_of, set_gradients
from simulated_ranks import CASES, Ranks

from adafactor_compiled import Adafactor
from adafactor_compiled._fused.forms import MATRICES, SLICES
from adafactor_compiled._fused.gpu.layout import VECTORS
from adafactor_compiled._fused.pieces import COUNT, STATISTICS

WITH = {
    "plain": {},
    "momentum and decay": {"beta1": 0.9, "weight_decay": 0.1},
    "cautious": {"beta1": 0.9, "cautious": True},
}


def ranks_of(memory: Memory, name: str, dtype: torch.dtype, ranks: int = 3, **options: Any) -> Ranks:
    made = Ranks.of(*CASES[name], ranks, dtype, **options)
    for rank in made.ranks:
        memory.add(rank.first, rank.third)
    return made


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("options", WITH.values(), ids=WITH)
@pytest.mark.parametrize("name", CASES)
def test_pieces(on_gpu: Memory, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Uneven ones, and of three ranks one that has nothing of what has two rows or columns."""
    ranks = ranks_of(on_gpu, name, dtype, **options)
    for seed in (1, 2):
        set_gradients(params_of(ranks.whole), seed)
        ranks.check(f"kernels, {name} in pieces")
    kinds = {launch.kernels.kind for launch in ranks.ranks[0].table.launches}
    assert kinds == {"slices": {MATRICES, SLICES, VECTORS}, "vectors": {VECTORS}}.get(name, {MATRICES})


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "cautious": True}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pieces_in_parts(on_gpu: Memory, in_parts: None, name: str, options: dict[str, Any]) -> None:
    """Several blocks of rows, chunks of columns and launches."""
    ranks_of(on_gpu, name, FLOAT32, ranks=2, **options).check(f"kernels, {name} in pieces")


@pytest.mark.parametrize("name", CASES)
def test_statistics_write_nothing_but_sums(on_gpu: Memory, name: str) -> None:
    """Ranks that do not agree on their gradients have nothing to undo; what elements agree is counted before, too."""
    ranks = ranks_of(on_gpu, name, FLOAT32, beta1=0.9, cautious=True)
    tensors = [x for rank in ranks.ranks for member in rank.table.members for x in member.written]
    before = [x.clone() for x in tensors]
    for rank in ranks.ranks:
        rank.find()
    for call, buffer in ((STATISTICS, "first"), (COUNT, "third")):
        ranks.call(call)
        ranks.add(buffer)
        assert all(getattr(rank, buffer).any() for rank in ranks.ranks)
        assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("name", CASES)
def test_stochastic_rounding_of_pieces(on_gpu: Memory, name: str) -> None:
    """The noise is that of the same elements of the whole; results next to where it decides may fall on the other side."""
    ranks = ranks_of(on_gpu, name, BFLOAT16, beta1=0.9, momentum_dtype=BFLOAT16, stochastic_rounding=True)
    for rank in ranks.ranks:
        rank.take(ranks.whole)
    ranks.step()
    ranks.whole.step()
    for i, x in enumerate(ranks.shared):
        for name, expected in (("param", x.param), ("exp_avg", ranks.whole.state[x.param]["exp_avg"])):
            assert (ranks.gathered(i, name) != expected).sum() <= 2 + expected.numel() // 2000, (i, name)


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_row_without_gradient_beside_large_ones(on_gpu: Memory, dim: int) -> None:
    """The ratio of the mean to it would overflow."""
    param = torch.ones(40, 48, requires_grad=True)
    whole = Adafactor([param], foreach=False)
    param.grad = torch.zeros_like(param)
    whole.step()
    whole.state[param]["step"] = 0  # so that averages are those of one gradient
    param.grad.fill_(1e8)
    param.grad[0], param.grad[:, 0] = 0, 0
    ranks = Ranks(whole, [dim], 2)
    for rank in ranks.ranks:
        on_gpu.add(rank.first)
    ranks.step()
    assert ranks.gathered(0, "param").isfinite().all()


def test_only_addresses_that_have_changed_are_sent(on_gpu: Memory) -> None:
    """And of one step only once; tables of shapes and slots stay. What was kept between two calls does not."""
    ranks = ranks_of(on_gpu, "rows", FLOAT32)
    launches = [launch for rank in ranks.ranks for launch in rank.table.launches]
    ranks.step()
    sent = [(launch.there.tables, launch.there.pointers) for launch in launches]
    ranks.step()
    assert all(x is launch.there.tables and y is launch.there.pointers for (x, y), launch in zip(sent, launches, strict=True))
    assert not any(launch.room for launch in launches)


@pytest.mark.parametrize(
    ("shape", "dim"), [((600, 640), 0), ((640, 600), 1), ((9000,), 0), ((40, 30, 3, 3), 0), ((4, 80, 96), 0)]
)
def test_bytes_that_are_said_to_be_moved(
    on_gpu: Memory, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dim: int
) -> None:
    ranks = Ranks.of(dim, [shape], 2, FLOAT32, beta1=0.9)
    for rank in ranks.ranks:
        on_gpu.add(rank.first)
    ranks.step()
    said = said_to_be_moved(monkeypatch)
    on_gpu.bytes = 0
    ranks.step()
    assert said() <= on_gpu.bytes <= 1.1 * said()
