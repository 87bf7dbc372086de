"""Compiled passes kept on disk, beside what Inductor keeps: a process that finds one there need not trace it again.

Inductor's cache is asked for a graph, which must be traced first: up to 1 s for each pass, and the import of Inductor as a
whole. What a pass has been compiled to needs 10 ms to load, and is the same in each process with the same `_environment`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

Code = Callable[[list[Any]], Any]

# At the head of every module that Inductor writes, for what passes have no use of: two thirds of the time to load the first.
IMPORTS = {
    r"\bextern_kernels\.": "from torch._inductor.select_algorithm import extern_kernels\n",
    r"\balign\(": "from torch._inductor.codegen.memory_planning import _align as align\n",
}


class Made(NamedTuple):
    """What a pass has been compiled to, and how its arguments and its result go with that."""

    source: str  # Inductor's module: its `call` takes a list and returns the outputs
    inputs: list[str]  # the items of that list, as expressions over the arguments of the pass, for example `p.size()[1]`
    written: list[int]  # which of them it writes to


def place_of(name: str) -> Path | None:
    """The file for what `name` is compiled to in this number of threads; None where nothing is to be kept or found."""
    import torch._dynamo.config as dynamo_config
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if dynamo_config.disable or config.force_disable_caches or not config.fx_graph_cache:
        return None
    settings = repr(sorted(config.save_config_portable().items()))
    key = hashlib.sha256("\n".join([_environment(), settings, name, str(torch.get_num_threads())]).encode()).hexdigest()
    return Path(cache_dir(), "adafactor_compiled", f"{key}.json")


@functools.cache
def _environment() -> str:
    """All that code depends on beside Inductor's settings: this package, torch, the processor."""
    package = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
    torch_version = f"{torch.__version__} {torch.version.git_version}"
    return " ".join(
        [package, torch_version, platform.python_version(), platform.machine(), torch.backends.cpu.get_cpu_capability()]
    )


@contextmanager
def claimed(place: Path | None, wait: bool) -> Iterator[bool]:
    """Within it no other process compiles for this place. It gives False, without `wait`, where one does already."""
    if place is None:
        yield True
        return
    from torch._inductor.codecache import LOCK_TIMEOUT

    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_suffix(".lock"))
    try:
        lock.acquire(timeout=LOCK_TIMEOUT if wait else 0)
    except Timeout:
        if wait:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def read(place: Path | None) -> Made | None:
    if place is None or not place.exists():
        return None
    try:
        return Made(**json.loads(place.read_text()))
    except (ValueError, TypeError):  # not what `write` has written
        return None


def write(place: Path, made: Made) -> None:
    from torch._inductor.codecache import write_atomic

    write_atomic(str(place), json.dumps(made._asdict()))


def code_of(made: Made, options: dict[str, Any]) -> Code:
    """Inductor's code, loaded; compiled by the C++ compiler with `options` where its binary is missing."""
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    source = made.source
    for used, line in IMPORTS.items():
        source = source if re.search(used, source) else source.replace(line, "")
    with config.patch(options):
        code: Code = PyCodeCache.load(source).call
    return code
