"""The kinds of parameters cover the networks that people train."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from adafactor_compiled import _compile, _routes
from adafactor_compiled._direct import Direct
from adafactor_compiled._kinds import SHAPES, calls_like
from adafactor_compiled._shape_class import ShapeClass, contiguous_stride

PROFILES = Path(__file__).resolve().parents[1] / "profiles"


def class_of(shape: tuple[int, ...], dtype: torch.dtype, momentum: bool, rounding: bool) -> ShapeClass:
    stride = contiguous_stride(shape)
    return ShapeClass(shape, stride, stride, dtype, dtype, torch.device("cpu"), momentum, rounding)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_every_network_finds_all_its_passes(
    dtype: torch.dtype, rounding: bool, momentum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PROFILES))
    from _networks import NETWORKS

    kinds = {call.key for call in calls_like([class_of((3,), dtype, momentum, rounding)])}
    for network, shapes in NETWORKS.items():
        needed = [
            call.key for shape in set(shapes()) for call in _routes.calls_of(class_of(shape, dtype, momentum, rounding), 1)
        ]
        assert kinds.issuperset(needed), network


def test_a_pass_is_compiled_for_the_shapes_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class_ = class_of((3, 5), torch.float32, False, False)
    compiled = []
    monkeypatch.setattr(_compile, "_ready", {})
    monkeypatch.setattr(_compile, "compiled", lambda key: Direct(key.function, ("never kept",), {}, in_blocks=False))
    monkeypatch.setattr(_compile, "helped", lambda *arguments: nullcontext())
    monkeypatch.setattr(_compile, "_compile", lambda call, device, wait: compiled.append(call) or True)
    calls = _routes.calls_of(class_, 1)
    _compile.make_ready(calls, torch.device("cpu"), False, lambda: calls_like([class_]))
    assert [call.key for call in compiled] == [call.key for call in calls]
    assert compiled[0].arguments[0].shape == (512, 8)


def test_each_kind_is_another_pass() -> None:
    seen: set[object] = set()
    for shape in SHAPES:
        keys = {call.key for call in _routes.calls_of(class_of(shape, torch.float32, False, False), 1)}
        assert keys - seen, shape
        seen |= keys
