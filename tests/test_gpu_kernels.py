"""Kernels for a GPU, as torch.compile generates them and Triton builds them for sm_90. Needs a CUDA build, and no GPU."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

PROFILES = Path(__file__).resolve().parents[1] / "profiles"
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ < "2.13", reason="needs a CUDA build of torch 2.13 or later"
)


class Bound(NamedTuple):
    launches: int  # of a call
    bytes_per_element: float


MATRICES, VECTORS, KERNELS = (768, 3072), (3072,), (256, 256, 3, 3)
BOUNDS = {
    # p and g are read for sums over rows, g for sums over columns, both for the update, and p is written: 24 bytes.
    MATRICES: Bound(6, 24.5),
    # A kernel sums and updates: p, g and the second moment are read, two are written: 20 bytes, and those of stand-ins.
    VECTORS: Bound(2, 21.0),
    # Rows and columns are as large as two thirds of p; g is read for each of them, and again with them for the RMS.
    KERNELS: Bound(9, 45.0),
}
STACK = 8  # bytes: one number set aside before a loop that does not need it


@pytest.fixture(scope="module")
def step():
    """Three members of each class, which stand-ins fill up: a process generates the kernels and builds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROFILES))
        import gpu_kernels

        return gpu_kernels.kernels_of([shape for shape in BOUNDS for _ in range(3)], build=True)


def graphs_of(step, shape):
    """The graphs of a step that step parameters of this shape."""
    return [graph for graph in step["of_graphs"] if "x".join(map(str, shape)) in graph["shapes"]]


@needs_cuda_build
@pytest.mark.parametrize("shape", BOUNDS, ids=str)
def test_launches_and_bytes(step, shape):
    graphs, bound = graphs_of(step, shape), BOUNDS[shape]
    assert graphs, "stepped without a compiled pass"
    assert all(graph["calls"] == 1 for graph in graphs)
    assert sum(graph["aten_launches"] for graph in graphs) == 0
    assert 0 < sum(graph["triton_launches"] for graph in graphs) <= bound.launches
    assert sum(graph["bytes_per_element"] for graph in graphs) <= bound.bytes_per_element


@needs_cuda_build
def test_every_graph_is_made_ahead(step):
    assert step["graphs"] == len(step["of_graphs"])
    assert step["graphs_in_steps"] == 0


@needs_cuda_build
def test_little_is_launched_outside_of_graphs(step):
    # Numbers to the device, stacked for each call; what was measured, and its copy to where it is kept.
    assert step["eager_launches"] <= 3 + len(BOUNDS)


@needs_cuda_build
@pytest.mark.parametrize("shape", BOUNDS, ids=str)
def test_triton_builds_every_kernel_in_registers(step, shape):
    for graph in graphs_of(step, shape):
        assert graph["build"]["kernels"] == len(graph["kernels"])
        assert graph["build"]["stack"] <= STACK


@needs_cuda_build
@pytest.mark.parametrize("shape", [MATRICES, VECTORS], ids=str)
def test_large_kernels_load_128_bits_at_a_time(step, shape):
    for graph in graphs_of(step, shape):
        for name, configurations in graph["build"]["large"].items():
            assert any(built["wide_loads"] for built in configurations), name


def test_another_build_of_torch_is_told_what_it_lacks(monkeypatch):
    monkeypatch.syspath_prepend(str(PROFILES))
    from _shared import fake_gpu

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="need a CUDA build of torch"):
        fake_gpu.check_build()
