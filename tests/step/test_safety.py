"""Whatever happens to parameters, gradients and state, a step gives what the reference gives, or an error and no change.

The cases, in safety_cases.py, run in processes of their own, a few processes for all: one that dies is a failure of the case
that it was at, and another one goes on behind it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safety_cases

SECONDS = 600  # that a process may take, on however busy a machine
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "PASSIVE"}
JOBS = [
    (process, f"{name}:{path}")
    for process in safety_cases.CASES
    for name in safety_cases.CASES[process]
    for path in safety_cases.PATHS
]


@functools.cache
def outcomes(process: str) -> dict[str, str]:
    """How each job of a process ended: "", or what went wrong."""
    left, ended = [job for of, job in JOBS if of == process], {}
    while left:
        command = [sys.executable, "-X", "faulthandler", safety_cases.__file__, *left]
        with subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as worker:
            try:
                printed, complaints = worker.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                printed, complaints = worker.communicate()
        current = left[0]
        for line in printed.splitlines():
            told = json.loads(line) if line.startswith("{") else {}
            current = told.get("begins", current)
            if "ended" in told:
                ended[current] = told["ended"] and f"{told['ended']}\n{complaints[-2000:]}"
        if left[-1] in ended and worker.returncode == 0:
            break
        last = current if current not in ended else left[-1]
        ended[last] = f"the process ended with {worker.returncode}:\n{complaints[-4000:]}"
        left = left[left.index(last) + 1 :]
    return ended


@pytest.mark.parametrize(("process", "job"), JOBS, ids=[job for _, job in JOBS])
def test_step(process: str, job: str) -> None:
    if process == "fork" and not hasattr(os, "fork"):
        pytest.skip("nothing forks here")
    outcome = outcomes(process)[job]
    assert not outcome, outcome


OPTIMIZED = """
import json
import warnings

import torch

from adafactor_compiled import Adafactor

report = {"optimized": not __debug__}
for name, options in [("False", {"compile": False}), ("None", {}), ("True", {"compile": True})]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(6, 8), (6,)]]
    optimizer, error = Adafactor(params, **options), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            try:
                optimizer.step()
            except RuntimeError as raised:
                error = str(raised)
    said = [str(x.message) for x in caught if "Adafactor" in str(x.message)]
    steps = [state["step"] for state in optimizer.state.values()]
    report[name] = {"params": [p.tolist() for p in params], "said": said, "error": error, "steps": steps}
generator = torch.Generator().manual_seed(0)
report["untouched"] = [torch.randn(shape, generator=generator).tolist() for shape in [(6, 8), (6,)]]
print(json.dumps(report))
"""


def test_python_without_assertions(tmp_path: Path) -> None:
    """Under `python -O`, torch.compile makes wrong code."""
    script = tmp_path / "script.py"
    script.write_text(OPTIMIZED)
    ran = subprocess.run(
        [sys.executable, "-O", str(script)], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=SECONDS
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["optimized"]
    assert report["None"]["params"] == report["False"]["params"] != report["untouched"]
    assert [report[name]["error"] for name in ("False", "None")] == ["", ""]
    assert report["False"]["said"] == report["True"]["said"] == []
    (said,) = report["None"]["said"]
    assert "Python runs with -O" in said
    assert report["True"]["error"].startswith("`compile=True` needs torch.compile to work but Python runs with -O")
    assert report["True"]["params"] == report["untouched"]
    assert report["True"]["steps"] == [0, 0]
