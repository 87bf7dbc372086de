"""Compiles what the tests will ask for, in a process beside them: half of a run with an empty cache is compiling, on one core.

A test that comes first compiles for itself, and both go on with what the other has left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within it the process runs; on one core there is none."""
    if os.cpu_count() == 1:
        yield
        return
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    silent = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, __file__], stdout=silent, stderr=silent, env=environment)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    from test_paths import BFLOAT16, CHUNK_NUMEL, FIXED, FLOAT16, FLOAT32, FLOAT64, MOMENTUM, PLAIN, problem_of

    from adafactor_compiled import Adafactor, _depth_first

    rounded = {"stochastic_rounding": True, **PLAIN}
    # What other files than test_paths.py step, most of it with momentum or stochastic rounding.
    more = [
        problem_of((2, 3, 3, 4)),
        *(problem_of((24, 40), (17,), (70_000,), dtype=dtype, **MOMENTUM) for dtype in (FLOAT32, FLOAT64)),
        problem_of((17,), (70_000,), dtype=FLOAT64),
        problem_of((24, 40), (17,), (2, 3, 4), (8, 4, 3, 3), (260, 520), dtype=BFLOAT16, **rounded),
        problem_of((24, 40), (17,), dtype=FLOAT16, **MOMENTUM),
        problem_of((17,), (260, 520), dtype=FLOAT16, stochastic_rounding=True, **MOMENTUM),
        problem_of((4101, 1030), dtype=BFLOAT16, **rounded),
    ]
    _depth_first.CHUNK_NUMEL = CHUNK_NUMEL
    for problem in [*FIXED.values(), *more]:
        Adafactor(problem.param_groups(), compile=True).warm_up()


if __name__ == "__main__":
    main()
