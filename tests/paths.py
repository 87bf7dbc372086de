"""The ways to take a step, by name."""

from __future__ import annotations

from typing import Any

PATHS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "multi-tensor": {"compile": False},
    "compiled": {"compile": True},
    "fused": {"fused": True},
}
