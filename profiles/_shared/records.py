"""One JSON for each run: what was measured, on which machine, with which code."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "profiles" / "results"


def machine() -> dict[str, Any]:
    """What a number depends on beside the code: versions, processor, threads; and the commit of the code."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def write_result(name: str, payload: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write `directory/name.json`: the machine, then `payload`, anything of dicts, sequences, strings and numbers.

    Dataclasses (a `Timing`) become dicts, numbers that are not finite become null, and what JSON does not know (a dtype, a
    device, a path) its string.
    """
    path = directory / f"{name}.json"
    write_json(path, {"profile": name, "machine": machine(), **payload})
    return path


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a file that is whole at any moment: who writes as it goes may be cut off while it writes."""
    text = json.dumps(_plain(payload), indent=1)
    # A list of numbers or names reads better on one line; a line break never lies inside a JSON string.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\n\s*", " ", match.group()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".json.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read_result(name: str, directory: Path = RESULTS) -> dict[str, Any]:
    """What `write_result` wrote last."""
    return json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit, with a "+" where the code has changes that are in none; None outside a clone."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "adafactor_compiled/*.py", "adafactor_compiled/*.cpp", "profiles/*.py")
    return commit and commit + ("+" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
