"""What a step launches and moves on a GPU, and what Triton builds for it; no GPU is needed, and nothing is computed.

The package makes its plan of a step, compiles ahead and steps, for parameters that are said to be on a GPU and have no values.
In place of a kernel a recorder notes the launch. Triton then builds each kernel for an H100 (sm_90), and its disassembler says
how many registers it takes, what does not fit in them, and which loads are 128 bits wide. Device time is an estimate: bytes
over 2.5 TB/s, and at least 2 us a launch; that of fused AdamW is its bytes alone. What a card takes, gpu.py measures.

It needs Triton, which CUDA builds of torch bring, and a C compiler. Each network has a process of its own, with empty caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from _networks import ROWS, Row, Shapes
from _shared import dots, in_fresh_process, markdown_table, parser, run_profile

RANKS = 8
BANDWIDTH, SHORTEST = 2.5e12, 2e-6  # bytes a second, and seconds of a launch at least: of an H100
LARGE = 1.0  # bytes an element that make a kernel a large one


Case = tuple[Row, int, dict[str, Any]]  # the ranks that share the parameters, and options of the optimizer


def sharded(name: str) -> Case:
    row = ROWS[name]
    return row._replace(title=f"{row.title}, a piece of {RANKS} ranks"), RANKS, {}


HALF_MOMENTUM = ROWS["gpt2-beta1"]._replace(title="GPT-2 with beta1=0.9, momentum in bfloat16")
CASES: dict[str, Case] = {
    **{name: (row, 1, {}) for name, row in ROWS.items()},
    "gpt2-beta1-bfloat16": (HALF_MOMENTUM, 1, {"momentum_dtype": torch.bfloat16}),
    **{f"{name}-sharded": sharded(name) for name in ("gpt2", "decoder-600m")},
}
DEFAULT = [name for name in CASES if name not in ("vit-b16", "widths24", "train")]


def milliseconds(moved: float, launches: int = 1) -> float:
    """An estimate for an H100."""
    return 1e3 * max(moved / BANDWIDTH, launches * SHORTEST)


def kernels_of(
    shapes: Shapes, dtype: torch.dtype = torch.float32, beta1: float | None = None, ranks: int = 1, **options: Any
) -> dict[str, Any]:
    """What a step of parameters launches and moves.

    Args:
        shapes: of the parameters.
        dtype: of parameters and gradients.
        beta1: as of the optimizer.
        ranks: that share the parameters, each a part of the first dimension; what is said is of one of them.
        **options: others of the optimizer.

    Raises:
        RuntimeError: Triton is missing, or does not build a kernel.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the kernels of a GPU need Triton, which CUDA builds of torch for Linux bring; no GPU is needed")
    with tempfile.TemporaryDirectory(prefix="gpu-") as directory:
        variables = {"TRITON_CACHE_DIR": directory, "TRITON_INTERPRET": "0"}
        return in_fresh_process(_record, shapes, dtype, beta1, ranks, options, **variables)


def _record(*case: Any) -> dict[str, Any]:
    from _gpu_step import record  # which needs Triton

    return record(*case)


def pieces_of(shapes: Sequence[Sequence[int]], ranks: int) -> Shapes:
    """Those of the first of some ranks."""
    return [(-(-first // ranks), *rest) for first, *rest in shapes] if ranks > 1 else [tuple(shape) for shape in shapes]


def measure_case(case: Case, shown: float | None) -> dict[str, Any]:
    row, ranks, options = case
    shapes = row.shapes()
    result = kernels_of(shapes, row.dtype, row.beta1, ranks, **options)
    print(f"{row.title}: {result['graphs']} kernels built in {result['codegen_s']:.1f} s", flush=True)
    for kernel in result["of_kernels"]:
        if shown is not None and kernel["bytes_per_element"] >= shown:
            constants = ", ".join(f"{name} {x}" for name, x in kernel["constants"].items())
            launches = f"{kernel['bytes_per_element']:6.2f} in {kernel['launches']} launches of {kernel['name']}"
            print(f"  {launches}: {constants}", flush=True)
    numel = sum(map(math.prod, pieces_of(shapes, ranks)))
    adamw = {"bytes_per_element": 7 * row.dtype.itemsize}  # four reads and three writes
    adamw["device_ms"] = milliseconds(adamw["bytes_per_element"] * numel)
    return {**row.described(), "ranks": ranks, "options": options, "fused_adamw": adamw, **result}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    networks: dict[str, Any] = {}
    for name in options.networks or (["widths24"] if options.quick else DEFAULT):
        networks[name] = measure_case(CASES[name], options.kernels)
        yield {"bytes_a_second": BANDWIDTH, "shortest_launch_s": SHORTEST, "networks": networks}


def table(result: dict[str, Any]) -> str:
    """Launches, bytes and the estimate beside fused AdamW's, and what was built."""
    header = ["", "kernels", "of these in steps", "building, s", "launches", "operations of torch", "bytes/element"]
    header += ["fused AdamW's", "estimate, ms", "fused AdamW's", "registers, stack at most", "large ones, by 128 bits"]
    rows = []
    for row in result["networks"].values():
        peer, builds = row["fused_adamw"], [kernel["build"] for kernel in row["of_kernels"]]
        large = [kernel["build"] for kernel in row["of_kernels"] if kernel["bytes_per_element"] >= LARGE]
        counts = [str(row["graphs"]), str(row["graphs_in_steps"]), f"{row['codegen_s']:.1f}", str(row["triton_launches"])]
        moved = [f"{row['bytes_per_element']:.2f}", f"{peer['bytes_per_element']:g}"]
        times = [f"{row['device_ms']:.2f}", f"{peer['device_ms']:.2f}"]
        most = ", ".join(str(max(build[what] for build in builds)) for what in ("registers", "stack"))
        wide = f"{len(large)}, {sum(build['wide_loads'] > 0 for build in large)}"
        rows.append([row["title"], *counts, str(row["aten_launches"]), *moved, *times, most, wide])
    return markdown_table(header, rows)


def draw(result: dict[str, Any]) -> Any:
    """Bytes and the estimate, beside fused AdamW's."""
    panels = {
        title: {
            row["title"]: [("Adafactor, fused", row[key]), ("fused AdamW", row["fused_adamw"][key])]
            for row in result["networks"].values()
        }
        for title, key in (("bytes an element", "bytes_per_element"), ("device time, ms, estimated", "device_ms"))
    }
    return dots(panels, "logarithmic")


if __name__ == "__main__":
    options = parser(__doc__, networks=CASES)
    options.add_argument("--kernels", type=float, metavar="BYTES", help="name those that move so many an element or more")
    run_profile("gpu_kernels", options.parse_args(), measure, table, draw)
