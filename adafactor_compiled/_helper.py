"""A second process that compiles while this one does: two cores instead of one.

Tracing and generating code is Python and most of a compilation, so that threads would not help. The processes need not speak:
each compiles what no other does, and finds on disk what others have compiled (`_kept.py`).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from importlib import import_module
from typing import IO, Any, cast

import torch

from adafactor_compiled import _kept
from adafactor_compiled._direct import Direct


@contextmanager
def helped(calls: Sequence[Any], options: dict[str, Any]) -> Iterator[None]:
    """Within it another process compiles passes of `calls`, all of them `Direct`, and a thread readies Inductor for `options`.

    None is started for one pass, on one core (Inductor's `compile_threads`), where nothing is kept on disk, or by a rank of
    several on a machine.
    """
    from torch._inductor import config

    if not calls or config.compile_threads == 1 or _kept.place_of("") is None:
        yield
        return
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    with _process(calls) if len(calls) > 1 and alone and sys.executable else nullcontext(), ThreadPoolExecutor(1) as thread:
        # It imports setuptools, which changes `sys.meta_path` for a moment: not in the thread, while this one imports.
        import_module("torch.utils.cpp_extension")
        thread.submit(copy_context().run, _precompile_headers, options)  # Inductor's settings belong to a context
        yield


def _precompile_headers(options: dict[str, Any]) -> None:
    """What Inductor does before it compiles its first code, but not in time: 6 s with the C++ compiler.

    A failure is met again there.
    """
    from torch._inductor import config
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    with config.patch(options):
        # Code that is then not compiled.
        CppPythonBindingsCodeCache.load_pybinding_async([], "", needs_vec_isa=True, submit_fn=lambda _: None)


@contextmanager
def _process(calls: Sequence[Any]) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command, silent = [sys.executable, "-m", __name__], subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, env=environment)
    try:
        with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:  # it is welcome, but nobody depends on it
            pickle.dump((torch.get_num_threads(), list(calls)), stdin)
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    from adafactor_compiled._compile import compiled

    threads, calls = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    for call in calls:
        cast(Direct, compiled(call.key)).compile(call.arguments, wait=False)


if __name__ == "__main__":
    main()
