"""Runs the cases that arguments name, `name:path`, and says of each that it begins and how it ended: a line of JSON each."""

from __future__ import annotations

import json
import sys
import traceback
import warnings

from adafactor_compiled._compile import calls
from safety import CASES


def main(jobs: list[str]) -> None:
    # Calls of less code: most of the time goes into it. Two members race if any number does, in what shares memory.
    calls.K = 2 if any(job.split(":")[0] in CASES["state"] | CASES["gradients"] for job in jobs) else 1
    warnings.filterwarnings("error", "Adafactor steps without")
    runs = {name: run for cases in CASES.values() for name, run in cases.items()}
    for job in jobs:
        name, path = job.split(":")
        print(json.dumps({"begins": job}), flush=True)
        try:
            runs[name](path)
        except Exception:
            print(json.dumps({"ended": traceback.format_exc()}), flush=True)
        else:
            print(json.dumps({"ended": ""}), flush=True)


main(sys.argv[1:])
