"""The kernels of a GPU for pieces of parameters that ranks share, in Triton's interpreter, beside whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import BFLOAT16, FLOAT32
from interpreter import Memory
from parameters import parameters, set_gradients
from simulated_ranks import Ranks

from adafactor_compiled import Adafactor
from adafactor_compiled._fused.gpu.layout import MATRICES, SLICES, VECTORS

WITH = {
    "plain": {},
    "momentum and decay": {"beta1": 0.9, "weight_decay": 0.1},
    "cautious": {"beta1": 0.9, "cautious": True},
}
SHARDED = {  # the dimension that is split of each shape
    "rows": (-2, [(70, 48), (33, 20), (3, 1100), (2, 40, 24), (2, 16)]),
    "columns": (-1, [(70, 48), (33, 20), (20, 70), (2, 24, 40), (80, 2)]),
    "slices": (0, [(5, 24, 20), (2, 40, 48), (10, 3, 3, 3), (2, 6, 3, 3), (9, 4, 1, 1)]),
    "vectors": (0, [(5000,), (31,), (2,), ()]),
}


def ranks_of(memory: Memory, name: str, dtype: torch.dtype, ranks: int = 3, **options: Any) -> Ranks:
    dim, shapes = SHARDED[name]
    params = parameters([shape for shape in shapes if shape], dtype)
    whole = Adafactor(params, foreach=False, **options)
    set_gradients(params, 0)
    whole.step()
    set_gradients(params, 1)
    made = Ranks(whole, [dim] * len(params), ranks)
    for rank in made.ranks:
        memory.add(rank.first, rank.third)
    return made


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("options", WITH.values(), ids=WITH)
@pytest.mark.parametrize("name", SHARDED)
def test_pieces(on_gpu: Memory, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Uneven ones, and of three ranks one that has nothing of what has two rows or columns."""
    ranks = ranks_of(on_gpu, name, dtype, **options)
    for seed in (1, 2):
        set_gradients(ranks.whole.param_groups[0]["params"], seed)
        ranks.check(f"kernels, {name} in pieces")
    kinds = {launch.kernels.kind for launch in ranks.ranks[0].table.launches}
    assert kinds == {"slices": {MATRICES, SLICES, VECTORS}, "vectors": {VECTORS}}.get(name, {MATRICES})
