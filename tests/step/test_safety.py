"""Whatever happens to parameters, gradients and state, a step gives what the reference gives, or an error and no change.

The cases, in the folder safety, run in processes of their own, a few processes for all: one that dies is a failure of the case
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
from paths import PATHS
from safety import CASES

SECONDS = 600  # that a process may take, on however busy a machine
JOBS = [(process, f"{name}:{path}") for process in CASES for name in CASES[process] for path in PATHS]


@functools.cache
def outcomes(process: str) -> dict[str, str]:
    """How each job of a process ended: "", or what went wrong."""
    left, ended = [job for of, job in JOBS if of == process], {}
    while left:
        command = [sys.executable, "-X", "faulthandler", "-m", "safety", *left]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            command, cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
