"""Errors as results: shortened, and recorded where they happened."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

SHOWN = 1500  # characters of an error, from its end


def shortened() -> str:
    """The end of the traceback of the exception that is being handled."""
    return traceback.format_exc()[-SHOWN:]


@contextlib.contextmanager
def recorded(record: dict[str, Any]) -> Iterator[None]:
    """An exception becomes `record["error"]`, and what comes after goes on."""
    try:
        yield
    except Exception:  # whatever it is, it is a result
        record["error"] = shortened()
