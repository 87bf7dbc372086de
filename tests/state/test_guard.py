"""What tells that tensors are as they were, by torch's guards and without them."""

import pytest
import torch

from adafactor_compiled import Adafactor
from adafactor_compiled._state import guard
from adafactor_compiled._state.guard import Guard

OTHERS = {
    "dtype": lambda x: x.double(),
    "shape": lambda x: x[:3],
    "strides": lambda x: x.t().contiguous().t(),
    "dimensions": lambda x: x.view(2, 2, 4),
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
    "class": lambda x: torch.nn.Parameter(x),
    "negative bit": torch._neg_view,
    "no tensor": lambda x: x.tolist(),
    "none": lambda _: None,
}


@pytest.fixture(params=["of torch", "in Python"], autouse=True)
def guards(request, monkeypatch):
    if request.param == "in Python":
        monkeypatch.setattr(guard, "TensorGuards", None)
    else:
        assert guard.TensorGuards is not None


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_differs(name, at):
    tensors = [torch.randn(4, 4), torch.randn(4, 4)]
    kept = Guard(tensors)
    assert kept.holds([x.clone() for x in tensors])
    other = list(tensors)
    other[at] = OTHERS[name](tensors[at])
    assert not kept.holds(other)
    assert kept.holds(tensors)


@torch.no_grad()
def test_number_of_tensors():
    kept = Guard([torch.zeros(2), torch.zeros(2)])
    assert not kept.holds([torch.zeros(2)])
    assert not kept.holds([torch.zeros(2) for _ in range(3)])
    assert Guard([]).holds([])


@torch.no_grad()
def test_inference_mode():
    with torch.inference_mode():
        left = torch.zeros(3)
        assert not Guard([torch.zeros(3)]).holds([torch.zeros(4)])
    kept = Guard([torch.zeros(3)])
    assert not kept.holds([left])
    with torch.inference_mode():
        assert not kept.holds([torch.zeros(3)])


@pytest.mark.parametrize("flags", [{"fused": True}, {"compile": False}], ids=str)
def test_steps(flags):
    """Parameters and state that are put in the place of others between steps are seen by either."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5))]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer, reference = Adafactor(params, **flags), Adafactor(others, foreach=False)
    for step in range(4):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 2:
            params[0].data = params[0].detach().t().contiguous().t()
            state = optimizer.state[params[1]]
            state["exp_avg_sq"] = state["exp_avg_sq"].to(torch.float64)
        optimizer.step()
        reference.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
