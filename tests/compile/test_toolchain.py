"""Machines on which torch.compile cannot work: `compile=True` says why, `compile=None` goes without, and nothing is lost.

Each case is a process of its own with an empty cache, since a process that has compiled once needs no compiler.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from machines import Kind, Run, needs_a_shell, run

from adafactor_compiled._compile import toolchain
from adafactor_compiled._compile.toolchain import cause_of

FAILING = """
warnings.filterwarnings("error", ".*Adafactor")  # what raises does not warn as well
report = {}
optimizer = Adafactor(make(), compile=True)
errors = []
for attempt in (optimizer.step, optimizer.warm_up):
    try:
        attempt()
    except RuntimeError as error:
        errors.append([type(error).__name__, str(error)])
report["errors"] = errors
report["untouched"] = untouched(optimizer)

optimizer.param_groups[0]["compile"] = False
expected = Adafactor(make(), compile=False)
optimizer.step()
expected.step()
report["goes_on_without"] = same(params_of(optimizer), params_of(expected))

optimizer, expected = Adafactor(make(), fused=False), Adafactor(make(), compile=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer.step()
        expected.step()
report["warnings"] = [str(w.message) for w in caught if "Adafactor" in str(w.message)]
report["warned_from"] = [w.filename for w in caught if "Adafactor" in str(w.message)]
report["same"] = same(params_of(optimizer), params_of(expected))
report["close"] = all(torch.allclose(p, q, rtol=1e-5) for p, q in zip(params_of(optimizer), params_of(expected)))
report["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(json.dumps(report))
"""

BROKEN = """#!/bin/sh
[ "$1" = --version ] && echo "g++ 1.0" && exit 0
echo "In file included from here" >&2
printf 'fatal error: m\\351moire \\342\\200\\230x\\342\\200\\231\\n' >&2
exit 1
"""

NO_COMPILER, NO_CACHE = ("apt-get install g++", "CXX"), ("TORCHINDUCTOR_CACHE_DIR",)
NOT_WRITTEN = "torch's cache of compiled code could not be written: "

KINDS = {
    "no compiler": Kind("no C++ compiler was found", NO_COMPILER, cxx=""),
    "a useless compiler": Kind("no C++ compiler was found", NO_COMPILER, cxx="#!/bin/sh\nexit 1\n"),
    "a compiler that is not executable": Kind("the C++ compiler could not be started: ", NO_COMPILER, cxx=BROKEN, mode=0o644),
    "a failing compiler, in no encoding": Kind(
        "the C++ compiler failed: fatal error: m\ufffdmoire \u2018x\u2019", NO_COMPILER, cxx=BROKEN
    ),
    "a cache below a file": Kind(NOT_WRITTEN, NO_CACHE, before="os.environ['TORCHINDUCTOR_CACHE_DIR'] = __file__ + '/x'"),
    "a read-only cache": Kind(NOT_WRITTEN + "Read-only", NO_CACHE, disk=("size=8m", "mount -o remount,ro $disk")),
    "a full cache": Kind(NOT_WRITTEN + "No space left", NO_CACHE, disk=("size=4k", "true")),
    "a cache without inodes": Kind(NOT_WRITTEN + "No space left", NO_CACHE, disk=("nr_inodes=3", "true")),
    "a cache that runs no code": Kind(
        "compiled code could not be loaded from torch's cache: ", NO_CACHE, disk=("noexec", "true")
    ),
    "no sys.executable": Kind("`sys.executable` is None", ("`sys.executable`",), before="sys.executable = None", may_work=True),
    "a sys.executable that is not there": Kind(
        "`sys.executable` is '/nowhere/python'",
        ("`sys.executable`",),
        before="sys.executable = '/nowhere/python'",
        may_work=True,
    ),
    "a working directory that is gone": Kind(
        "the working directory has been deleted",
        ("`os.chdir`",),
        before="sys.path.insert(0, ''); import tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())",
        may_work=True,
    ),
    "no more open files": Kind(
        "a limit of the system was reached: Too many open files",
        ("`ulimit -a`",),
        before="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)",
    ),
    "python -O": Kind("Python runs with -O", ("run Python without -O",), flags=("-O",)),
    "a locale of ASCII": Kind(
        *("in the encoding of this locale: 'ascii' codec", ("PYTHONUTF8=1",)),
        environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        may_work=True,
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """All kinds, two at a time."""
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(run, kind, tmp_path_factory.mktemp("machine"), FAILING) for name, kind in KINDS.items()}
    pool.shutdown(cancel_futures=True)


@needs_a_shell
@pytest.mark.parametrize("name", KINDS)
def test_without_compilation(name: str, runs: dict[str, Future[Run]]) -> None:
    kind, ran = KINDS[name], runs[name].result()
    if kind.disk is not None and ran.code != 0 and not ran.printed and "Traceback" not in ran.complaints:
        pytest.skip(f"nothing can be mounted here: {ran.complaints.strip()[-200:]}")
    assert ran.code == 0, ran.complaints[-3000:]
    report: dict[str, Any] = json.loads(ran.printed.splitlines()[-1])

    if kind.may_work and not report["errors"]:
        assert not report["warnings"]
        assert report["close"]
        return
    assert [name for name, _ in report["errors"]] == ["RuntimeError"] * 2
    for _, message in report["errors"]:
        assert message.startswith("`compile=True` needs torch.compile to work but ")
        for part in (kind.cause, *kind.remedy):
            assert part in message
    assert report["untouched"]
    assert report["goes_on_without"]

    (warning,) = report["warnings"]
    for part in ("steps without torch.compile", kind.cause, *kind.remedy, "`compile=False`"):
        assert part in warning
    assert report["warned_from"] == [ran.script]
    assert report["same"]


DISABLED = {
    "TORCH_COMPILE_DISABLE": Kind("", (), cxx="", environment={"TORCH_COMPILE_DISABLE": "1"}),
    "TORCHDYNAMO_DISABLE": Kind("", (), cxx="", environment={"TORCHDYNAMO_DISABLE": "1"}),
    "set_stance": Kind("", (), cxx="", before="torch.compiler.set_stance('force_eager')"),
}


@pytest.mark.parametrize("name", DISABLED)
def test_switched_off(name: str, tmp_path: Path) -> None:
    """Whoever has switched torch.compile off need not be told so."""
    ran = run(DISABLED[name], tmp_path, FAILING)
    assert ran.code == 0, ran.complaints[-3000:]
    report = json.loads(ran.printed.splitlines()[-1])
    assert report["errors"] == report["warnings"] == []
    assert report["same"]
    assert report["graphs"] == 0


def test_switched_off_for_a_while(tmp_path: Path) -> None:
    """And on again: then the compiler is missed, and a step without it is warned of."""
    body = """
optimizer, expected, said = Adafactor(make(), fused=False), Adafactor(make(), compile=False), []
for stance in ("force_eager", "default"):
    with torch.compiler.set_stance(stance), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    expected.step()
    said.append([str(w.message) for w in caught if "Adafactor" in str(w.message)])
print(json.dumps([said, same(params_of(optimizer), params_of(expected))]))
"""
    ran = run(KINDS["no compiler"], tmp_path, body)
    assert ran.code == 0, ran.complaints[-3000:]
    (off, on), same = json.loads(ran.printed.splitlines()[-1])
    assert same
    assert off == []
    assert len(on) == 1


def test_a_checkpoint_brings_no_second_try(tmp_path: Path) -> None:
    """Nor a second warning."""
    body = """
optimizer = Adafactor(make(), fused=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
print(json.dumps([str(w.message) for w in caught if "Adafactor" in str(w.message)]))
"""
    ran = run(KINDS["no compiler"], tmp_path, body)
    assert ran.code == 0, ran.complaints[-3000:]
    assert len(json.loads(ran.printed.splitlines()[-1])) == 1


def test_a_torch_that_crashes_after_the_end_of_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_dies_with_threads", lambda: True)
    assert toolchain.reason_not_to_compile() is None  # this is the main thread
    with ThreadPoolExecutor(1) as pool:
        reason = pool.submit(toolchain.reason_not_to_compile).result()
    assert reason is not None
    assert "finds no GPU" in reason[0]
    assert "main thread" in reason[1]


# Errors that no machine makes at will -------------------------------------------------------------------------------------


def raised(error: BaseException, *causes: BaseException) -> BaseException:
    for x, cause in zip((error, *causes), causes, strict=False):
        x.__cause__ = cause
    return error


class CppCompileError(RuntimeError):
    """As torch calls it."""

    def __init__(self, output: str) -> None:
        super().__init__("C++ compile error\n\nCommand:\ng++ error.cpp")
        self.output = output


ERRORS = {
    **{
        name: (OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "/a/b"), NOT_WRITTEN, NO_CACHE)
        for name in ("EROFS", "EACCES", "EPERM", "ENOSPC", "EDQUOT", "ENOTDIR", "EEXIST")
        if hasattr(errno, name)
    },
    "a limit": (
        raised(RuntimeError("x"), OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
        "Too many open files",
        ("ulimit",),
    ),
    "a compiler at a limit": (CppCompileError(f"error: {os.strerror(errno.EFBIG)}"), "File too large", ("ulimit",)),
    "no memory": (raised(RuntimeError("x"), MemoryError("bad_alloc")), "Cannot allocate memory", ("ulimit",)),
    "further down": (raised(RuntimeError("x"), ValueError("y"), OSError(errno.ENOSPC, "full")), NOT_WRITTEN, NO_CACHE),
    "a compiler without room": (CppCompileError(f"error: {os.strerror(errno.ENOSPC)}"), NOT_WRITTEN, NO_CACHE),
    "code on a disk that runs none": (
        ImportError("x.so: failed to map segment from shared object"),
        "could not be loaded",
        NO_CACHE,
    ),
    "a compiler's first error": (CppCompileError("In file x\nerror: y\n"), "the C++ compiler failed: error: y", NO_COMPILER),
    "bytes": (subprocess.CalledProcessError(1, "g++", b"error: \xe9"), "the C++ compiler failed: error: \ufffd", NO_COMPILER),
    "an encoding": (UnicodeDecodeError("ascii", b"\xe9", 0, 1, "not in range"), "encoding of this locale", ("PYTHONUTF8=1",)),
    "another file that is missing": (FileNotFoundError(errno.ENOENT, "No such file"), "FileNotFoundError: ", ("VERBOSE",)),
    "anything": (raised(RuntimeError("x"), KeyError("val")), "a compilation failed: KeyError: 'val'", ("VERBOSE",)),
    "nothing said": (RuntimeError(), "a compilation failed: RuntimeError", ("VERBOSE",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_causes(name: str) -> None:
    error, expected, remedies = ERRORS[name]
    cause, remedy = cause_of(error)
    assert expected in cause
    assert "\n" not in cause
    assert all(part in remedy for part in remedies)
