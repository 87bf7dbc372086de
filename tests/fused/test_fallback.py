"""Where fused kernels cannot be compiled: one warning or one error that names cause and remedy, then the next path."""

from __future__ import annotations

import json
import linecache
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compilers import compiled_by, uncompiled
from machines import Kind, needs_a_shell, run

from adafactor_compiled import Adafactor
from adafactor_compiled._fused import launches
from adafactor_compiled._fused.cpu import build
from adafactor_compiled._fused.cpu import launches as cpu
from adafactor_compiled.step_in_backward import StepInBackward


@pytest.fixture
def unavailable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    tries: list[int] = []

    def load(source: Path, defines: tuple[str, ...] = ()) -> Any:
        tries.append(1)
        raise build.Unavailable("no C++ compiler was found", build.COMPILER)

    monkeypatch.setattr(build, "load", load)
    monkeypatch.setattr(launches, "_ready", {})
    cpu.library_of.cache_clear()
    yield tries
    cpu.library_of.cache_clear()


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(7,), (6, 8), ()]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def test_insisting_raises_and_nothing_has_changed(unavailable: list[int]) -> None:
    optimizer = Adafactor(parameters(), fused=True)
    for attempt in (optimizer.step, optimizer.warm_up):
        with pytest.raises(
            RuntimeError, match=r"^`fused=True` needs kernels to be compiled but no C\+\+ compiler .*apt-get install"
        ):
            attempt()
    for p, q in zip(optimizer.param_groups[0]["params"], parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p]["step"] == 0
    optimizer.param_groups[0]["fused"] = None
    optimizer.param_groups[0]["compile"] = False
    optimizer.step()


BEGINNINGS: dict[str, Callable[[Adafactor], object]] = {
    "step": lambda x: x.step(),
    "warm_up": lambda x: x.warm_up(),
    "step_parameter": lambda x: x.step_parameter(x.param_groups[0]["params"][0], x.param_groups[0], 0),
    "StepInBackward": lambda x: StepInBackward(x),
}


@pytest.mark.usefixtures("unavailable")
@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_warning_points_to_the_line_of_the_user(name: str) -> None:
    with compiled_by(uncompiled), pytest.warns(UserWarning, match="steps without its fused kernels") as caught:
        BEGINNINGS[name](Adafactor(parameters()))
    (said,) = caught
    assert said.filename == __file__
    assert f'"{name}": lambda' in linecache.getline(__file__, said.lineno)


def test_one_warning_and_the_compiled_path(unavailable: list[int]) -> None:
    optimizer, expected = Adafactor(parameters()), Adafactor(parameters(), foreach=False)
    with compiled_by(uncompiled), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
            expected.step()
            optimizer.load_state_dict(optimizer.state_dict())
    (said,) = [x for x in caught if "Adafactor" in str(x.message)]
    for part in ("steps without its fused kernels, since no C++ compiler was found", "apt-get install g++", "`compile=False`"):
        assert part in str(said.message)
    assert said.filename == __file__
    assert [line.path for line in optimizer.summary().classes] == ["compiled", "compiled", "multi_tensor"]
    assert len(unavailable) == 1
    for p, q in zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)


BODY = """
optimizer, expected = Adafactor(make()), Adafactor(make(), compile=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer.step()
        expected.step()
said = [str(w.message) for w in caught if "Adafactor" in str(w.message)]
try:
    Adafactor(make(), fused=True).step()
    error = ""
except RuntimeError as x:
    error = str(x)
print(json.dumps([said, error, same(params_of(optimizer), params_of(expected))]))
"""


@needs_a_shell
def test_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """Nothing can be compiled by anyone: a warning once, not one a path, and the multi-tensor path."""
    kind = Kind("", (), cxx="", environment={"ADAFACTOR_COMPILED_CACHE_DIR": str(tmp_path / "ours"), "HOME": str(tmp_path)})
    kind.environment["XDG_CACHE_HOME"] = kind.environment["TMPDIR"] = str(tmp_path)
    ran = run(kind, tmp_path, BODY)
    assert ran.code == 0, ran.complaints[-3000:]
    said, error, same = json.loads(ran.printed.splitlines()[-1])
    assert len(said) == 1
    assert "steps without its fused kernels, since the C++ compiler could not be started" in said[0]
    assert error.startswith("`fused=True` needs kernels to be compiled but the C++ compiler could not be started")
    assert same


@needs_a_shell
@pytest.mark.parametrize("flags", [("-O",), ()], ids=str)
def test_python_without_assertions_or_standard_error(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Kernels of our own work where torch.compile does not, and where there is nobody to talk to."""
    body = "sys.stderr = None\n" + BODY
    ran = run(Kind("", (), flags=flags), tmp_path, body)
    assert ran.code == 0, ran.complaints[-3000:]
    said, error, _ = json.loads(ran.printed.splitlines()[-1])
    assert (said, error) == ([], "")


# What goes between import and first step; and the cause that is named, if kernels cannot be compiled then.
GONE = {
    "the working directory": ("import tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())", ""),
    "TMPDIR": ("os.rmdir(os.environ['TMPDIR'])", ""),
    "HOME": ("os.rmdir(os.environ['HOME'])", ""),
    "both": ("os.rmdir(os.environ['TMPDIR']); os.rmdir(os.environ['HOME'])", ""),
    "PATH": ("del os.environ['PATH']", ""),
    "the environment": ("os.environ.clear()", ""),
    "open files": (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)",
        "Too many open files",
    ),
    "room in a file": (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
        "compiled code could not be written or loaded: File too large",
    ),
}


@needs_a_shell
@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_before_the_first_step(name: str, tmp_path: Path) -> None:
    before, cause = GONE[name]
    environment = {x: str(tmp_path / x) for x in ("TMPDIR", "HOME")}
    for folder in environment.values():
        Path(folder).mkdir()
    nowhere = {"ADAFACTOR_COMPILED_CACHE_DIR": "", "XDG_CACHE_HOME": ""}
    ran = run(Kind("", (), before=f"{before}\n", environment={**environment, **nowhere}), tmp_path, BODY)
    assert ran.code == 0, ran.complaints[-3000:]
    said, error, same = json.loads(ran.printed.splitlines()[-1])
    if not cause:
        assert (said, error) == ([], "")
        return
    assert same
    assert len(said) == 1
    for message in (*said, error):
        assert cause in message
        assert "`ulimit -a`" in message
        assert "install" not in message


FLAGS = {
    "fused and foreach": ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
    "fused and compile": ({"fused": True, "compile": True}, "`fused` and `compile` cannot be `True` together"),
    "fused, nothing compiled": ({"fused": True, "compile": False}, "`compile=False` for nothing to be compiled"),
    "fused, one by one": ({"fused": True, "foreach": False}, "`foreach=False` for the reference path"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_ask_for_two_paths(name: str) -> None:
    flags, message = FLAGS[name]
    with pytest.raises(RuntimeError, match=message):
        Adafactor([torch.ones(1)], **flags)


PATHS_OF_FLAGS = [
    ({}, "fused"),
    ({"fused": True}, "fused"),
    ({"compile": True}, "compiled"),
    ({"foreach": True, "compile": True}, "compiled"),
    ({"fused": False, "compile": False}, "multi_tensor"),
    ({"compile": False}, "multi_tensor"),
    ({"foreach": True, "compile": False}, "multi_tensor"),
    ({"foreach": False}, "reference"),
    ({"fused": False}, "compiled"),
    ({"foreach": True}, "compiled"),
]


@pytest.mark.parametrize(("flags", "path"), PATHS_OF_FLAGS, ids=str)
def test_the_path_of_flags(flags: dict[str, bool], path: str) -> None:
    assert Adafactor([torch.ones(6, 8, requires_grad=True)], **flags).summary().classes[0].path == path
