"""timm's optimizers without timm, which needs a torchvision: their modules import nothing but helpers beside them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest


def timm_module(name: str) -> Any:
    """`timm.optim.{name}`; skips the test where timm is not installed (`pip install --no-deps timm`)."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("timm is not installed")
    if "bare_timm_optim" not in sys.modules:
        package = types.ModuleType("bare_timm_optim")
        package.__path__ = [str(Path(path) / "optim") for path in spec.submodule_search_locations]
        sys.modules["bare_timm_optim"] = package
    return importlib.import_module(f"bare_timm_optim.{name}")
