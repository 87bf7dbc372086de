"""DTensors on ranks whose parameters are said to be on a GPU: its kernels run on this CPU, in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from sharded_training import train_beside_unsharded
from test_placements import MOMENTUM, PLACEMENTS, placed_parameters

from adafactor_compiled._fused.gpu import launches, layout

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
from interpreter import why_not

CAUTIOUS = {**MOMENTUM, "cautious": True}
STEPPED_BY_KERNELS = [name for name, (_, _, all_reduces) in PLACEMENTS.items() if all_reduces < 2]


def check_training(name: str, options: dict[str, Any], by_kernels: bool) -> None:
    placements, shapes, _ = PLACEMENTS[name]
    params = placed_parameters(placements, shapes, ("a", "b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
        for cached in (layout.kernels_of, launches.try_out):
            cached.cache_clear()
        optimizer = train_beside_unsharded(params, options, {"compile": None, "fused": True}, steps=3)
        plans = [plan for plan in optimizer._stepper._plans.values() if plan is not None]
        assert plans
        assert all((not plan.sharded) == by_kernels for plan in plans)
        assert all(isinstance(kernels, layout.Kernels) for plan in plans for kernels in plan.kernels)
    layout.kernels_of.cache_clear()


@pytest.mark.parametrize("name", STEPPED_BY_KERNELS)
def test_training_equals_unsharded(ranks, name):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    for options in ({}, CAUTIOUS):
        ranks(4).run(check_training, name, options, True)


def test_what_may_be_skipped_is_left_to_operations_of_torch(ranks):
    """Whether the gradient of another rank is finite is to be added up, which kernels of a GPU do not look at."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    ranks(4).run(check_training, "hybrid", {**CAUTIOUS, "nonfinite": "skip"}, False)
