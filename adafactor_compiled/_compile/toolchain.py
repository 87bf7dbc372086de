"""Why torch.compile cannot be used here, in words that name the cause and what helps."""

from __future__ import annotations

import errno
import os
from pathlib import Path

COMPILER = (
    "install a C++ compiler (Debian and Ubuntu: `apt-get install g++`; conda: `conda install gxx`) or name it in the "
    "environment variable CXX"
)
CACHE = "name a folder that can be written to, on a disk with room, in the environment variable TORCHINDUCTOR_CACHE_DIR"
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


def forbid_in_children() -> None:
    """From now on, compiled code has run here: a forked child has its OpenMP, but none of the threads that it waits for."""
    if not _registered:
        _registered.append(True)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_note_fork)


_registered: list[bool] = []


def reason_not_to_compile() -> tuple[str, str] | None:
    """Cause and remedy, where it is known beforehand that compiled code would be wrong or would hang."""
    if not __debug__:
        return "Python runs with -O, under which torch.compile makes wrong code", "run Python without -O"
    if _forked:
        return (
            "this process was forked from one that had run compiled code, whose threads are not here",
            'start processes with the method "spawn" or "forkserver"',
        )
    return None


def cause_of(error: BaseException) -> tuple[str, str]:
    """Cause and remedy of a compilation that failed."""
    chain = list(_chain(error))
    names = [type(x).__name__ for x in chain]
    if "InvalidCxxCompiler" in names:
        return "no C++ compiler was found", COMPILER
    last = chain[-1]
    for x in chain:
        if isinstance(x, OSError) and x.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            where = f" ({Path(str(x.filename)).name})" if x.filename else ""
            return f"torch's cache of compiled code could not be written: {x.strerror}{where}", CACHE
    for x in chain:
        if type(x).__name__ == "CppCompileError":
            return f"the C++ compiler failed: {_first_line(x)}", COMPILER
    return f"a compilation failed: {type(last).__name__}: {_first_line(last)}", "mend that"


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, and those that it came from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return chain


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "output", error))
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
