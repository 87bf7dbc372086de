"""The multi-tensor step as it runs on a GPU, here on a CPU: the memory that it takes for itself, and its launches."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adafactor_compiled import Adafactor
from adafactor_compiled._update import members

SHAPES = {"matrices": (96, 64), "vectors": (6144,), "3 x 3 kernels": (64, 16, 3, 3)}


class Memory(TorchDispatchMode):
    """Counts operations, and the most bytes that tensors made under it take at a time."""

    def __init__(self):
        super().__init__()
        self.made, self.peak, self.operations = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or function._schema.is_mutable):
            self.operations += 1
            self.made = [ref for ref in self.made if ref() is not None]
            self.made += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.peak = max(self.peak, sum(x.nbytes for ref in self.made if (x := ref()) is not None))
        return result


def memory_of(monkeypatch, shape, dtype, k, **options):
    monkeypatch.setattr(members, "IN_CACHE", 2**62)
    monkeypatch.setattr(members, "FEW", 0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(k)]
    for p in params:
        p.grad = torch.randn(shape).to(dtype)
    optimizer = Adafactor(params, compile=False, **options)
    optimizer.step()
    with Memory():  # of a step in a mode there is another plan
        optimizer.step()
    with Memory() as memory:
        optimizer.step()
    return memory, sum(p.nbytes for p in params)


@pytest.mark.parametrize("options", [{}, {"beta1": 0.9}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_temporaries_take_twice_the_parameters_at_most(monkeypatch, shape, dtype, options):
    memory, size = memory_of(monkeypatch, shape, dtype, 24, **options)
    factors = 0.9 if len(shape) == 4 else 0.05  # rows and columns of kernels are no small things
    factors += 0.1 * bool(options.get("stochastic_rounding"))  # one of the 24 after the other
    assert 0.5 * size < memory.peak <= (2 + factors) * size


@pytest.mark.parametrize("shape", [SHAPES["vectors"], (64, 32)], ids=str)
def test_operations_do_not_grow_with_members(monkeypatch, shape):
    few, _ = memory_of(monkeypatch, shape, torch.float32, 4)
    many, _ = memory_of(monkeypatch, shape, torch.float32, 40)
    by_member = 4 * 36 if len(shape) > 1 else 0  # the means of rows and columns, of which there is no multi-tensor operation
    assert many.operations <= few.operations + by_member
