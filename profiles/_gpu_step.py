"""The launches of a step of parameters that are said to be on a GPU, and what Triton builds for them; see gpu_kernels.py.

The optimizer, its plan, `warm_up` and the step are the package's own; the parameters are on the CPU, without values, and in
place of a kernel a recorder notes its launches. Triton then builds the kernels for an H100, and its disassembler reads them.
Nothing needs a GPU, and nothing is computed. What is changed in the package stays so: this is for a process of its own.
"""

from __future__ import annotations

import collections
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from gpu_kernels import milliseconds, pieces_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from adafactor_compiled import Adafactor
from adafactor_compiled._fused.gpu import layout, steps
from adafactor_compiled._fused.pieces import COLUMNS, ROWS, STATISTICS
from adafactor_compiled._sharded.exchange import Exchange

OF_MATRICES = ["matrix_statistics", "matrix_columns", "apply_matrix"]
OF_MEMBERS = ["put", "column_means", "finish"]  # of a few numbers
KERNELS = [*OF_MATRICES, "step_vectors", "step_slices", *OF_MEMBERS]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
NO_LAUNCHES = {"aten::detach", "aten::view", "aten::unbind", "aten::expand", "aten::lift_fresh", "aten::alias"}


class Launched(NamedTuple):
    """One launch of a kernel."""

    kernel: Any  # of Triton
    blocks: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # num_warps too


class Recorder:
    """In place of a kernel."""

    def __init__(self, kernel: Any, launched: list[Launched]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launched.append(Launched(self.kernel, grid[0], arguments, constants))

        return launch


class Eager(TorchDispatchMode):
    """Counts the operations of torch, each a launch at least."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith("aten") and name not in NO_LAUNCHES and "empty" not in name:
            self.operations[name] += 1
        return result


def recorded() -> list[Launched]:
    """From now on parameters on a CPU count as on a GPU, and what would be launched is noted."""
    launched: list[Launched] = []
    layout.is_gpu = lambda device: True
    for name in KERNELS:
        setattr(steps, name, Recorder(getattr(steps, name), launched))
    return launched


def moved(launched: Launched) -> float:
    """The bytes that a launch reads and writes. What the next tile of a block finds in cache counts again."""
    name = launched.kernel.fn.__name__
    if name in OF_MEMBERS:
        return 0.0
    units, constants = launched.arguments[1], launched.constants
    p, g, a = (size_of(constants.get(key)) for key in "PGA")
    m = 2 * size_of(constants.get("M"))
    of_sums = 16  # plain and weighted, of a column of a piece
    kept = 0 if constants.get("SPLIT") is None else 2 * a  # averages of pieces are read again, and written, when it is sure
    exchanges = constants.get("SPLIT") in (ROWS, COLUMNS)
    is_first = constants.get("CALL") == STATISTICS
    puts = constants.get("PUTS")
    total = float(launched.arguments[6].nbytes) if puts else 0.0
    for unit in units.tolist():
        rows, columns, blocks = unit[4], unit[5], unit[7]
        if name in OF_MATRICES:
            n, sums = rows * columns, 2 * columns * blocks * a
            again = 0 if constants.get("ONE_TILE") else n * g
            total += {
                "matrix_statistics": n * (p + g) + again + 2 * rows * a + sums,
                "matrix_columns": (columns * of_sums if exchanges else sums) + (0 if puts else 2 * columns * a),
                "apply_matrix": n * (2 * p + g + m) + (rows + columns * blocks) * a + (rows + columns) * kept,
            }[name]
        elif name == "step_vectors":
            total += rows * (p + g + a if is_first else 2 * p + g + m + (3 if constants["TWICE"] else 2) * a)
        else:
            of_slice, state = constants["R"] * constants["C"], constants["R"] + constants["C"]
            if is_first:
                total += rows * (of_slice * (p + g) + 2 * state * a)
            else:
                total += rows * (of_slice * (2 * p + g + m) + state * (a + kept // 2))
    return total


def size_of(dtype: Any) -> int:
    return 0 if dtype is None else int(dtype.primitive_bitwidth) // 8


def variant_of(launched: Launched) -> tuple[Any, ...]:
    """What a kernel is built for; launches of one variant share what was built."""
    types = tuple(x.dtype if isinstance(x, Tensor) else None for x in launched.arguments)
    return launched.kernel.fn.__name__, types, tuple(sorted(launched.constants.items(), key=lambda item: item[0]))


def record(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, beta1: float | None, ranks: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What `gpu_kernels.kernels_of` returns."""
    launched = recorded()
    optimizer = Adafactor(params_of(shapes, dtype, ranks), beta1=beta1, fused=True, **options)
    optimizer.warm_up()
    ahead = {variant_of(x) for x in launched}
    with Eager():
        optimizer.step()  # makes what later ones keep; of steps in a mode there is another plan
    launched.clear()
    with Eager() as eager:
        optimizer.step()
    by_variant: dict[tuple[Any, ...], list[Launched]] = {}
    for one in launched:
        by_variant.setdefault(variant_of(one), []).append(one)
    elements = sum(math.prod(shape) for shape in pieces_of(shapes, ranks))
    rows = [
        {
            "name": of[0].kernel.fn.__name__,
            "launches": len(of),
            "bytes_per_element": sum(map(moved, of)) / elements,
            "constants": {name: x if isinstance(x, (bool, int)) else str(x) for name, x in of[0].constants.items()},
            "build": build(of[0])._asdict(),
        }
        for of in by_variant.values()
    ]
    return {
        "graphs": len(ahead),
        "graphs_in_steps": len(set(by_variant) - ahead),
        "triton_launches": len(launched),
        "aten_launches": eager.operations.total(),
        "of_aten": dict(eager.operations),
        "bytes_per_element": sum(row["bytes_per_element"] for row in rows),
        "codegen_s": sum(row["build"]["seconds"] for row in rows),
        "device_ms": sum(milliseconds(moved(one)) for one in launched) + milliseconds(0, eager.operations.total()),
        "of_kernels": rows,
    }


def params_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype, ranks: int) -> list[Tensor]:
    """With gradients; of several ranks, that of the first, whose group is a fake that adds nothing up."""
    made = [[torch.empty(shape, dtype=dtype) for _ in range(2)] for shape in pieces_of(shapes, ranks)]
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        Exchange.found = lambda self: None  # or ranks would seem to disagree
        mesh = init_device_mesh("cpu", (ranks,))
        for of, shape in zip(made, map(torch.Size, shapes), strict=True):
            whole = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
            of[:] = [DTensor.from_local(piece, mesh, [Shard(0)], run_check=False, **whole) for piece in of]
    for param, grad in made:
        param.requires_grad_().grad = grad
    return [param for param, _ in made]


class Built(NamedTuple):
    """A kernel as built for some types and constants."""

    seconds: float
    registers: int
    stack: int  # bytes of a thread that did not fit in registers
    wide_loads: int  # from memory, of 128 bits


def build(launched: Launched) -> Built:
    """Build the kernel of a launch, whose arguments are tensors, or None, and whose constants have names."""
    kernel, constants = launched.kernel, launched.constants
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    fixed = {name: x for name, x in constants.items() if name in names}
    aligned = {}
    for i, (name, x) in enumerate(zip(names, launched.arguments, strict=False)):
        if isinstance(x, Tensor):
            signature[name], aligned[(i,)] = mangle_type(x), [["tt.divisibility", 16]]
        else:
            fixed[name] = x
    start, options = time.perf_counter(), {"num_warps": constants["num_warps"]}
    built = triton.compile(ASTSource(kernel, signature, fixed, aligned), target=TARGET, options=options)
    return _read(built.asm["cubin"], time.perf_counter() - start)


def _read(cubin: bytes, seconds: float) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[TOOLS / "cuobjdump", "-res-usage", file.name], [TOOLS / "nvdisasm", "-c", file.name]]
        resources, code = (subprocess.run(of, capture_output=True, text=True, check=True).stdout for of in commands)
    ((registers, stack),) = RESOURCES.findall(resources)
    wide = sum(x.startswith("LDG") and ".128" in x for x in INSTRUCTION.findall(code))
    return Built(seconds, int(registers), int(stack), wide)
