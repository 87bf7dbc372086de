"""Warnings that point to the line of the user's which they are about."""

from __future__ import annotations

import sys
import warnings

INNER = ("adafactor_compiled", "torch")


def warn(message: str) -> None:
    """A UserWarning at the first line outside of this package and of torch, whose wrappers of `step` differ by release."""
    level = 1
    while sys._getframe(level).f_back and sys._getframe(level).f_globals.get("__name__", "").partition(".")[0] in INNER:
        level += 1
    warnings.warn(message, stacklevel=level + 1)
