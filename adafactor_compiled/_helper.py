"""A second process that compiles while this one does: two cores instead of one.

Tracing and generating code is Python and most of a compilation, so that threads would not help. The processes need not speak:
each compiles what no other does, and finds on disk what others have compiled (`_kept.py`).

When this one has all it needs, the other goes on with what other networks would need, at a low priority: a network that
was never seen before then finds all its passes.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from importlib import import_module
from typing import IO, Any, cast

import torch

from adafactor_compiled import _kept
from adafactor_compiled._direct import Direct


@contextmanager
def helped(calls: Sequence[Any], options: dict[str, Any], others: Sequence[Any]) -> Iterator[None]:
    """Within it another process compiles passes of `calls`, all of them `Direct`, and a thread readies Inductor for `options`.

    The process then goes on with `others`, which nobody waits for. None is started where there is nothing to compile, on one
    core (Inductor's `compile_threads`), where nothing is kept on disk, or by a rank of several on a machine.
    """
    from torch._inductor import config

    if not calls or config.compile_threads == 1 or _kept.place_of("") is None:
        yield
        return
    alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    if alone and sys.executable:
        _start(calls, others)
    with ThreadPoolExecutor(1) as thread:
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


_running: list[subprocess.Popen[bytes]] = []  # one at most


def _start(calls: Sequence[Any], others: Sequence[Any]) -> None:
    """Start the process, instead of one that still runs."""
    stop()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command, silent = [sys.executable, "-m", __name__], subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, env=environment)
    _running.append(process)
    with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:  # it is welcome, but nobody depends on it
        pickle.dump((torch.get_num_threads(), list(calls), list(others)), stdin)


@atexit.register
def stop() -> None:
    """End the process, whatever it is at."""
    while _running:
        process = _running.pop()
        process.kill()
        process.wait()


def wait() -> None:
    """Until the process has nothing left to compile."""
    for process in _running:
        process.wait()


def main() -> None:
    from adafactor_compiled._compile import compiled

    parent = os.getppid()
    threads, calls, others = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)

    def compile_all(calls: Sequence[Any]) -> None:
        for call in calls:
            if os.getppid() == parent:  # or it is gone
                cast(Direct, compiled(call.key)).compile(call.arguments, wait=False)

    compile_all(calls)
    os.nice(10)
    compile_all(others)


if __name__ == "__main__":
    main()
