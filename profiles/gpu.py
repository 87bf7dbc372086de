"""Everything that only a GPU can show, in one run of six minutes: does it work, is it right, how fast is it.

The parts, each in a process of its own, so that what fails or hangs takes no other with it:

sanity       one small step of every path, and its error against float64 on the CPU
tests        pytest -m cuda
steps        milliseconds of a step on the device and on the host, for each network, beside its peers; peak memory
first_steps  seconds of a first step with an empty cache, for each network
syncs        twenty steps of every path under torch.cuda.set_sync_debug_mode("error")
training     a whole training step of a small transformer, eager and compiled, with each optimizer

What matters most comes first. Parts that time nothing run side by side. Everything is written whenever there is more of it,
so that a run that is cut off leaves what it has; `--redraw` then prints its tables. Nothing is downloaded, and matplotlib may
be missing. Where the package is not installed, PYTHONPATH=. finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _card import checks, steps
from _card.jobs import Job, run_at_once
from _card.report import draw, table
from _shared import parser, run_profile

DEFAULT = ["gpt2", "decoder-600m", "t5-small", "lora-8b", "resnet50", "gpt2-beta1", "gpt2-sharded", "decoder-600m-sharded"]
SECONDS = {"sanity": 60, "tests": 100, "first_steps": 60, "steps": 60, "syncs": 60, "training": 90}


def card() -> dict[str, Any]:
    """What the numbers depend on beyond what every profile records."""
    result: dict[str, Any] = {"cuda": torch.version.cuda, "driver": None}
    for name in ("triton", "transformers", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        result["name"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            result["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return result


def stages_of(options: argparse.Namespace) -> list[list[Job]]:
    """What runs one after the other; the jobs of one stage run side by side, and those that are timed run alone."""
    # What is tried out on a CPU, or is short anyway, may take as long as it takes.
    patient = options.quick or options.device == "cpu"
    seconds = dict.fromkeys(SECONDS, 60 * options.minutes) if patient else SECONDS
    quick, device, rounds = options.quick, options.device, options.rounds

    def job(part: Any, cache: str = "checks", **more: Any) -> Job:
        return Job(part, seconds[part.__name__], more, cache)

    def training(rounds: int) -> Job:
        return job(steps.training, "training", device=device, quick=quick, rounds=rounds)

    beside = [job(checks.tests), *(job(steps.first_steps, of, network=of, device=device) for of in options.networks)]
    if not patient:  # compiled in the company of others, and measured alone at the end
        beside.append(training(0))
    timed = [[job(steps.steps, of, network=of, device=device, rounds=rounds)] for of in options.networks]
    stages = [[job(checks.sanity, device=device)], beside, *timed, [job(checks.syncs, device=device)], [training(rounds)]]
    return [chosen for stage in stages if (chosen := [job for job in stage if job.part.__name__ in options.parts])]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    start = time.monotonic()
    deadline = start + 60 * options.minutes - 5  # the rest is for the table and the picture
    parts: dict[str, Any] = {}
    payload = {"device": options.device, "quick": options.quick, "card": card(), "rounds": options.rounds, "parts": parts}
    yield payload
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        for stage in stages_of(options):
            for job, record, ended in run_at_once(stage, Path(folder), deadline):
                if job.network:
                    parts.setdefault(job.part.__name__, {})[job.network] = record
                else:
                    parts[job.part.__name__] = {**parts.get(job.part.__name__, {}), **record}
                payload["seconds"] = round(time.monotonic() - start, 1)
                if ended:
                    error = record["error"].strip().splitlines()[-1] if "error" in record else "done"
                    print(f"{payload['seconds']:5.0f} s  {job}: {error}", flush=True)
                yield payload


if __name__ == "__main__":
    options = parser(__doc__, rounds=15, networks=steps.LISTS)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try it out, with tiny parameters")
    options.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="PART", help="see above")
    options.add_argument("--minutes", type=float, default=6.0, help="in all (default %(default)s)")
    chosen = options.parse_args()
    chosen.networks = chosen.networks or (["tiny", "tiny-sharded"] if chosen.quick or chosen.device == "cpu" else DEFAULT)
    if chosen.device == "cuda" and not chosen.redraw and not torch.cuda.is_available():
        options.error("this machine has no CUDA device; `--device cpu` tries the script out")
    # Children are ended and temporary files removed when something else ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_profile("gpu", chosen, measure, table, draw)
