"""The kernels of a GPU on this CPU, in Triton's interpreter, for parameters that are said to be on one."""

from __future__ import annotations

from collections.abc import Iterator

import interpreter
import pytest

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
    yield interpreter.check_accesses(monkeypatch)
    for cached in (layout.kernels_of, launches.try_out):
        cached.cache_clear()
