"""Everything that only a GPU can show, in one run of six minutes: does it work, is it right, how fast is it.

    python profiles/gpu.py

The parts, each in a process of its own, so that what fails or hangs takes no other with it:

sanity       one small step of every path
first_steps  seconds of a first step with an empty cache, for each network
steps        milliseconds of a step on the device (CUDA events) and on the host, eager calls and replays of a CUDA graph,
             beside fused and foreach AdamW, transformers' and torch.optim's Adafactor, with the floor from a measured copy;
             peak memory; the first step of this process, which finds what first_steps has compiled; kernels by a profiler
tests        pytest -m cuda
parity       the largest error of every path against the reference path in float64 on the CPU
syncs        twenty steps of every path under torch.cuda.set_sync_debug_mode("error")
training     a whole training step of a small transformer, compiled, with each optimizer

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
from _card.children import Job, run_at_once
from _card.report import draw, table
from _networks import NETWORKS
from _shared import parser, run_profile

DEFAULT = ["gpt2", "decoder-600m", "t5-small", "lora-8b", "resnet50"]
MINUTES = 6.0
SECONDS = {"sanity": 60, "first_steps": 60, "steps": 60, "tests": 130, "parity": 60, "syncs": 60, "training": 150}
MOST_SECONDS_COLD, MOST_PERCENT, LEAST_SPEEDUP = 90.0, 5.0, 8.0
MOST_OF_ADAMW = {"gpt2": 1.0, "t5-small": 1.0, "decoder-600m": 1.0, "lora-8b": 1.2, "resnet50": 1.6}


def card() -> dict[str, Any]:
    """What the numbers depend on beyond what every profile records."""
    result: dict[str, Any] = {"cuda": torch.version.cuda, "triton": None, "driver": None}
    for name in ("triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "name": properties.name,
            "memory_gigabytes": properties.total_memory / 1e9,
            "capability": torch.cuda.get_device_capability(),
            "multiprocessors": properties.multi_processor_count,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            result["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return result


def stages_of(options: argparse.Namespace) -> list[list[Job]]:
    """What runs one after the other; the jobs of one stage run side by side, and those that are timed run alone."""
    rounds = min(3, options.rounds) if options.quick else options.rounds
    common = {"device": options.device, "quick": options.quick}
    # What is tried out on a CPU, or is short anyway, may take as long as it takes.
    seconds = dict.fromkeys(SECONDS, 60 * options.minutes) if options.quick or options.device == "cpu" else SECONDS

    def check(part: str, **more: Any) -> Job:
        return Job(part, seconds[part], {**common, **more})

    def cold(network: str) -> Job:
        return Job("first_steps", seconds["first_steps"], common, network, network)

    def timed(network: str) -> list[Job]:
        # In a quick run it finds what sanity has compiled, which are the same shapes.
        cache = "checks" if options.quick else network
        return [Job("steps", seconds["steps"], {**common, "rounds": rounds}, network, cache)]

    def training(rounds: int) -> Job:
        return Job("training", seconds["training"], {**common, "rounds": rounds}, cache="training")

    tests = Job("tests", seconds["tests"], {"marker": "cuda"})
    stages = [
        [check("sanity"), *map(cold, options.networks)],
        *map(timed, options.networks),
        # The training step is compiled here, in the company of others, and measured alone at the end.
        [tests, check("parity"), check("syncs"), *([] if options.quick else [training(0)])],
        [training(rounds)],
    ]
    return [chosen for stage in stages if (chosen := [job for job in stage if job.part in options.parts])]


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    start = time.monotonic()
    deadline = start + 60 * options.minutes - 5  # the rest is for the table and the picture
    parts: dict[str, Any] = {}
    payload: dict[str, Any] = {
        "device": options.device,
        "quick": options.quick,
        "card": card(),
        "rounds": options.rounds,
        "goals": {
            "over_fused_adamw_at_most": MOST_OF_ADAMW,
            "faster_than_transformers_at_least": LEAST_SPEEDUP,
            "seconds_of_a_cold_first_step": MOST_SECONDS_COLD,
            "peak_percent_of_parameters": MOST_PERCENT,
        },
        "parts": parts,
    }
    yield payload
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        for stage in stages_of(options):
            for job, record, ended in run_at_once(stage, Path(folder), deadline):
                if job.network is None:
                    parts[job.part] = {**parts.get(job.part, {}), **record}  # what it told while it compiled stays
                else:
                    parts.setdefault(job.part, {})[job.network] = record
                payload["seconds"] = round(time.monotonic() - start, 1)
                if ended:
                    error = record["error"].strip().splitlines()[-1] if "error" in record else "done"
                    print(f"{payload['seconds']:5.0f} s  {job}: {error}", flush=True)
                yield payload


def main() -> None:
    options = parser(__doc__, rounds=15, redraw=True)
    options.add_argument("--out", dest="results", type=Path, default=argparse.SUPPRESS, help="the same as --results")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try it out, with tiny parameters")
    options.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="PART", help="see above")
    options.add_argument(
        "--networks", nargs="+", choices=[*NETWORKS, "tiny"], metavar="NAME", help=f"default {' '.join(DEFAULT)}"
    )
    options.add_argument("--minutes", type=float, default=MINUTES, help="in all (default %(default)s)")
    chosen = options.parse_args()
    chosen.networks = chosen.networks or (["tiny"] if chosen.quick or chosen.device == "cpu" else DEFAULT)
    if chosen.device == "cuda" and not chosen.redraw and not torch.cuda.is_available():
        options.error("this machine has no CUDA device; `--device cpu` tries the script out")
    # Children are ended and temporary files removed when something else ends this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_profile("gpu", chosen, measure, table, draw)


if __name__ == "__main__":
    main()
