"""Machines without a working C++ compiler: `compile=True` says so, `compile=None` goes without, and nothing is lost.

Each case is a process of its own with an empty cache, since a process that has compiled once needs no compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json
import warnings

import torch

from adafactor_compiled import Adafactor


def make():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(6, 8), (7,), ()]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def same(first, second):
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


report = {}
params, untouched = make(), make()
optimizer = Adafactor(params, compile=True)
attempts = []
for attempt in (optimizer.step, optimizer.step, optimizer.warm_up):
    try:
        attempt()
    except RuntimeError as error:
        attempts.append([type(error).__name__, str(error)])
report["errors"] = attempts
report["params_untouched"] = same(params, untouched)
states = [optimizer.state[p] for p in params]
report["state_untouched"] = not any(torch.as_tensor(value).any() for state in states for value in state.values())

optimizer.param_groups[0]["compile"] = False
expected = Adafactor(untouched, compile=False)
optimizer.step()
expected.step()
report["goes_on_without"] = same(params, untouched)

params, untouched = make(), make()
optimizer, expected = Adafactor(params), Adafactor(untouched, compile=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer.step()
        expected.step()
report["warnings"] = [str(w.message) for w in caught if "Adafactor" in str(w.message)]
report["warned_from"] = [w.filename for w in caught if "Adafactor" in str(w.message)]
report["same_results"] = same(params, untouched)
print(json.dumps(report))
"""

BROKEN = """#!/bin/sh
[ "$1" = --version ] && echo "g++ 1.0" && exit 0
echo "fatal error: no space left" >&2
exit 1
"""


def compiler(kind: str, directory: Path) -> tuple[Path, str]:
    """A C++ compiler that does not work, and what should be said of it."""
    path = directory / "g++"
    if kind == "absent":
        return path, "no C++ compiler was found"
    path.write_text(BROKEN if kind == "broken" else "#!/bin/sh\nexit 1\n")
    path.chmod(0o644 if kind == "not executable" else 0o755)
    return path, {"broken": "the C++ compiler failed: ", "useless": "no C++ compiler was found"}.get(kind, "C++ compiler")


KINDS = ["absent", "useless", "broken", "not executable"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path, str]]]:
    """For each kind a process that runs the script, which all begin at once; the script; and what should be said."""
    with ExitStack() as running:
        started = {}
        for kind in KINDS:
            directory = tmp_path_factory.mktemp("compiler")
            cxx, said = compiler(kind, directory)
            script = directory / "script.py"
            script.write_text(SCRIPT)
            environment = {
                **os.environ,
                "CXX": str(cxx),
                "TORCHINDUCTOR_CACHE_DIR": str(directory / "cache"),
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            process = subprocess.Popen(
                [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            running.enter_context(process)
            running.callback(process.kill)
            started[kind] = process, script, said
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_working_compiler(kind: str, processes: dict[str, tuple[subprocess.Popen[str], Path, str]]) -> None:
    process, script, said = processes[kind]
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints[-2000:]
    report: dict[str, Any] = json.loads(printed.splitlines()[-1])

    assert [name for name, _ in report["errors"]] == ["RuntimeError"] * 3
    for _, message in report["errors"]:
        assert message.startswith("`compile=True` needs a working C++ toolchain but ")
        for part in (said, "apt-get install g++", "CXX", "`compile=False`"):
            assert part in message
    assert report["params_untouched"]
    assert report["state_untouched"]
    assert report["goes_on_without"]

    (warning,) = report["warnings"]
    for part in ("steps without torch.compile", said, "apt-get install g++", "`compile=False`"):
        assert part in warning
    assert report["warned_from"] == [str(script)]
    assert report["same_results"]
