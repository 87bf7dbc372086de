"""What a step launches and moves on a GPU, and what Triton builds for it; no GPU is needed, and nothing is computed.

For the parameter lists of networks the package makes its plan of a step, compiles ahead and steps, for parameters that are said
to be on a GPU and have no values. In place of a kernel a recorder notes the launch and what it is to be compiled for; Triton
then builds each kernel for an H100 (sm_90), and its disassembler says how many registers it takes, what does not fit in them,
and which loads are 128 bits wide. Device time is an estimate: bytes over 2.5 TB/s, and at least 2 us a launch; that of fused
AdamW is made the same way. What a card takes, gpu.py measures.

It needs Triton, which CUDA builds of torch bring, and a C compiler. Each network has a process of its own, with empty caches.

    python profiles/gpu_kernels.py --networks gpt2 --kernels 0.5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _networks import NETWORKS, Shapes, by_shape
from _shared import color_of, figures, markdown_table, parser, run_profile
from step_time import ROWS, Row

CHILD = Path(__file__).with_name("_gpu_step.py")
BANDWIDTH, SHORTEST = 2.5e12, 2e-6  # bytes a second, and seconds of a launch at least: of an H100


def milliseconds(moved: float, launches: int = 1) -> float:
    """An estimate for an H100."""
    return 1e3 * max(moved / BANDWIDTH, launches * SHORTEST)


class Goal(NamedTuple):
    launches: int | None = None  # of Triton and aten, at most
    bytes: float | None = None  # an element, at most


GOALS = {
    "gpt2": Goal(64, 25.0),
    "t5-small": Goal(),
    "decoder-600m": Goal(100, 12.6),
    "lora-8b": Goal(150, 27.0),
    "resnet50": Goal(48, 46.0),
    "gpt2-beta1": Goal(bytes=33.0),
    "gpt2-beta1-bfloat16": Goal(),
    "gpt2-sharded": Goal(30, 26.0),
    "decoder-600m-sharded": Goal(30, 13.0),
}
RANKS = 8


def sharded(row: Row) -> Row:
    return row._replace(title=f"{row.title}, a piece of {RANKS} ranks")


HALF_MOMENTUM = ROWS["gpt2-beta1"]._replace(title="GPT-2 with beta1=0.9, momentum in bfloat16")
CASES: dict[str, tuple[Row, dict[str, Any]]] = {
    **{name: (row, {}) for name, row in ROWS.items()},
    "gpt2-beta1-bfloat16": (HALF_MOMENTUM, {"momentum_dtype": "bfloat16"}),
    **{f"{name}-sharded": (sharded(ROWS[name]), {"ranks": RANKS}) for name in ("gpt2", "decoder-600m")},
}
MOST_CODEGEN_S = 90.0
LARGE = 1.0  # bytes an element that make a kernel a large one


def kernels_of(
    shapes: Shapes, dtype: torch.dtype = torch.float32, beta1: float | None = None, ranks: int = 1, **options: Any
) -> dict[str, Any]:
    """What a step of parameters launches and moves, see _gpu_step.py.

    Args:
        shapes: of the parameters.
        dtype: of parameters and gradients.
        beta1: as of the optimizer.
        ranks: that share the parameters, each a part of the first dimension; what is said is of one of them.
        **options: others of the optimizer, a dtype by its name.

    Raises:
        RuntimeError: Triton is missing, or does not build a kernel.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the kernels of a GPU need Triton, which CUDA builds of torch for Linux bring; no GPU is needed")
    case = {"shapes": shapes, "dtype": str(dtype).removeprefix("torch."), "beta1": beta1, "ranks": ranks, "options": options}
    with tempfile.TemporaryDirectory(prefix="gpu-") as directory:
        variables = {**os.environ, "TRITON_CACHE_DIR": directory, "TRITON_INTERPRET": "0"}
        variables["PYTHONPATH"] = os.pathsep.join([str(CHILD.parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(CHILD), json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        raise RuntimeError(f"building the kernels failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def pieces_of(shapes: Sequence[Sequence[int]], ranks: int) -> Shapes:
    """Those of the first of some ranks."""
    return [(-(-first // ranks), *rest) for first, *rest in shapes] if ranks > 1 else [tuple(shape) for shape in shapes]


def adamw(shapes: Shapes, itemsize: int) -> dict[str, float]:
    """Of torch.optim.AdamW(fused=True): 36 tensors or 320 blocks of 65,536 elements a launch, four reads and three writes."""
    launches = blocks = tensors = 0
    for numel in map(math.prod, shapes):
        tensors += 1
        left = -(-numel // 65_536)
        while left:
            taken = min(left, 320 - blocks)
            blocks, left = blocks + taken, left - taken
            if blocks == 320 or (tensors == 36 and not left):
                launches, blocks, tensors = launches + 1, 0, int(left > 0)
    launches += (blocks > 0) + -(-len(shapes) // 110)  # and the step counts, by an addition of their own
    moved = 7 * itemsize * sum(map(math.prod, shapes))
    return {
        "launches": launches,
        "bytes_per_element": 7.0 * itemsize,
        "device_ms": milliseconds(moved, launches),
    }


def measure_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    (row, of_optimizer), goal = CASES[name], GOALS.get(name, Goal())
    shapes = NETWORKS[row.network]()
    result = kernels_of(shapes, row.dtype, row.beta1, **of_optimizer)
    print(f"{row.title}: {result['graphs']} kernels built in {result['codegen_s']:.1f} s", flush=True)
    for kernel in result["of_kernels"]:
        if options.kernels is not None and kernel["bytes_per_element"] >= options.kernels:
            print(line_of(kernel), flush=True)
    print(f"  torch: {result['of_aten']}", flush=True)
    return {
        "title": row.title,
        "shapes": by_shape(shapes),
        "dtype": row.dtype,
        "beta1": row.beta1,
        "options": of_optimizer,
        "goal": {"launches": goal.launches, "bytes_per_element": goal.bytes},
        "fused_adamw": adamw(pieces_of(shapes, of_optimizer.get("ranks", 1)), row.dtype.itemsize),
        **result,
    }


def line_of(kernel: dict[str, Any]) -> str:
    """A kernel, its launches and bytes, and what it is compiled for."""
    constants = ", ".join(f"{name} {x}" for name, x in kernel["constants"].items())
    return f"  {kernel['bytes_per_element']:6.2f} in {kernel['launches']} launches of {kernel['name']}: {constants}"


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = options.networks or (["widths24"] if options.quick else list(GOALS))
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = measure_row(name, options)
        yield {"most_codegen_s": MOST_CODEGEN_S, "bytes_a_second": BANDWIDTH, "shortest_launch_s": SHORTEST, "networks": rows}


def at_most(value: float, goal: float | None, form: str) -> str:
    return format(value, form) + ("" if goal is None else f" (<= {goal:g})")


def table(result: dict[str, Any]) -> str:
    """Launches, bytes and the estimate beside fused AdamW's, with the goals in brackets."""
    header = [
        "",
        "kernels",
        "built in steps",
        "building, s",
        "launches",
        "operations of torch",
        "bytes/element",
        "fused AdamW's",
        "estimate, ms",
        "fused AdamW's",
        "most registers",
        "bytes of stack",
        "large kernels",
        "with loads of 128 bits",
    ]
    rows = []
    for row in result["networks"].values():
        builds = [kernel["build"] for kernel in row["of_kernels"]]
        large = [kernel["build"] for kernel in row["of_kernels"] if kernel["bytes_per_element"] >= LARGE]
        rows.append(
            [
                row["title"],
                str(row["graphs"]),
                str(row["graphs_in_steps"]),
                at_most(row["codegen_s"], result["most_codegen_s"], ".1f"),
                at_most(row["triton_launches"], row["goal"]["launches"], "d"),
                str(row["aten_launches"]),
                at_most(row["bytes_per_element"], row["goal"]["bytes_per_element"], ".2f"),
                f"{row['fused_adamw']['bytes_per_element']:g} in {row['fused_adamw']['launches']}",
                f"{row['device_ms']:.2f}",
                f"{row['fused_adamw']['device_ms']:.2f}",
                str(max(build["registers"] for build in builds)),
                str(max(build["stack"] for build in builds)),
                str(len(large)),
                str(sum(build["wide_loads"] > 0 for build in large)),
            ]
        )
    return markdown_table(header, rows)


def draw(result: dict[str, Any]) -> Any:
    """Launches, bytes and the estimate: two bars a network, the second of fused AdamW, and goals as lines."""
    rows = list(result["networks"].values())
    figure, panels = figures().subplots(1, 3, figsize=(12, 1.6 + 0.6 * len(rows)), sharey=True)
    for axes, title in zip(panels, ("launches of a step", "bytes an element", "device time, ms, estimated"), strict=True):
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
    for y, row in enumerate(rows):
        kernels, peer, goal = row["triton_launches"], row["fused_adamw"], row["goal"]
        values = [
            (kernels + row["aten_launches"], peer["launches"], goal["launches"]),
            (row["bytes_per_element"], peer["bytes_per_element"], goal["bytes_per_element"]),
            (row["device_ms"], peer["device_ms"], None),
        ]
        for axes, (ours, theirs, most) in zip(panels, values, strict=True):
            first = axes is panels[0]  # where what torch launches is paler
            bar(axes, y - 0.19, ours, "fused", "Adafactor, operations of torch" if first else None, 0.4 if first else 1)
            bar(axes, y + 0.19, theirs, "AdamW", "fused AdamW" if first else None)
            if most is not None:
                axes.plot([most, most], [y - 0.38, y], color="black", linewidth=2, label="goal" if first else None)
        bar(panels[0], y - 0.19, kernels, "fused", "Adafactor, kernels of its own", text="")
    panels[0].set(xscale="log", xlim=(1, None), xlabel="logarithmic")
    panels[0].set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    panels[0].minorticks_off()
    for axes in panels:
        axes.margins(x=0.2)
    panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=4)
    return figure


def bar(axes: Any, y: float, value: float, name: str, label: str | None, alpha: float = 1, text: str | None = None) -> None:
    axes.barh(y, value, 0.34, color=color_of(name), alpha=alpha, label=label)
    shown = text if text is not None else f"{value:.3g}" if isinstance(value, float) else str(value)
    axes.annotate(shown, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8)


def main() -> None:
    options = parser(__doc__, redraw=True)
    options.add_argument("--networks", nargs="+", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)} (default: nine)")
    help_kernels = "name the kernels that move so many bytes an element or more"
    options.add_argument("--kernels", type=float, metavar="BYTES", help=help_kernels)
    chosen = options.parse_args()
    run_profile("gpu_kernels", chosen, measure, table, draw)


if __name__ == "__main__":
    main()
