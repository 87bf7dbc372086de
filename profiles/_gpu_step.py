"""The launches of a step of parameters that are said to be on a GPU. gpu_kernels.py runs this in a process of its own:

    python profiles/_gpu_step.py '{"shapes": [[768, 3072], [768]], "dtype": "float32", "beta1": null}'

It prints one line of JSON. The optimizer, its plan, `warm_up` and the step are the package's own; the parameters are on the
CPU, without values, and in place of a kernel a recorder notes its launches. Nothing needs a GPU, and nothing is computed.
"""

from __future__ import annotations

import collections
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _triton_build import build
from gpu_kernels import milliseconds, pieces_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from adafactor_compiled import Adafactor
from adafactor_compiled._fused.gpu import layout, steps
from adafactor_compiled._fused.pieces import COLUMNS, ROWS, STATISTICS
from adafactor_compiled._sharded.exchange import Exchange

OF_MATRICES = ["matrix_statistics", "matrix_columns", "apply_matrix"]
OF_MEMBERS = ["put", "column_means", "finish"]  # of a few numbers
KERNELS = [*OF_MATRICES, "step_vectors", "step_slices", *OF_MEMBERS]
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


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """From now on parameters on a CPU count as on a GPU, and what would be launched is noted."""
    launched: list[Launched] = []
    before, is_gpu = {name: getattr(steps, name) for name in KERNELS}, layout.is_gpu
    layout.is_gpu = lambda device: True
    for name, kernel in before.items():
        setattr(steps, name, Recorder(kernel, launched))
    layout.kernels_of.cache_clear()
    try:
        yield launched
    finally:
        layout.is_gpu = is_gpu
        for name, kernel in before.items():
            setattr(steps, name, kernel)
        layout.kernels_of.cache_clear()


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


def record(case: dict[str, Any]) -> dict[str, Any]:
    dtype, options = getattr(torch, case["dtype"]), dict(case.get("options", {}))
    if "momentum_dtype" in options:
        options["momentum_dtype"] = getattr(torch, options["momentum_dtype"])
    with recorded() as launched:
        params = params_of(case["shapes"], dtype, case.get("ranks", 1))
        optimizer = Adafactor(params, beta1=case["beta1"], fused=True, **options)
        optimizer.warm_up()
        ahead = {variant_of(x) for x in launched}
        optimizer.step()  # makes what later ones keep
        launched.clear()
        with Eager() as eager:
            optimizer.step()
    elements = sum(math.prod(shape) for shape in pieces_of(case["shapes"], case.get("ranks", 1)))
    of_kernels: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in launched:
        of = of_kernels.setdefault(variant_of(one), {"kernel": one, "launches": 0, "bytes": 0.0})
        of["launches"] += 1
        of["bytes"] += moved(one)
    rows = [described(of, elements) for of in of_kernels.values()]
    return {
        "graphs": len(ahead),
        "graphs_in_steps": len(set(of_kernels) - ahead),
        "triton_launches": len(launched),
        "aten_launches": eager.operations.total(),
        "of_aten": eager.operations,
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
        made = [[_shared(x, shape, mesh) for x in of] for of, shape in zip(made, shapes, strict=True)]
    for param, grad in made:
        param.requires_grad_().grad = grad
    return [param for param, _ in made]


def _shared(piece: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> Tensor:
    whole = torch.Size(shape)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(piece, mesh, [Shard(0)], run_check=False, shape=whole, stride=stride)


def described(of: dict[str, Any], elements: int) -> dict[str, Any]:
    one: Launched = of["kernel"]
    built = build(one.kernel, one.arguments, one.constants)
    shown = {name: x if isinstance(x, (bool, int)) else str(x) for name, x in one.constants.items()}
    return {
        "name": one.kernel.fn.__name__,
        "launches": of["launches"],
        "bytes_per_element": of["bytes"] / elements,
        "constants": shown,
        "build": built._asdict(),
    }


if __name__ == "__main__":
    print(json.dumps(record(json.loads(sys.argv[1]))))
