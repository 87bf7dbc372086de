"""What the first step costs: compiling with an empty cache, with a full one, and on a network that was never seen before.

Each figure is from a fresh process: the construction of the optimizer and its first step, without the imports of torch,
torch._dynamo and the package. Every network starts with an empty directory for temporary files, where the package keeps its
kernels and Inductor its cache and the headers that it precompiles (cold), then once more with what that left (warm), and once
with what the first step of another network left (unseen); fused kernels are the same for all networks. Beside it, on GPT-2,
torch.compile on torch.optim.AdamW.step.

Graphs are counted by Dynamo. One of the compiled path's is a probe that no compiler sees, so that it is in no cache either.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _contenders import adamw, make_params, ours
from _networks import ROWS, by_shape
from _shared import dots, in_fresh_process, markdown_table, parser, run_profile

NAMES = {"fused": "Adafactor, fused", "compiled": "Adafactor, compiled", "adamw": "torch.compile(AdamW.step)"}
AFTER = {"gpt2": "t5-small", "resnet50": "gpt2", "widths24": "gpt2"}  # the network that fills the cache for the third figure
MAKERS = {"fused": ours(fused=True), "compiled": ours(compile=True), "adamw": adamw()}
KINDS = ["cold", "warm", "unseen"]


class Case(NamedTuple):
    network: str
    optimizer: str  # of NAMES
    unseen_after: str | None


def cases_of(options: argparse.Namespace) -> list[Case]:
    networks = options.networks or (["widths24"] if options.quick else list(AFTER))
    cases = [Case(network, "fused", None) for network in networks]
    if not options.quick:
        cases += [Case(network, "compiled", AFTER[network]) for network in networks]
        cases += [Case("gpt2", "adamw", None)] if "gpt2" in networks else []  # takes minutes
    return cases


def first_step(network: str, optimizer: str) -> dict[str, Any]:
    """Seconds of this process up to the second step."""
    from torch._dynamo.utils import counters  # the first optimizer of a process, whichever it is, imports torch._dynamo

    params = make_params(ROWS[network].shapes())
    start = time.perf_counter()
    made = MAKERS[optimizer](params, None)
    step = torch.compile(made.step) if optimizer == "adamw" else made.step
    constructed = time.perf_counter()
    step()
    first = time.perf_counter()
    step()
    return {
        "seconds": first - start,
        "construction_s": constructed - start,
        "first_step_s": first - constructed,
        "second_step_s": time.perf_counter() - first,
        "graphs": counters["stats"]["unique_graphs"],
        "found_in_cache": counters["inductor"]["fxgraph_cache_hit"],
    }


def first_step_in(folder: str, network: str, optimizer: str) -> dict[str, Any]:
    """The same of a fresh process that has this directory for temporary files and for caches."""
    names = {"ADAFACTOR_COMPILED_CACHE_DIR": "kernels", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    caches = {name: str(Path(folder) / subfolder) for name, subfolder in names.items()}
    variables = {"TMPDIR": folder, "XDG_CACHE_HOME": folder, **caches}  # the latter, where libraries are looked for too
    return in_fresh_process(first_step, network, optimizer, **variables)


def measure_case(case: Case) -> dict[str, Any]:
    phases = {}
    with tempfile.TemporaryDirectory(prefix="inductor-") as own, tempfile.TemporaryDirectory(prefix="inductor-") as other:
        phases["cold"] = first_step_in(own, case.network, case.optimizer)
        phases["warm"] = first_step_in(own, case.network, case.optimizer)
        if case.unseen_after is not None:
            phases["before_unseen"] = first_step_in(other, case.unseen_after, case.optimizer)
            phases["unseen"] = first_step_in(other, case.network, case.optimizer)
    seconds = ", ".join(f"{kind} {phase['seconds']:.2f} s" for kind, phase in phases.items())
    print(f"{case.optimizer} on {case.network}: {seconds}", flush=True)
    return {**case._asdict(), "shapes": by_shape(ROWS[case.network].shapes()), **phases}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    done = []
    for case in cases_of(options):
        done.append(measure_case(case))
        yield {"rounds": 1, "cases": done}


def table(result: dict[str, Any]) -> str:
    """Seconds of construction and first step in a fresh process, and its graphs, the probe included."""
    rows = [
        [
            f"{case['network']}: {NAMES[case['optimizer']]}",
            *(f"{case[kind]['seconds']:.2f}" if kind in case else "-" for kind in KINDS),
            str(case["cold"]["graphs"]),
            f"{case['unseen']['found_in_cache']} of {case['unseen']['graphs']}" if "unseen" in case else "-",
        ]
        for case in result["cases"]
    ]
    return markdown_table(["construction and first step, s", *KINDS, "graphs", "of an unseen network, in the cache"], rows)


def draw(result: dict[str, Any]) -> Any:
    rows: dict[str, list[tuple[str, float]]] = {}
    for case in result["cases"]:
        for kind in KINDS:
            if kind in case:
                what = f"unseen, after {case['unseen_after']}" if kind == "unseen" else kind
                rows.setdefault(f"{case['network']}, {what}", []).append((NAMES[case["optimizer"]], case[kind]["seconds"]))
    return dots({"Construction and first step in a fresh process": rows}, "seconds, logarithmic")


if __name__ == "__main__":
    run_profile("compile_time", parser(__doc__, networks=AFTER).parse_args(), measure, table, draw)
