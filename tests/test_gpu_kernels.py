"""Kernels for a GPU, as Triton builds them for sm_90. Needs Triton, which CUDA builds of torch bring, and no GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from adafactor_compiled._fused.pieces import STATISTICS

PROFILES = Path(__file__).resolve().parents[1] / "profiles"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, of a CUDA build of torch")


class Bound(NamedTuple):
    launches: int
    bytes_per_element: float


MATRICES, VECTORS, KERNELS = (3072, 768), (3072,), (256, 256, 3, 3)
BOUNDS = {
    # p and g are read for all sums, and again for the update, and p is written: 20 bytes, and 0.5 for the sums of blocks.
    MATRICES: Bound(4, 20.5),
    # A launch sums and updates: p, g and the second moment are read, two are written: 20 bytes.
    VECTORS: Bound(1, 20.0),
    # p and g are read twice, p is written; rows and columns, two thirds of p, are read twice and written.
    KERNELS: Bound(3, 28.0),
}
SHAPES = [(3072, 768), (768, 3072), (768, 16), (33, 20), (768,), (5000,), (64, 64, 3, 3), (64, 64, 1, 1)]
CASES = {
    torch.float32: {"beta1": 0.9, "cautious": True},
    torch.bfloat16: {"beta1": None, "stochastic_rounding": True},
    torch.float16: {"beta1": 0.9, "stochastic_rounding": True},
    torch.float64: {"beta1": 0.9},
}
STACK = 16  # bytes: numbers set aside before a loop that does not need them, by one release of Triton


@pytest.fixture(scope="module")
def kernels_of():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROFILES))
        import gpu_kernels

        yield gpu_kernels.kernels_of


@needs_triton
@pytest.mark.parametrize("shape", BOUNDS, ids=str)
def test_launches_and_bytes(kernels_of: Any, shape: tuple[int, ...]) -> None:
    step, bound = kernels_of([shape] * 3), BOUNDS[shape]
    assert 0 < step["triton_launches"] <= bound.launches
    assert step["aten_launches"] <= 1  # the numbers of the members
    assert step["bytes_per_element"] <= bound.bytes_per_element


SHARDED = {
    # The same reads; besides, sums are added up in float64, and averages are written when these have come.
    MATRICES: Bound(6, 21.5),
    # Summed before it is updated, as what is long: p, g and the second moment are read twice, two are written.
    VECTORS: Bound(4, 32.0),
    KERNELS: Bound(4, 31.0),
}


@needs_triton
@pytest.mark.parametrize("shape", SHARDED, ids=str)
def test_launches_and_bytes_of_pieces(kernels_of: Any, shape: tuple[int, ...]) -> None:
    step, bound = kernels_of([(8 * shape[0], *shape[1:])] * 3, ranks=8), SHARDED[shape]
    assert 0 < step["triton_launches"] <= bound.launches
    assert step["aten_launches"] <= 10  # the buffer that ranks add up, and what they agree on
    assert step["bytes_per_element"] <= bound.bytes_per_element


@needs_triton
@pytest.mark.parametrize("ranks", [1, 8])
def test_launches_do_not_grow_with_members(kernels_of: Any, ranks: int) -> None:
    few, many = (kernels_of([(64, 48), (64,), (8, 8, 3, 3)] * k, ranks=ranks) for k in (2, 40))
    assert many["triton_launches"] == few["triton_launches"]
    assert many["aten_launches"] == few["aten_launches"]


@needs_triton
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize(("dtype", "options"), CASES.items(), ids=map(str, CASES))
def test_all_are_built_ahead_and_keep_to_registers(
    kernels_of: Any, dtype: torch.dtype, options: dict[str, Any], ranks: int
) -> None:
    step = kernels_of(SHAPES, dtype, ranks=ranks, **options)
    assert step["graphs_in_steps"] == 0
    builds = {kernel["name"]: kernel["build"] for kernel in step["of_kernels"]}
    assert max(build["stack"] for build in builds.values()) <= STACK
    for kernel in step["of_kernels"]:
        of_sums = kernel["name"] == "step_vectors" and kernel["constants"]["CALL"] == STATISTICS
        if kernel["constants"].get("ALIGNED") and not of_sums:
            assert kernel["build"]["wide_loads"] > 0, kernel


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROFILES))
    import gpu_kernels

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="need Triton"):
        gpu_kernels.kernels_of([(2, 2)])
