"""From one C++ file to a library in this process: compiled once a machine, and kept while nothing in its key changes.

A name in the cache is `<all but the compiler>-<compiler>-<content>.so`. So a library is found where the compiler is gone, and a
file is known to be whole before it is mapped. Nothing is locked: two processes may build the same, and either is right.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

SECONDS = 120  # that a compiler may take, on however busy a machine
# NaN and inf keep their meaning, and sums their order: no -ffast-math, no -fassociative-math.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# torch's own flags for what it has found the processor to be, never -march=native: homes are shared by different processors.
# -march=x86-64-v4 and -v3 stand for more than torch looks for, and GCC before 11 does not know them.
LEVELS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
FULL = ("No space left on device", "Disk quota exceeded")
LIMITED = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EFBIG)
COMPILER = (
    "install a C++ compiler (Debian and Ubuntu: `apt-get install g++`; conda: `conda install gxx`) or name it in the "
    "environment variable CXX"
)
CACHE = (
    "name a folder that you and nobody else can write to, on a disk with room from which code may run, in the environment "
    "variable ADAFACTOR_COMPILED_CACHE_DIR"
)
LIMIT = "raise the limit that is reached (`ulimit -a` lists those of a process), or free some of what it counts"


class Unavailable(RuntimeError):
    """There is no library: the cause, and what helps."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


def load(source: Path, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The functions of a C++17 file that needs no other, compiled with macros such as `PARAM=float`.

    Raises:
        Unavailable: the same for the rest of the process, since a failed build is not tried again. To warn is up to the caller.
    """
    result = _load(source, defines)
    if isinstance(result, Unavailable):
        raise Unavailable(result.cause, result.remedy)  # one raised twice would hold the frames of both
    return result


def threads_of(library: ctypes.CDLL) -> bool:
    """Whether it may use more than one thread: where its OpenMP is torch's, and their threads are the same ones.

    Both are asked where the same function lies. The files in the process tell less: scikit-learn brings a libgomp of its own,
    which neither uses.
    """
    try:
        libtorch = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD)  # the one that is there, wherever it came from
        ours, torchs = (ctypes.cast(x.GOMP_parallel, ctypes.c_void_p).value for x in (library, libtorch))
    except (OSError, AttributeError):  # torch is built otherwise, or one of them has no OpenMP of GCC's
        return False
    return ours == torchs


@functools.cache
def _load(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL | Unavailable:
    from adafactor_compiled import __version__  # which is not there yet when this file is imported

    if os.name == "nt":
        return Unavailable("C++ is not compiled on Windows", "use Linux or macOS")
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ())
    flags = [*FLAGS, *level, *(f"-D{x}" for x in defines)]
    try:
        code = source.read_bytes()
    except OSError as error:
        return Unavailable(f"{source} could not be read: {error.strerror}", _remedy(error, "install adafactor_compiled again"))
    key = _digest(repr((code, flags, __version__, sys.platform, platform.machine())).encode())
    try:
        compiler, version = _compiler()
        # Threads from GCC alone, whose runtime is torch's on Linux: others would bring a second one into the process.
        threads = sys.platform == "linux" and "Free Software Foundation" in version
        command = [*compiler, *flags, "-fopenmp" if threads else "-fopenmp-simd"]
        name = f"{key}-{_digest(repr((command, version)).encode())}"
        return _cached(name) or _build(command, code, name)
    except Unavailable as error:
        return _cached(key) or Unavailable(error.cause, error.remedy)  # another compiler's, if there is one


def _remedy(error: OSError, otherwise: str) -> str:
    return LIMIT if error.errno in LIMITED else otherwise


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _folders() -> Iterator[Path]:
    """Where libraries are kept, the best place first."""
    if named := os.environ.get("ADAFACTOR_COMPILED_CACHE_DIR"):
        yield Path(named)
    if os.path.isabs(caches := os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")):  # without a home it is not
        yield Path(caches, "adafactor_compiled")
    with suppress(OSError):
        yield Path(tempfile.gettempdir(), f"adafactor_compiled_{os.geteuid()}")


def _own(folder: Path) -> Path:
    """Where its links lead, if nobody else can put code there."""
    folder = Path(os.path.realpath(folder))
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "another user owns it or may write to it")
    return folder


def _cached(name: str) -> ctypes.CDLL | None:
    """A library whose name begins so."""
    for folder in _folders():
        with suppress(OSError):
            for file in sorted(_own(folder).glob(f"{name}-*.so")):
                with suppress(OSError):  # a disk may be mounted with noexec
                    if file.stem.endswith(_digest(file.read_bytes())):
                        return ctypes.CDLL(str(file))
                    file.unlink()  # to map half a library would end the process
    return None


def _build(command: Sequence[str], code: bytes, name: str) -> ctypes.CDLL:
    """Compile in the first folder that can be written and runs code, and publish there what has loaded."""
    refused: list[tuple[OSError, Path]] = []
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="building-", dir=_own(folder), ignore_cleanup_errors=True) as work:
                source, library = Path(work, "source.cpp"), Path(work, "library.so")
                source.write_bytes(code)
                _run([*command, str(source), "-o", str(library)], work)
                loaded = ctypes.CDLL(str(library))
                os.replace(library, Path(work).with_name(f"{name}-{_digest(library.read_bytes())}.so"))
                return loaded
        except OSError as error:
            refused.append((error, folder))
    causes = "; ".join(f"{error.strerror or error} ({folder})" for error, folder in refused)
    remedy = next((LIMIT for error, _ in refused if error.errno in LIMITED), CACHE)
    raise Unavailable(f"compiled code could not be written or loaded: {causes}", remedy)


@functools.cache
def _compiler() -> tuple[list[str], str]:
    """A command, and what it says of its version. Where CXX is empty there is none, as for torch.compile."""
    if (named := os.environ.get("CXX")) is None:
        command = [x for x in ("c++", "g++", "clang++") if shutil.which(x)][:1]
    else:
        try:
            command = shlex.split(named)
        except ValueError:  # a quote too many
            command = [named]
    if not command:
        raise Unavailable("no C++ compiler was found", COMPILER)
    if found := shutil.which(command[0]):
        command[0] = os.path.abspath(found)
    return command, _run([*command, "--version"])


def _run(command: Sequence[str], work: str | None = None) -> str:
    """What a compiler prints. Its own temporary files lie in `work`, and go with it."""
    environment = {"PATH": os.defpath, **os.environ, "LC_ALL": "C", **({"TMPDIR": work} if work else {})}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=work or os.sep,  # the working directory may be gone
            start_new_session=True,
        )
    except OSError as error:
        cause = f"the C++ compiler could not be started: {error.strerror} ({command[0]})"
        raise Unavailable(cause, _remedy(error, COMPILER)) from error
    with process:
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"the C++ compiler took more than {SECONDS} seconds ({command[0]})", COMPILER) from error
        finally:
            if process.returncode is None:  # too slow, or interrupted: what compiles is a child of what was started
                os.killpg(process.pid, signal.SIGKILL)
    printed = output.decode(errors="replace")
    if process.returncode == 0:
        return printed
    if work and (full := next((x for x in FULL if x in printed), None)):
        raise OSError(errno.ENOSPC, full)
    if work and (too_large := os.strerror(errno.EFBIG)) in printed:
        raise OSError(errno.EFBIG, too_large)
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or [f"status {process.returncode}"]
    raise Unavailable(f"the C++ compiler failed: {next((x for x in lines if 'error' in x.lower()), lines[0])}", COMPILER)
