"""The kernels of a GPU on this CPU, in Triton's interpreter, for parameters that are said to be on one."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import pytest

from adafactor_compiled._fused import forms
from adafactor_compiled._fused import launches as fused
from adafactor_compiled._fused.gpu import launches, layout


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[interpreter.Memory]:
    if (reason := interpreter.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(layout, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(fused, "_ready", {})
    for cached in (layout.kernels_of, launches.try_out):
        cached.cache_clear()
    interpreter.patch_once(monkeypatch)
    yield interpreter.check_accesses(monkeypatch)
    for cached in (layout.kernels_of, launches.try_out):
        cached.cache_clear()


@pytest.fixture
def in_parts(on_gpu: interpreter.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, tiles and launches for what fits into one otherwise."""
    for name, value in {
        "BLOCK_BYTES": 256,
        "LEAST_ROWS": 2,
        "TILE": {2: 64, 4: 64, 8: 64},
        "FEW_ROWS": 8,
        "WIDE": 0.25,
        "WIDEST": 16,
        "CHUNK": 16,
        "SHORTEST": (8, 16),
        "TILE_OF_COLUMNS": (2, 16),
        "TILE_OF_SLICES": 16,
    }.items():
        monkeypatch.setattr(layout, name, value)
    monkeypatch.setattr(forms, "MOST_OF_SLICE", 16)
    monkeypatch.setattr(launches, "LEAST_PARTIAL", 64)
