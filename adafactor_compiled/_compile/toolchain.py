"""Why torch.compile cannot be used here, in words that name the cause and what helps."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import torch

from adafactor_compiled._fused.cpu.build import COMPILER, LIMIT, LIMITED

C_COMPILER = "install a C compiler (Debian and Ubuntu: `apt-get install gcc`) or name it in the environment variable CC"
TRITON = "install it: `pip install triton` on Linux, `pip install triton-windows` on Windows"
CACHE = (
    "name a folder that can be written to, on a disk with room from which code may run, in the environment variable "
    "TORCHINDUCTOR_CACHE_DIR"
)
LOCALE = "set the environment variable PYTHONUTF8=1"
DIRECTORY = "change to one that is there with `os.chdir`"
INTERPRETER = "set `sys.executable` to a Python interpreter"
MORE = "set the environment variable TORCHDYNAMO_VERBOSE=1 to see all of the error"
NOT_WRITABLE = {
    getattr(errno, name)
    for name in ("EROFS", "EACCES", "EPERM", "ENOSPC", "EDQUOT", "ENOTDIR", "EISDIR", "EEXIST")
    if hasattr(errno, name)  # Windows has fewer
}
_forked = False


@functools.cache
def forbid_in_children() -> None:
    """From now on, compiled code has run here: a forked child has its OpenMP, but none of the threads that it waits for."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)


def _note_fork() -> None:
    global _forked
    _forked = True


def reason_not_to_compile() -> tuple[str, str] | None:
    """Cause and remedy, where it is known beforehand that compiled code would be wrong or would hang."""
    if not __debug__:
        return "Python runs with -O, under which torch.compile makes wrong code", "run Python without -O"
    if _forked:
        return (
            "this process was forked from one that had run compiled code, whose threads are not here",
            'start processes with the method "spawn" or "forkserver"',
        )
    if _dies_with_threads() and threading.current_thread() is not threading.main_thread():
        return (
            "this torch is built for CUDA, finds no GPU, and crashes when something is compiled after the end of a thread that "
            "has compiled",
            "step in the main thread, or install torch 2.13 or newer, or a build for CPUs",
        )
    return None


@functools.cache
def _dies_with_threads() -> bool:
    """Whether tracing leaves a pointer to what goes with its thread: seen with 2.11, no longer with 2.14."""
    return torch.__version__ < "2.13" and torch.version.cuda is not None and not torch.cuda.is_available()


def cause_of(error: BaseException) -> tuple[str, str]:
    """Cause and remedy of a compilation that failed."""
    chain = _chain(error)
    said = "\n".join(map(_text, chain))
    last = chain[-1]
    no_python = f"torch could not start Python, since `sys.executable` is {sys.executable!r}", INTERPRETER
    limit = next((os.strerror(x) for x in LIMITED if os.strerror(x) in said), None)
    if limit is not None or any(isinstance(x, MemoryError) for x in chain):
        return f"a limit of the system was reached: {limit or os.strerror(errno.ENOMEM)}", LIMIT
    if any(type(x).__name__ == "InvalidCxxCompiler" for x in chain):
        return "no C++ compiler was found", COMPILER
    if any(isinstance(x, ModuleNotFoundError) and x.name == "triton" for x in chain):
        return "Triton is missing, which makes the kernels of a GPU", TRITON
    if "Failed to find C compiler" in said:
        return "no C compiler was found, which Triton needs", C_COMPILER
    if any(isinstance(x, FileNotFoundError) for x in chain) and _has_no_directory():
        return "the working directory has been deleted", DIRECTORY
    for refused in (x for x in chain if isinstance(x, OSError)):
        where = f" ({Path(str(refused.filename)).name})" if refused.filename else ""
        if _of_a_start(refused) and refused.filename == sys.executable:
            return no_python
        if _of_a_start(refused):
            return f"the C++ compiler could not be started: {refused.strerror}{where}", COMPILER
        if refused.errno in NOT_WRITABLE:
            return f"torch's cache of compiled code could not be written: {refused.strerror}{where}", CACHE
    if (full := os.strerror(errno.ENOSPC)) in said:  # it was the compiler that wrote
        return f"torch's cache of compiled code could not be written: {full}", CACHE
    if (noexec := "failed to map segment from shared object") in said:
        return f"compiled code could not be loaded from torch's cache: {noexec}", CACHE
    for x in chain:
        if type(x).__name__ in ("CppCompileError", "CalledProcessError"):
            return f"the C++ compiler failed: {_first_line(x)}", COMPILER
    if isinstance(last, UnicodeError):
        return f"torch could not read a text in the encoding of this locale: {_first_line(last)}", LOCALE
    if not sys.executable:
        return no_python
    return f"a compilation failed: {type(last).__name__}: {_first_line(last)}", MORE


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, and those that it came from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return chain


def _has_no_directory() -> bool:
    """Whether the working directory is gone: it says so where it is asked for."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _of_a_start(error: BaseException) -> bool:
    """Whether it was raised where a process was to be started."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename == subprocess.__file__


def _text(error: BaseException) -> str:
    """Its message; of a command that failed, what it has printed."""
    output = getattr(error, "output", None) or str(error)
    return output.decode(errors="replace") if isinstance(output, bytes) else str(output)


def _first_line(error: BaseException) -> str:
    """Of its message, the first line that speaks of an error."""
    lines = [line.strip() for line in _text(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else type(error).__name__)
