"""The fused step as an operator: what torch checks of one, and what a compiled loop makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from adafactor_compiled import Adafactor
from adafactor_compiled._update.numbers import Numbers, plain_numbers
from adafactor_compiled._update.rounding import DRAWS


def arguments(dtype: torch.dtype, momentum: bool, rounding: bool) -> tuple[Any, ...]:
    shapes = [(6, 8), (9, 7), (5,), (2, 3, 3, 3)]
    group = Adafactor([torch.ones(1)], lr=1e-2, relative_step=False).param_groups[0]
    params = [torch.ones(shape, dtype=dtype) for shape in shapes]
    factored = [len(shape) > 1 for shape in shapes]
    return (
        params,
        [torch.full(shape, 0.1, dtype=dtype) for shape in shapes],
        [torch.zeros(shape[:-1] if f else shape) for shape, f in zip(shapes, factored, strict=True)],
        [torch.zeros(shape[:-2] + shape[-1:]) for shape, f in zip(shapes, factored, strict=True) if f],
        [torch.zeros(shape) for shape in shapes] if momentum else [],
        [torch.zeros(()) for _ in shapes],
        torch.tensor([plain_numbers(group, 1)] * len(shapes)).view(len(shapes), len(Numbers._fields)),
        torch.zeros(len(shapes), DRAWS, dtype=torch.int32) if rounding else None,
        factored,
        False,
    )


@pytest.mark.parametrize(
    ("dtype", "momentum", "rounding"), [(torch.float32, False, False), (torch.bfloat16, True, True)], ids=str
)
def test_opcheck(dtype: torch.dtype, momentum: bool, rounding: bool) -> None:
    torch.library.opcheck(torch.ops.adafactor_compiled.step.default, arguments(dtype, momentum, rounding))


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}], ids=str)
def test_a_compiled_step_is_one_node_without_copies(options: dict[str, Any]) -> None:
    """The generated code: one call of the operator on the parameters themselves, whatever their number."""
    counts = []
    for k in (2, 12):
        params = [torch.nn.Parameter(torch.randn(33, 17)) for _ in range(k)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = Adafactor(params, lr=1e-3, relative_step=False, fused=True, capturable=True, **options)
        torch._dynamo.reset()
        _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
        assert code.count("torch.ops.adafactor_compiled.step.default(") == 1
        sizes = [line for line in code.splitlines() if "empty_strided" in line and "(33, 17)" in line]
        assert not sizes, "parameters or momenta were copied"
        counts.append(code.count("cpp_fused_"))
    assert counts[0] == counts[1], "what is compiled grows with the number of parameters"


def test_what_kernels_do_not_take_steps_by_operations() -> None:
    """A gradient that is laid out otherwise than when the graph was made, for example."""
    with_kernels, by_operations = (arguments(torch.float32, True, False) for _ in range(2))
    by_operations[1][0] = by_operations[1][0].mT.contiguous().mT
    for of in (with_kernels, by_operations):
        torch.ops.adafactor_compiled.step(*of)
    for x, y in zip(with_kernels[:6], by_operations[:6], strict=True):
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a, b)
