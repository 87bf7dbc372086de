"""What becomes of a step on a GPU before anything is launched: which kernels, how they share launches, and what is missing."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compilers import compiled_by, uncompiled

from adafactor_compiled import Adafactor
from adafactor_compiled._compile.toolchain import cause_of
from adafactor_compiled._fused import launches as fused
from adafactor_compiled._fused.forms import MATRICES, SLICES
from adafactor_compiled._fused.gpu import launches, layout
from adafactor_compiled._fused.gpu.layout import SHORT, VECTORS, kernels_of
from adafactor_compiled._fused.pieces import COLUMNS, NEITHER, ROWS
from adafactor_compiled._state.layout import contiguous_stride
from adafactor_compiled._state.shape_class import ShapeClass

GPU = torch.device("cuda")


def class_of(*shape: int, dtype: torch.dtype = torch.float32, stride: tuple[int, ...] | None = None) -> ShapeClass:
    stride = contiguous_stride(shape) if stride is None else stride
    return ShapeClass(shape, stride, stride, dtype, dtype, GPU, len(shape) > 1, None)


def launches_of(*members: ShapeClass) -> list[Any]:
    return fused.launches_of([fused.planned(of) for of in members])


KINDS = {
    class_of(768, 3072): MATRICES,
    class_of(4, 768, 3072): MATRICES,
    class_of(768, 3072, stride=(1, 768)): MATRICES,
    class_of(5, 1): MATRICES,
    class_of(768): SHORT,
    class_of(): SHORT,
    class_of(5000): VECTORS,
    class_of(64, 64, 3, 3): SLICES,
    class_of(64, 64, 3, 3, stride=(576, 1, 192, 64)): SLICES,
    class_of(768, 3, 16, 16): SLICES,
    class_of(64, 64, 1, 1): SHORT,
    class_of(256, 64, 1, 1): VECTORS,
    class_of(0): None,
    class_of(768, 3072, stride=(6144, 2)): None,
    class_of(64, stride=(2,)): None,
    class_of(8, 4, 3, 3, stride=(72, 18, 6, 2)): None,  # its momentum would lie otherwise
    class_of(8)._replace(plain=False): None,
    class_of(8)._replace(grad_dtype=torch.float8_e4m3fn): None,
    class_of(8)._replace(device=torch.device("xpu")): None,
}


@pytest.mark.parametrize(("of", "kind"), KINDS.items(), ids=str)
def test_kinds(of: ShapeClass, kind: str | None) -> None:
    kernels = kernels_of(of)
    assert (kernels and kernels.kind) == kind


OF_PIECES = {  # and whether they step as their transposes
    (class_of(96, 3072), ROWS): (MATRICES, False),
    (class_of(0, 3072), ROWS): (MATRICES, False),
    (class_of(2, 131_072), ROWS): (MATRICES, False),
    (class_of(4, 0, 64), ROWS): (MATRICES, False),
    (class_of(96, 384), COLUMNS): (MATRICES, True),
    (class_of(96, 0), COLUMNS): (MATRICES, True),
    (class_of(8, 1024, 1024), NEITHER): (MATRICES, False),
    (class_of(8, 64, 3, 3), NEITHER): (SLICES, False),
    (class_of(8, 64, 1, 1), NEITHER): (VECTORS, False),
    (class_of(0, 64, 3, 3), NEITHER): (VECTORS, False),
    (class_of(96), NEITHER): (VECTORS, False),
    (class_of(0), NEITHER): (VECTORS, False),
}


@pytest.mark.parametrize(("piece", "expected"), OF_PIECES.items(), ids=str)
def test_kinds_of_pieces(piece: tuple[ShapeClass, int], expected: tuple[str, bool]) -> None:
    """All ranks have the same kind where they finish the same sums; what is empty finishes them too."""
    kernels = kernels_of(*piece)
    assert kernels is not None
    assert (kernels.kind, kernels.swapped) == expected


@pytest.mark.parametrize(("shape", "split"), [((5, 0), ROWS), ((0, 5), COLUMNS), ((0, 4, 5), ROWS)])
def test_what_is_empty_as_a_whole_has_no_kernels(shape: tuple[int, ...], split: int) -> None:
    assert kernels_of(class_of(*shape), split) is None


COVERED = [
    (50_257, 768),
    (3072, 768),
    (768, 3072),
    (16, 4096),
    (16, 131_072),
    (3, 1024, 1024),
    (64, 64, 3, 3),
    (70_000,),
    (7, 1),
]


@pytest.mark.parametrize("stride", [(131_072, 1), (1, 16)])
def test_few_rows_are_many_blocks_where_they_are_wide(stride: tuple[int, int]) -> None:
    (launch,) = launches_of(class_of(16, 131_072, stride=stride))
    assert launch.kernels.swapped
    assert len(launch.layout.tables.jobs) == 32


@pytest.mark.parametrize("shape", COVERED, ids=str)
def test_tables_cover_each_member_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Blocks of rows of all units are the whole parameter; sums and partial sums have places of their own."""
    monkeypatch.setattr(launches, "LEAST_PARTIAL", 2**40)
    (launch,) = launches_of(*[class_of(*shape)] * 3)
    units, members = launch.layout.tables.units.tolist(), launch.layout.tables.members.tolist()
    assert len(members) == len(launch.positions)
    counts = torch.bincount(launch.layout.tables.jobs, minlength=len(units)).tolist()
    taken: list[tuple[int, int]] = []
    for unit, jobs in zip(units, counts, strict=True):
        rows, per, blocks = unit[4], unit[6], unit[7]
        assert jobs == blocks
        assert (blocks - 1) * per < rows <= blocks * per
        assert launch.layout.tables.jobs[unit[8] : unit[8] + blocks].unique().numel() == 1
    for _, result, param_sq, param_count, update_sq, update_count, *_ in members:
        taken += [(result, 3), (param_sq, param_count), (update_sq, update_count)]
    if launch.kernels.kind == MATRICES:
        taken += [(unit[11], unit[7]) for unit in units] + [(unit[12], 1) for unit in units]
        partial = sorted((unit[10], 2 * unit[5] * unit[7]) for unit in units)
        assert all(start + count <= following for (start, count), (following, _) in itertools.pairwise(partial))
        assert sum(partial[-1]) == launch.layout.partial
    taken.sort()
    assert all(start + count <= following for (start, count), (following, _) in itertools.pairwise(taken))
    assert sum(taken[-1]) == launch.layout.sums


def test_sums_of_blocks_take_a_share_of_the_parameters() -> None:
    """Wide matrices have sums as large as a tenth of them: they share the memory, one launch after the other."""
    of = class_of(4096, 4096)
    made = launches_of(*[of] * 40)
    assert sorted(i for launch in made for i in launch.positions) == list(range(40))
    most = 40 * of.numel * 4 // 32
    assert max(launch.layout.partial for launch in made) * 4 <= most
    assert len(made) <= 5


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "adafactor_compiled._fused.gpu.steps":
                raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.delitem(sys.modules, "adafactor_compiled._fused.gpu.steps", raising=False)
    monkeypatch.setattr(fused, "_ready", {})
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    for cached in (layout.kernels_of, launches.try_out):
        cached.cache_clear()
    yield
    for cached in (layout.kernels_of, launches.try_out):
        cached.cache_clear()


def test_without_triton(without_triton: None) -> None:
    params = [torch.randn(8, 24).requires_grad_() for _ in range(2)]
    params[0].grad, params[1].grad = torch.ones(8, 24), torch.ones(8, 24)
    before = params[0].detach().clone()
    optimizer = Adafactor(params[:1], fused=True)
    with pytest.raises(RuntimeError, match="but Triton is missing, which makes the kernels of a GPU; install it"):
        optimizer.step()
    assert torch.equal(params[0], before)
    other = Adafactor(params[1:])
    with compiled_by(uncompiled), pytest.warns(UserWarning, match="steps without its fused kernels, since Triton is missing"):
        other.step()
    assert [line.path for line in other.summary().classes] == ["compiled"]


def test_without_a_c_compiler() -> None:
    cause, remedy = cause_of(RuntimeError("Failed to find C compiler. Please specify via CC environment variable"))
    assert cause == "no C compiler was found, which Triton needs"
    assert "apt-get install gcc" in remedy
