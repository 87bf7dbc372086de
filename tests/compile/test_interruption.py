"""Ctrl-C in a first step, while the C++ compiler runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from machines import SECONDS, Kind, needs_a_shell, prepare

SLEEPING = """#!/bin/sh
[ "$1" = --version ] && echo "g++ 1.0" && exit 0
echo > "$0.begun"
exec sleep 600
"""

INTERRUPTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored, and so it is here
optimizer = Adafactor(make(), **OPTIONS)
try:
    optimizer.step()
except KeyboardInterrupt:
    interrupted = True
else:
    interrupted = False
report = {"interrupted": interrupted, "untouched": untouched(optimizer)}
optimizer.param_groups[0]["compile"] = False
expected = Adafactor(make(), compile=False)
optimizer.step()
expected.step()
report["goes_on"] = same(params_of(optimizer), params_of(expected))
print(json.dumps(report), flush=True)
"""


@needs_a_shell
@pytest.mark.parametrize(("whom", "options"), [("all processes", "{}"), ("Python alone", "{'compile': True}")])
def test_interrupted_first_step(whom: str, options: str, tmp_path: Path) -> None:
    """The compiler would take minutes more. A terminal sends Ctrl-C to all processes in front."""
    begun = tmp_path / "g++.begun"
    command, environment = prepare(Kind("", (), cxx=SLEEPING), tmp_path, INTERRUPTED.replace("OPTIONS", options))
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            until = time.monotonic() + SECONDS
            while not begun.exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.2)  # the compiler is asleep now
            (os.killpg if whom == "all processes" else os.kill)(process.pid, signal.SIGINT)
            printed, complaints = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, complaints[-3000:]
    assert json.loads(printed.splitlines()[-1]) == {"interrupted": True, "untouched": True, "goes_on": True}
