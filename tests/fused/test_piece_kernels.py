"""The kernels of a CPU for pieces of parameters that ranks share, beside whole ones, without processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import BFLOAT16, FLOAT32
from parameters import params_of, set_gradients
from simulated_ranks import CASES, Ranks


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "cautious": True}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_pieces(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ranks = Ranks.of(*CASES[name], 3, dtype, **options)
    for seed in (1, 2):
        set_gradients(params_of(ranks.whole), seed)
        ranks.check("fused, in pieces")
