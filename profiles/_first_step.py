"""The first step of one optimizer on one network, in a process of its own; prints one line of JSON for compile_time.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from _networks import NETWORKS


def passes_on_disk() -> int:
    return len(list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "adafactor_compiled").glob("*.json")))


def background_seconds() -> float:
    """How long the process that compiles for other networks takes from now on."""
    from adafactor_compiled import _helper

    start = time.perf_counter()
    _helper.wait()
    return time.perf_counter() - start


def main(network: str, optimizer: str, stays: str) -> None:
    params = [torch.nn.Parameter(torch.full(shape, 0.02)) for shape in NETWORKS[network]()]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    before = passes_on_disk()
    start = time.perf_counter()
    if optimizer == "adamw":
        step = torch.compile(torch.optim.AdamW(params, lr=1e-9).step, fullgraph=False)
    else:
        from adafactor_compiled import Adafactor

        step = Adafactor(params, lr=1e-9, relative_step=False, compile=True, show_progress=False).step
    made = time.perf_counter()
    step()
    first = time.perf_counter()
    step()
    second = time.perf_counter()

    from torch._dynamo.utils import counters

    found = counters["inductor"]["fxgraph_cache_hit"]
    graphs, passes = counters["stats"]["unique_graphs"], counters["adafactor_compiled"]
    if optimizer != "adamw":
        graphs = passes["passes_compiled"] + passes["passes_found"]
        # The process that helps with a cold start also leaves some there, and goes on with others.
        found = max(0, graphs - (passes_on_disk() - before))
    result = {
        "import_and_construction_s": made - start,
        "first_step_s": first - made,
        "second_step_s": second - first,
        "graphs": graphs,
        "found_in_cache": found,
    }
    if stays == "stays":
        result["background_s"] = background_seconds()
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
