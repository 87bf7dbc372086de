"""The first step of one optimizer on one network, in a process of its own; prints one line of JSON for compile_time.py."""

from __future__ import annotations

import json
import sys
import time

import torch
from _networks import NETWORKS
from torch._dynamo.utils import counters  # the first optimizer of a process, whichever it is, imports torch._dynamo


def main(network: str, optimizer: str) -> None:
    params = [torch.nn.Parameter(torch.full(shape, 0.02)) for shape in NETWORKS[network]()]
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    start = time.perf_counter()
    from adafactor_compiled import Adafactor

    imported = time.perf_counter()
    if optimizer == "adamw":
        step = torch.compile(torch.optim.AdamW(params, lr=1e-9).step, fullgraph=False)
    else:
        step = Adafactor(params, lr=1e-9, relative_step=False, show_progress=False, **{optimizer: True}).step
    made = time.perf_counter()
    step()
    first = time.perf_counter()
    step()
    second = time.perf_counter()

    result = {
        "import_s": imported - start,
        "construction_s": made - imported,
        "first_step_s": first - made,
        "second_step_s": second - first,
        "graphs": counters["stats"]["unique_graphs"],
        "found_in_cache": counters["inductor"]["fxgraph_cache_hit"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
