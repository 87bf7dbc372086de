"""One part in this process: `python -m _card.child PART OPTIONS`, see children.py."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from typing import Any

from _card.errors import shortened

PARTS = {
    "sanity": "checks",
    "parity": "checks",
    "syncs": "checks",
    "tests": "suite",
    "first_steps": "steps",
    "steps": "steps",
    "training": "training",
}


def _plain(value: Any) -> Any:
    is_timing = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_timing else str(value)


def main(part: str, options: str) -> int:
    # What libraries and tests print must not come between the records.
    with os.fdopen(os.dup(1), "w") as to:
        os.dup2(2, 1)
        record: dict[str, Any] = {}

        def emit() -> None:
            print(json.dumps(record, default=_plain), file=to, flush=True)

        try:
            measure = getattr(importlib.import_module(f"_card.{PARTS[part]}"), part)
            measure(record, emit, **json.loads(options))
        except Exception:  # whatever it is, it is a result
            record["error"] = shortened()
        emit()
    return int("error" in record)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
