"""What the first step costs: compiling with an empty cache, with a full one, and on a network that was never seen before.

Each figure is from a fresh process: the construction of the optimizer and its first step. The imports of torch, torch._dynamo
and the package are not counted; the last one's seconds are in the JSON. Every network starts with an empty directory for
temporary files, where the package keeps its kernels and Inductor its cache and the headers that it precompiles (cold), then
once more with what that left (warm), and once with what the first step of another network left (unseen); fused kernels are
the same for all networks. Beside it torch.compile on torch.optim.AdamW.step.

Graphs are counted by Dynamo. One of the compiled path's is a probe that no compiler sees, so that it is in no cache either.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _networks import NETWORKS, by_shape
from _shared import color_of, figures, markdown_table, parser, run_profile

CHILD = Path(__file__).with_name("_first_step.py")
NAMES = {"fused": "Adafactor, fused", "compiled": "Adafactor, compiled", "adamw": "torch.compile(AdamW.step)"}
FUSED, OTHERS = {"cold": 6.0, "warm": 0.3}, {"cold": 60.0, "warm": 12.0, "unseen": 15.0}  # goals
COMPILED = {"gpt2": {"cold": 45.0, "warm": 10.0, "unseen": 12.0}, "resnet50": OTHERS, "widths24": OTHERS}
AFTER = {"gpt2": "t5-small", "resnet50": "gpt2", "widths24": "gpt2", "t5-small": "gpt2", "lora-8b": "gpt2", "vit-b16": "gpt2"}
DEFAULT = ["gpt2", "resnet50", "widths24"]
ADAMW_ON = "gpt2"
LOOKS = {"cold": {"alpha": 1.0}, "unseen": {"alpha": 0.6}, "warm": {"alpha": 0.3}}


class Case(NamedTuple):
    network: str
    optimizer: str  # of NAMES
    unseen_after: str | None  # the network that fills the cache for the third figure

    @property
    def most_seconds(self) -> dict[str, float]:
        """Its goals."""
        return {"fused": FUSED, "compiled": COMPILED.get(self.network, {})}.get(self.optimizer, {})


def first_step(network: str, optimizer: str, temporary: Path) -> dict[str, Any]:
    """Seconds of the phases of a fresh process that has this directory for temporary files."""
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(temporary),  # where libraries are looked for too
        "ADAFACTOR_COMPILED_CACHE_DIR": str(temporary / "kernels"),
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([str(CHILD.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    start = time.perf_counter()
    command = [sys.executable, str(CHILD), network, "compile" if optimizer == "compiled" else optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the first step of {optimizer} on {network} failed:\n{done.stderr}")
    phases: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seconds = phases["construction_s"] + phases["first_step_s"]
    return {"seconds": seconds, **phases, "process_s": time.perf_counter() - start}


def measure_case(case: Case) -> dict[str, Any]:
    phases = {}
    with tempfile.TemporaryDirectory(prefix="inductor-") as own, tempfile.TemporaryDirectory(prefix="inductor-") as other:
        phases["cold"] = first_step(case.network, case.optimizer, Path(own))
        phases["warm"] = first_step(case.network, case.optimizer, Path(own))
        if case.unseen_after is not None:
            phases["before_unseen"] = first_step(case.unseen_after, case.optimizer, Path(other))
            phases["unseen"] = first_step(case.network, case.optimizer, Path(other))
    print(
        f"{case.optimizer} on {case.network}: " + ", ".join(f"{k} {v['seconds']:.2f} s" for k, v in phases.items()), flush=True
    )
    return {**case._asdict(), "shapes": by_shape(NETWORKS[case.network]()), "most_seconds": case.most_seconds, **phases}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    networks = options.networks or (["widths24"] if options.quick else DEFAULT)
    cases = [Case(network, "fused", None) for network in networks]
    if not options.quick:
        cases += [Case(network, "compiled", AFTER[network]) for network in networks]
    if not options.quick and not options.skip_adamw:
        cases.append(Case(ADAMW_ON, "adamw", None))
    done = []
    for case in cases:
        done.append(measure_case(case))
        yield {"rounds": 1, "cases": done}


def name_of(case: dict[str, Any]) -> str:
    return f"{case['network']}: {NAMES[case['optimizer']]}"


def table(result: dict[str, Any]) -> str:
    """Seconds of construction and first step in a fresh process, goals in brackets, and its graphs, the probe included."""
    kinds = list(OTHERS)
    rows = [
        [
            name_of(case),
            *(seconds_of(case, kind) for kind in kinds),
            str(case["cold"]["graphs"]),
            f"{case['unseen']['found_in_cache']} of {case['unseen']['graphs']}" if "unseen" in case else "-",
        ]
        for case in result["cases"]
    ]
    return markdown_table(["construction and first step, s", *kinds, "graphs", "of an unseen network, in the cache"], rows)


def seconds_of(case: dict[str, Any], kind: str) -> str:
    if kind not in case:
        return "-"
    most = case["most_seconds"].get(kind)
    return f"{case[kind]['seconds']:.2f}" + ("" if most is None else f" (<= {most:g})")


def draw(result: dict[str, Any]) -> Any:
    """Bars of seconds, and the goals as lines of the same height."""
    cases = result["cases"]
    figure, axes = figures().subplots(figsize=(9, 1.6 + 0.8 * len(cases)))
    for y, case in enumerate(cases):
        color = color_of(NAMES[case["optimizer"]])
        kinds = [kind for kind in LOOKS if kind in case]
        for place, kind in enumerate(kinds):
            seconds = case[kind]["seconds"]
            height = 0.8 / len(kinds)
            middle = y - 0.4 + height * (place + 0.5)
            axes.barh(middle, seconds, height * 0.9, color=color, **LOOKS[kind])
            after = f" (after {case['unseen_after']})" if kind == "unseen" else ""
            goal = case["most_seconds"].get(kind)
            place_of_text = max(seconds, goal or 0), middle
            axes.annotate(f"{kind}{after} {seconds:.2f} s", place_of_text, (4, 0), textcoords="offset points", va="center")
            if goal is not None:
                axes.plot([goal, goal], [middle - height / 2, middle + height / 2], color="black", linewidth=2)
    axes.set_yticks(range(len(cases)), [name_of(case).replace(": ", "\n") for case in cases])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.25)
    axes.set(xlabel="seconds; the black lines are goals", title="Construction and first step in a fresh process")
    return figure


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument("--networks", nargs="+", choices=AFTER, metavar="NAME", help=f"of {', '.join(AFTER)}")
    options.add_argument("--skip-adamw", action="store_true", help="leave out torch.compile on AdamW, which takes minutes")
    run_profile("compile_time", options.parse_args(), measure, table, draw)


if __name__ == "__main__":
    main()
