"""Triton's builds of kernels for an H100, and what the machine code says about them; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


class Built(NamedTuple):
    """A kernel as built for some types and constants."""

    seconds: float
    registers: int
    stack: int  # bytes of a thread that did not fit in registers
    instructions: int
    loads: int  # from memory
    wide_loads: int  # of 128 bits


def build(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Built:
    """Build a kernel for a launch with these arguments: tensors, or None, and then constants by their names."""
    names = kernel.arg_names
    options = {"num_warps": constants["num_warps"]}
    signature = dict.fromkeys(names, "constexpr")
    fixed = {name: x for name, x in constants.items() if name in names}
    aligned = {}
    for i, (name, x) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(x, Tensor):
            signature[name], aligned[(i,)] = mangle_type(x), [["tt.divisibility", 16]]
        else:
            fixed[name] = x
    start = time.perf_counter()
    built = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=TARGET, options=options)
    return _read(built.asm["cubin"], time.perf_counter() - start)


def _read(cubin: bytes, seconds: float) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (_run(tool, file.name) for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    ((registers, stack),) = RESOURCES.findall(resources)
    instructions = INSTRUCTION.findall(code)
    loads = [x for x in instructions if x.startswith("LDG")]
    wide = sum(".128" in x for x in loads)
    return Built(seconds, int(registers), int(stack), len(instructions), len(loads), wide)


def _run(tool: tuple[str, str], path: str) -> str:
    return subprocess.run([TOOLS / tool[0], *tool[1:], path], capture_output=True, text=True, check=True).stdout
