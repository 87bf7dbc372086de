"""Triton's builds of generated kernels for an H100, and what the machine code says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch._inductor.config as inductor_config
import triton
from torch._inductor.codecache import PyCodeCache

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


class Built(NamedTuple):
    """A kernel in one of the configurations that Inductor would try on a card."""

    configuration: str
    seconds: float
    registers: int
    stack: int  # bytes of a thread that did not fit in registers
    instructions: int
    loads: int  # from memory
    wide_loads: int  # of 128 bits


def build(name: str, source: str) -> list[Built]:
    """Build a kernel of Inductor, from its module, in all its configurations."""
    kernel = getattr(PyCodeCache.load(source), name)
    results = []
    with inductor_config.patch(use_static_triton_launcher=False):  # it would leave the machine code in a file
        for config in kernel.configs:
            start = time.perf_counter()
            cubin = kernel._precompile_config(config).kernel.asm["cubin"]
            results.append(_read(cubin, f"{config.kwargs} warps {config.num_warps}", time.perf_counter() - start))
    return results


def _read(cubin: bytes, configuration: str, seconds: float) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (_run(tool, file.name) for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    ((registers, stack),) = RESOURCES.findall(resources)
    instructions = INSTRUCTION.findall(code)
    loads = [x for x in instructions if x.startswith("LDG")]
    wide = sum(".128" in x for x in loads)
    return Built(configuration, seconds, int(registers), int(stack), len(instructions), len(loads), wide)


def _run(tool: tuple[str, str], path: str) -> str:
    return subprocess.run([TOOLS / tool[0], *tool[1:], path], capture_output=True, text=True, check=True).stdout


def build_all(sources: Mapping[str, str], large: Collection[str]) -> dict[str, Any]:
    """Build the kernels of a graph, given by their names; each configuration of the large ones is in the result."""
    built = {name: build(name, source) for name, source in sources.items()}
    of_all = [x for results in built.values() for x in results]
    return {
        "kernels": len(built),
        "configurations": len(of_all),
        "seconds": sum(x.seconds for x in of_all),
        "registers": max(x.registers for x in of_all),
        "stack": max(x.stack for x in of_all),
        "large": {name: [x._asdict() for x in built[name]] for name in built if name in large},
    }
