"""The library of C++: it is built once, found again, and where it cannot be had the cause is said and nothing is left behind.

Each test has folders of its own, and a module whose process has built nothing yet.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import pickle
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import adafactor_compiled
from adafactor_compiled._fused.cpu import build as original

GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(os.name == "nt" or GXX is None, reason="needs g++")

SOURCE = """
extern "C" int value() { return VALUE; }
extern "C" int is_nan(double x) { return x != x; }
extern "C" int threads(int most) {
  int count = 0;
  #pragma omp parallel num_threads(most) reduction(+ : count)
  count += 1;
  return count;
}
"""
SIX = ("VALUE=6",)
SECONDS = 300  # that a process may take, on however busy a machine


class Place(NamedTuple):
    """A machine of a test's own, with a compiler that writes down how it is called."""

    root: Path
    source: Path
    folders: tuple[Path, Path, Path]  # in the order in which they are tried
    log: Path
    fresh: Callable[[], Any]  # the module, as another process would see it

    def compiler(self, then: str = f'exec {GXX} "$@"', version: str = "", name: str = "cxx") -> str:
        """A script for CXX: what it does in a compilation, and whether it says its version or g++'s."""
        script = self.root / name
        says = f"echo {shlex.quote(version)}" if version else f"{GXX} --version"
        script.write_text(f'#!/bin/sh\ncase "$*" in *--version) {says}; exit;; esac\necho "$*" >> {self.log}\n{then}\n')
        script.chmod(0o755)
        return str(script)

    def compilations(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def files(self) -> list[Path]:
        return sorted(file for folder in self.folders for file in folder.rglob("*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    def fresh() -> Any:
        spec = importlib.util.spec_from_file_location("fresh_build", original.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    named, caches, temporary = (tmp_path / x for x in ("named", "caches", "temporary"))
    temporary.mkdir()
    source = tmp_path / "source.cpp"
    source.write_text(SOURCE)
    monkeypatch.setenv("ADAFACTOR_COMPILED_CACHE_DIR", str(named))
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folders = (named, caches / "adafactor_compiled", temporary / f"adafactor_compiled_{os.geteuid()}")
    result = Place(tmp_path, source, folders, tmp_path / "log", fresh)
    monkeypatch.setenv("CXX", result.compiler())
    return result


def in_folder(place: Place, k: int) -> None:
    """One library lies in that folder, and nothing else anywhere."""
    (file,) = [file for file in place.files() if not file.is_dir()]
    assert file.parent == place.folders[k]
    assert file.suffix == ".so"


# Built once ----------------------------------------------------------------------------------------------------------------


def test_built_once(place: Place) -> None:
    first = place.fresh()
    library = first.load(place.source, SIX)
    assert library.value() == 6
    assert library.is_nan(ctypes.c_double(float("nan"))) == 1
    assert first.load(place.source, SIX) is library
    assert place.fresh().load(place.source, SIX).value() == 6
    assert len(place.compilations()) == 1
    in_folder(place, 0)


def test_flags(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the level that torch reports, which other processors than x86's do not have."""
    without = 'for x do shift; case $x in -m*) ;; *) set -- "$@" "$x";; esac; done; ' + f'exec {GXX} "$@"'
    monkeypatch.setenv("CXX", place.compiler(without))
    expected = {"AVX512": {"-mavx512f", "-mprefer-vector-width=512"}, "AVX2": {"-mavx2", "-mfma"}, "DEFAULT": set()}
    for level, needed in {**expected, "SVE256": set[str]()}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        place.fresh().load(place.source, SIX)
        flags = set(place.compilations()[-1])
        assert {"-O3", "-ffp-contract=fast", "-DVALUE=6"} <= flags
        assert not flags & {"-ffast-math", "-fassociative-math", "-ffinite-math-only", "-march=native"}
        machine = {flag for flag in flags if flag.startswith("-m")}
        assert needed <= machine
        assert bool(needed) == bool(machine)
        assert level == "AVX512" or not any("512" in flag for flag in machine)
    assert len(place.compilations()) == 3  # the last has the flags of the one before it


CHANGES = {
    "source": lambda place, patch: place.source.write_text(SOURCE + "\n"),
    "package": lambda place, patch: patch.setattr(adafactor_compiled, "__version__", "0"),
    "machine": lambda place, patch: patch.setattr(platform, "machine", lambda: "m68k"),
    "compiler's path": lambda place, patch: patch.setenv("CXX", place.compiler(name="other")),
    "compiler's version": lambda place, patch: place.compiler(version="g++ 1 Free Software Foundation"),
    "compiler's arguments": lambda place, patch: patch.setenv("CXX", place.compiler() + " -g0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_built_anew(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.fresh().load(place.source, SIX)
    CHANGES[name](place, monkeypatch)
    for _ in range(2):
        assert place.fresh().load(place.source, SIX).value() == 6
    assert len(place.compilations()) == 2
    assert place.fresh().load(place.source, ("VALUE=7",)).value() == 7


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "of another name"])
def test_a_damaged_file_is_replaced(kind: str, place: Place) -> None:
    place.fresh().load(place.source, SIX)
    (file,) = place.files()
    whole = file.read_bytes()
    file.unlink()  # not in place: it is mapped into this process
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * len(whole), "of another name": whole}
    (file if kind != "of another name" else file.with_stem(file.stem[:-1] + "x")).write_bytes(contents[kind])
    assert place.fresh().load(place.source, SIX).value() == 6
    assert place.fresh().load(place.source, SIX).value() == 6
    assert len(place.compilations()) == 2
    in_folder(place, 0)


def test_a_file_that_does_not_load(place: Place) -> None:
    """As one of another processor, whole as it is."""
    build = place.fresh()
    build.load(place.source, SIX)
    (file,) = place.files()
    content = b"of another processor"
    file.unlink()
    file.with_name(f"{file.stem.rpartition('-')[0]}-{build._digest(content)}.so").write_bytes(content)
    assert place.fresh().load(place.source, SIX).value() == 6
    assert place.fresh().load(place.source, SIX).value() == 6
    assert len(place.compilations()) == 2


def test_two_threads(place: Place) -> None:
    build, both = place.fresh(), threading.Barrier(2)

    def load(_: int) -> int:
        both.wait()
        value: int = build.load(place.source, SIX).value()
        return value

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(load, range(2))) == [6, 6]
    in_folder(place, 0)


# Compilers -----------------------------------------------------------------------------------------------------------------

FAILS = (
    "echo 'In file included from here' >&2; printf 'fatal error: m\\351moire \\342\\200\\230x\\342\\200\\231\\n' >&2; exit 1"
)
COMPILERS = {
    "none on PATH": (None, "no C++ compiler was found"),
    "none named": ("", "no C++ compiler was found"),
    "missing": ("/nowhere/g++ -x", "the C++ compiler could not be started: No such file or directory (/nowhere/g++)"),
    "not executable": ("{source}", "the C++ compiler could not be started: Permission denied ({source})"),
    "no program": ("{text}", "the C++ compiler could not be started: Exec format error ({text})"),
    "half a quote": ("'g++", "the C++ compiler could not be started: No such file or directory ('g++)"),
    "fails, in no encoding": ("{fails}", "the C++ compiler failed: fatal error: m\ufffdmoire \u2018x\u2019"),
    "speaks the user's language": ("{speaks}", "the C++ compiler failed: error in C"),
    "fails without a word": ("{silent}", "the C++ compiler failed: status 3"),
    "not even a version": ("{useless}", "the C++ compiler failed: status 1"),
    "hangs": ("{hangs}", "the C++ compiler took more than 1 seconds ({hangs})"),
    "hangs before its version": ("{dozes}", "the C++ compiler took more than 1 seconds ({dozes})"),
}


def named(cxx: str | None, place: Place, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Put such a compiler in the place of the working one."""
    empty = place.root / "empty"
    empty.mkdir()
    patch.setenv("PATH", str(empty))
    names = {
        "fails": place.compiler(FAILS, name="fails"),
        "speaks": place.compiler("echo x; echo error in $LC_ALL; exit 1", name="speaks"),
        "silent": place.compiler("exit 3", name="silent"),
        "hangs": place.compiler("/bin/sleep 1000; true", name="hangs"),
        **{x: str(place.root / x) for x in ("source.cpp", "text", "useless", "dozes")},
    }
    names["source"] = names.pop("source.cpp")
    for x, text in (("text", "words"), ("useless", "#!/bin/sh\nexit 1\n"), ("dozes", "#!/bin/sh\n/bin/sleep 1000; true\n")):
        (place.root / x).write_text(text)
        (place.root / x).chmod(0o755)
    if cxx is None:
        patch.delenv("CXX")
    else:
        patch.setenv("CXX", cxx.format(**names))
    return names


@pytest.mark.parametrize("name", COMPILERS)
def test_no_compiler(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx, expected = COMPILERS[name]
    names = named(cxx, place, monkeypatch)
    build = place.fresh()
    build.SECONDS = 1
    errors = []
    for _ in range(2):
        with pytest.raises(build.Unavailable) as raised:
            build.load(place.source, SIX)
        errors.append(raised.value)
    first, second = errors
    assert first is not second
    assert str(first) == str(second) == f"{first.cause}; {first.remedy}"
    assert first.cause == expected.format(**names)
    assert "apt-get install g++" in first.remedy
    assert "CXX" in first.remedy
    assert len(place.compilations()) <= 1
    assert not [file for file in place.files() if file not in place.folders]


@pytest.mark.parametrize("name", COMPILERS)
def test_a_cache_needs_no_compiler(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.fresh().load(place.source, SIX)
    named(COMPILERS[name][0], place, monkeypatch)
    build = place.fresh()
    build.SECONDS = 1
    assert build.load(place.source, SIX).value() == 6
    with pytest.raises(build.Unavailable):
        build.load(place.source, ("VALUE=7",))


def test_found_on_path(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    for name in ("clang++", "g++", "c++"):  # the last is preferred
        monkeypatch.setenv("PATH", str(place.root), prepend=os.pathsep) if name == "clang++" else None
        place.compiler(name=name)
    build = place.fresh()
    assert build._compiler()[0] == [str(place.root / "c++")]
    assert build.load(place.source, SIX).value() == 6


def test_cxx_with_arguments(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{shlex.quote(place.compiler(name='a compiler'))} -DVALUE='3 + 4'")
    assert place.fresh().load(place.source, ()).value() == 7


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_runs_on(interrupted: bool, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a compiler that is too slow, nor what it has started, nor its files."""
    child, where = place.root / "child", place.root / "where"
    then = f"pwd > {where}; echo $TMPDIR >> {where}; sleep 1000 & echo $! > {child}.new; mv {child}.new {child}; wait"
    monkeypatch.setenv("CXX", place.compiler(then))
    build = place.fresh()
    build._compiler()
    build.SECONDS = 1
    if interrupted:

        def interrupt(*args: object, **kwargs: object) -> None:
            while not child.exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt if interrupted else build.Unavailable):
        build.load(place.source, SIX)
    process, until = int(child.read_text()), time.monotonic() + SECONDS
    while not is_gone(process) and time.monotonic() < until:
        time.sleep(0.01)
    assert is_gone(process)
    assert {Path(line).parent for line in where.read_text().splitlines()} == {
        place.folders[0]
    }  # where it leaves what it leaves
    assert place.files() == [place.folders[0]] or place.files() == []
    if interrupted:  # which is no failure
        monkeypatch.undo()
        monkeypatch.setenv("ADAFACTOR_COMPILED_CACHE_DIR", str(place.folders[0]))
        build._compiler.cache_clear()
        assert build.load(place.source, SIX).value() == 6


# Folders -------------------------------------------------------------------------------------------------------------------


def below_a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


def of_another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    os.chown(folder, 12345, -1)


def of_a_group(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def nowhere(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(folder.parent / "missing")


def to_another_user(folder: Path) -> None:
    of_another_user(folder.with_name("theirs"))
    folder.symlink_to("theirs")


BAD = {f.__name__: f for f in (below_a_file, of_another_user, of_a_group, nowhere, to_another_user)}


@pytest.mark.parametrize("name", BAD)
def test_folders_that_are_passed_over(name: str, place: Place) -> None:
    if "another" in name and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    for k, folder in enumerate(place.folders):
        build = place.fresh()
        assert build.load(place.source, SIX).value() == 6
        assert len(place.compilations()) == k + 1
        shutil.rmtree(folder)
        BAD[name](folder)
    build = place.fresh()
    with pytest.raises(build.Unavailable) as raised:
        build.load(place.source, SIX)
    assert "ADAFACTOR_COMPILED_CACHE_DIR" in raised.value.remedy
    assert raised.value.cause.startswith("compiled code could not be written or loaded: ")
    for folder in place.folders:
        assert f"({folder})" in raised.value.cause


def test_no_code_is_taken_from_others(place: Place) -> None:
    """A library that lies where others can write."""
    place.fresh().load(place.source, SIX)
    place.folders[0].chmod(0o777)
    place.fresh().load(place.source, SIX)
    assert len(place.compilations()) == 2
    assert len(list(place.folders[1].iterdir())) == 1


def test_any_umask(place: Place) -> None:
    """What the library makes itself is not passed over."""
    before = os.umask(0)
    try:
        place.fresh().load(place.source, SIX)
    finally:
        os.umask(before)
    place.fresh().load(place.source, SIX)
    in_folder(place, 0)
    assert len(place.compilations()) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root has files of root")
def test_a_folder_of_root(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which an administrator has filled for all."""
    place.fresh().load(place.source, SIX)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert place.fresh().load(place.source, SIX).value() == 6
    assert len(place.compilations()) == 1


def test_a_link_to_a_folder(place: Place) -> None:
    elsewhere = place.root / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.folders[0].symlink_to(elsewhere)
    place.fresh().load(place.source, SIX)
    assert place.fresh().load(place.source, SIX).value() == 6
    assert len(list(elsewhere.iterdir())) == len(place.compilations()) == 1


def test_relative_paths(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("CXX", "./cxx")
    monkeypatch.setenv("ADAFACTOR_COMPILED_CACHE_DIR", "named")
    for _ in range(2):
        assert place.fresh().load(place.source, SIX).value() == 6
    assert len(place.compilations()) == 1
    in_folder(place, 0)


def test_a_compiler_without_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not get the blame."""
    monkeypatch.setenv("CXX", place.compiler("echo 'ld: final link failed: No space left on device'; exit 1"))
    build = place.fresh()
    with pytest.raises(build.Unavailable, match="written or loaded: No space left on device") as raised:
        build.load(place.source, SIX)
    assert "ADAFACTOR_COMPILED_CACHE_DIR" in raised.value.remedy
    assert len(place.compilations()) == 3
    assert not [file for file in place.files() if file not in place.folders]


def test_no_source(place: Place) -> None:
    build = place.fresh()
    with pytest.raises(build.Unavailable, match=r"x\.cpp could not be read: No such file or directory; install"):
        build.load(place.root / "x.cpp", SIX)


def test_windows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    build = place.fresh()
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(build.Unavailable, match="Windows"):
        build.load(place.source, SIX)
    monkeypatch.undo()  # paths are made by it


def test_the_error_can_be_sent() -> None:
    error = pickle.loads(pickle.dumps(original.Unavailable("a", "b")))
    assert (error.cause, error.remedy, str(error)) == ("a", "b", "a; b")


# Processes -----------------------------------------------------------------------------------------------------------------


BEGIN = """
import json
import os
import sys
from pathlib import Path

from adafactor_compiled._fused.cpu import build

source = Path(sys.argv[1])
"""


def start(place: Place, body: str, *before: str, flags: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[bytes]:
    script = place.root / f"script{len(list(place.root.glob('script*')))}.py"
    script.write_text(BEGIN + body)
    everything = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": tempfile.gettempdir(), **environment}
    command = [*before, sys.executable, *flags, str(script), str(place.source)]
    return subprocess.Popen(command, env=everything, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result_of(process: subprocess.Popen[bytes]) -> Any:
    printed, complaints = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, complaints.decode(errors="replace")[-3000:]
    return json.loads(printed.splitlines()[-1])


def test_two_processes(place: Place) -> None:
    body = "print(json.dumps(build.load(source, ('VALUE=6',)).value()))"
    both = [start(place, body) for _ in range(2)]
    assert [result_of(process) for process in both] == [6, 6]
    in_folder(place, 0)


def test_an_odd_process(place: Place) -> None:
    """With -O and ASCII, without a home, a working directory, `sys.stderr` and `sys.executable`; in a thread, and in a fork."""
    body = """
import shutil, threading
gone = source.parent / "gone"
gone.mkdir()
os.chdir(gone)
gone.rmdir()
os.environ.pop("HOME", None)
os.environ.pop("XDG_CACHE_HOME", None)
sys.stderr = sys.executable = None
values = []
thread = threading.Thread(target=lambda: values.append(build.load(source, ("VALUE=6",)).value()))
thread.start()
thread.join()
child = os.fork()
if child == 0:
    same, other = build.load(source, ("VALUE=6",)).value(), build.load(source, ("VALUE=7",)).value()
    os._exit(10 * same + other)
values.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps([__debug__, values, len(os.listdir(os.environ["ADAFACTOR_COMPILED_CACHE_DIR"]))]))
"""
    odd = place.root / "m\u00e9moire"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "ADAFACTOR_COMPILED_CACHE_DIR": str(odd)}
    assert result_of(start(place, body, flags=("-O",), **environment)) == [False, [6, 67], 2]


def test_without_a_home(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAFACTOR_COMPILED_CACHE_DIR")
    for caches in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert list(place.fresh()._folders()) == [place.folders[2]]
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(place.root))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert place.root / ".cache" / "adafactor_compiled" in place.fresh()._folders()


MOUNTS = """
root=$1
shift
mount_on() { mkdir "$root/$1" && mount -t tmpfs -o "$2" none "$root/$1" && mkdir -m 700 "$root/$1/cache"; }
mount_on readonly size=8m && mount -o remount,ro "$root/readonly" && mount_on full size=4k && mount_on inodes nr_inodes=3 &&
mount_on noexec noexec && mount_on small size=16k && mount_on warm size=8m || exit 77
exec "$@"
"""


def test_disks(place: Place) -> None:
    """Those that cannot be written, or run no code, are passed over; one that cannot be written serves what it has."""
    body = """
import importlib, subprocess, tempfile

def load(*names, value):
    importlib.reload(build)
    keys = ("ADAFACTOR_COMPILED_CACHE_DIR", "XDG_CACHE_HOME")
    for key, name in zip(keys, names):
        os.environ[key] = str(source.parent / name / "cache")
    try:
        return build.load(source, (f"VALUE={value}",)).value()
    except build.Unavailable as error:
        return [error.cause, error.remedy]

def files(name):
    return [x.suffix for x in sorted((source.parent / name / "cache").rglob("*"))]

report = {}
for name in ("readonly", "full", "inodes", "noexec", "small"):
    results = [load(name, "good", value=6), load(name, "good", value=6), len(files(name)), files("good")]
    subprocess.run(["rm", "-r", str(source.parent / "good")], check=True)
    tempfile.tempdir = str(source.parent / name)
    report[name] = [*results, load(name, name, value=7)]
tempfile.tempdir = None
load("warm", "good", value=8)
subprocess.run(["mount", "-o", "remount,ro", str(source.parent / "warm")], check=True)
os.environ["CXX"] = ""
report["warm"] = [load("warm", "good", value=8), files("warm")]
print(json.dumps(report))
"""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    process = start(place, body, "unshare", "-rm", "sh", "-c", MOUNTS, "sh", str(place.root), CXX=str(GXX))
    printed, complaints = process.communicate(timeout=SECONDS)
    if process.returncode != 0 and b"Traceback" not in complaints:
        pytest.skip(f"nothing can be mounted here: {complaints.decode(errors='replace').strip()[-200:]}")
    assert process.returncode == 0, complaints.decode(errors="replace")[-3000:]
    report = json.loads(printed.splitlines()[-1])
    causes = {"readonly": "Read-only", "full": "No space", "inodes": "No space", "noexec": "failed to map", "small": "No space"}
    for name, cause in causes.items():
        first, second, left, good, (said, remedy) = report[name]
        assert (first, second, left, good) == (6, 6, 0, ["", ".so"]), name
        assert cause in said
        assert "ADAFACTOR_COMPILED_CACHE_DIR" in remedy
    assert report["warm"] == [8, [".so"]]


# Threads -------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="threads are Linux's")
def test_threads_are_those_of_torch(place: Place) -> None:
    """Also where another package has brought an OpenMP of its own: the library's is torch's none the less."""
    body = """
import ctypes, shutil

def runtimes():
    return sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})

before = runtimes()
library = build.load(source, ("VALUE=6",))
report = [before, runtimes(), build.threads_of(library), library.threads(2)]
if before:
    shutil.copy(before[0], source.parent / "libgomp-other.so")
    other = ctypes.CDLL(str(source.parent / "libgomp-other.so"))
    library = build.load(source, ("VALUE=7",))
    report += [len(runtimes()), build.threads_of(other), build.threads_of(library)]
print(json.dumps(report))
"""
    before, after, allowed, threads, *others = result_of(start(place, body, OMP_NUM_THREADS="2"))
    assert threads == 2
    if len(before) != 1:
        pytest.skip("this torch has no libgomp")
    assert allowed == (after == before)
    assert others == [len(after) + 1, False, allowed]


def test_clang_has_one_thread(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", place.compiler(version="clang version 19.1.7"))
    build = place.fresh()
    library = build.load(place.source, SIX)
    assert "-fopenmp-simd" in place.compilations()[-1]
    assert "-fopenmp" not in place.compilations()[-1]
    assert library.threads(2) == 1
    assert not build.threads_of(library)
