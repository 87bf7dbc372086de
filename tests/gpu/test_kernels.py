"""The kernels of a GPU against the reference path, in Triton's interpreter, with each access checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from against_reference import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, check_against_reference, problem_of
from compilers import compiled_by, uncompiled
from hypothesis import HealthCheck, given, settings
from interpreter import Memory, said_to_be_moved
from strategies import Group, Parameter, Problem, problems
from torch import Tensor

from adafactor_compiled import Adafactor
from adafactor_compiled._fused.forms import MATRICES, SLICES
from adafactor_compiled._fused.gpu import launches, layout
from adafactor_compiled._fused.gpu.layout import SHORT, VECTORS

COMMON = settings(max_examples=25, suppress_health_check=[*HealthCheck])  # one fixture for all examples, which keep nothing


@pytest.fixture
def all_swapped(on_gpu: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All matrices count as wide."""
    monkeypatch.setattr(layout, "WIDE", 0)


def kinds_of(optimizer: Adafactor) -> set[str]:
    plan = optimizer._stepper._plans[None]
    assert not plan.calls
    return {launch.kernels.kind for launch in plan.table.launches}


@COMMON
@given(problem=problems())
def test_drawn_problems(on_gpu: Memory, problem: Problem) -> None:
    on_gpu.forget()
    with compiled_by(uncompiled):
        check_against_reference(problem, "kernels", fused=True)


@COMMON
@given(problem=problems())
def test_drawn_problems_in_parts(on_gpu: Memory, in_parts: None, problem: Problem) -> None:
    on_gpu.forget()
    with compiled_by(uncompiled):
        check_against_reference(problem, "kernels, in parts")


MATRICES_OF = [(70, 48), (33, 20), (3, 1500), (130, 16), (64, 64), (2, 40, 24), (6, 4, 3, 3), (6, 4, 1, 1)]
SHAPES = [*MATRICES_OF, (5000,), (1024,), (31,), ()]
WITH = {
    "plain": {},
    "momentum and decay": {"beta1": 0.9, "weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1, "weight_decay_scale": "none"},
    "a rate of its own": {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "clip_threshold": None},
    "cautious": {"beta1": 0.9, "cautious": True},
    "skips": {"nonfinite": "skip"},
}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("options", WITH.values(), ids=WITH)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_options(on_gpu: Memory, dtype: torch.dtype, options: dict[str, Any], layout: str) -> None:
    shapes = SHAPES if layout == "contiguous" else MATRICES_OF
    check_against_reference(problem_of(*shapes, dtype=dtype, layout=layout, **options), "kernels", steps=2, fused=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_matrices_that_step_as_their_transposes(on_gpu: Memory, all_swapped: None, layout: str) -> None:
    problem = problem_of(*MATRICES_OF, layout=layout, beta1=0.9, cautious=True)
    check_against_reference(problem, "kernels", steps=2, fused=True)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 3, 5, 7), (4, 8, 7, 7)])
def test_channels_last(on_gpu: Memory, shape: tuple[int, ...]) -> None:
    problem = problem_of(shape, layout="channels_last", beta1=0.9)
    check_against_reference(problem, "kernels", fused=True)


@pytest.mark.parametrize(
    ("dtype", "momentum"),
    [
        (BFLOAT16, {}),
        (BFLOAT16, {"beta1": 0.9}),
        (FLOAT16, {"beta1": 0.9, "momentum_dtype": BFLOAT16}),
        (FLOAT32, {"beta1": 0.9, "momentum_dtype": BFLOAT16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "swapped"])
def test_stochastic_rounding_draws_as_on_the_other_paths(
    on_gpu: Memory, request: pytest.FixtureRequest, dtype: torch.dtype, momentum: dict[str, Any], layout: str
) -> None:
    """Nearly all elements are the same bits: the others were next to where the noise decides."""
    shapes = SHAPES if layout == "contiguous" else MATRICES_OF
    if layout == "swapped":
        request.getfixturevalue("all_swapped")
        layout = "contiguous"
    generator = torch.Generator().manual_seed(0)
    options = {"stochastic_rounding": True, "weight_decay": 0.1, **momentum}
    both = []
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    for path in ({"fused": True}, {"foreach": False}):
        params = [Parameter(x.shape, dtype, layout, dtype, ()).make(generator) for x in values]
        for param, x in zip(params, values, strict=True):
            param.data.copy_(x)
        optimizer = Adafactor(params, **options, **path)
        for of_step in gradients:
            for param, x in zip(params, of_step, strict=True):
                param.grad = torch.empty_like(param).copy_(x)
            optimizer.step()
        momenta = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
        both.append([x for x in (*params, *momenta) if x.dtype in (BFLOAT16, FLOAT16)])
    assert both[0]
    for p, q in zip(*both, strict=True):
        assert (p != q).sum() <= 2 + p.numel() // 2000, tuple(p.shape)


@pytest.mark.parametrize("path", [{}, {"fused": True}], ids=str)
def test_every_kind_of_launch(on_gpu: Memory, path: dict[str, Any]) -> None:
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    optimizer = Adafactor(params, **path)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert kinds_of(optimizer) == {MATRICES, SHORT, SLICES, VECTORS}
    assert {part.path for part in optimizer._stepper._plans[None].parts} == {"fused"}
    assert all(line.path == "fused" and line.compiled for line in optimizer.summary().classes)
    assert on_gpu.accesses


@pytest.mark.parametrize("forgotten", ["param", "gradient", "exp_avg_sq_row"])
def test_accesses_are_checked(on_gpu: Memory, forgotten: str) -> None:
    param = torch.randn(8, 24).requires_grad_()
    optimizer = Adafactor([param], fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    left_out = {"param": param, "gradient": param.grad}.get(forgotten, optimizer.state[param].get(forgotten)).data_ptr()
    on_gpu.ranges = {span for span in on_gpu.ranges if span[0] != left_out}
    add = on_gpu.add
    on_gpu.add = lambda *tensors: add(*(x for x in tensors if x.data_ptr() != left_out))  # type: ignore[method-assign]
    with pytest.raises(Exception, match="memory that is not its own"):
        optimizer.step()


def test_members_of_several_groups_have_their_own_numbers(on_gpu: Memory) -> None:
    pattern = ("normal",)
    groups = [
        Group(
            {"lr": lr, "relative_step": False}, tuple(Parameter(s, FLOAT32, "contiguous", FLOAT32, pattern) for s in SHAPES[:3])
        )
        for lr in (1e-3, 3e-2)
    ]
    check_against_reference(Problem(tuple(groups), 0), "kernels", steps=2, fused=True)


@pytest.mark.parametrize("shape", [(64, 48), (64,), (5008,)])
def test_addresses_that_are_no_multiples_of_16(on_gpu: Memory, shape: tuple[int, ...]) -> None:
    """Views of flat buffers lie anywhere: 128 bits at a time would be an error of the GPU."""
    param = torch.randn(torch.Size(shape).numel() + 1)[1:].view(shape).requires_grad_()
    other = param.detach().clone().requires_grad_()
    optimizer, reference = Adafactor([param], fused=True), Adafactor([other], foreach=False)
    for p in (param, other):
        p.grad = torch.ones_like(p)
    optimizer.step()
    reference.step()
    torch.testing.assert_close(param, other)
    (launch,) = optimizer._stepper._plans[None].table.launches
    assert not launch.kernels.sixteens


@pytest.mark.parametrize("shape", [(64, 48), (64,), (5008,)])
def test_addresses_that_cease_to_be_multiples_of_16(
    on_gpu: Memory, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    run, aligned = launches._run, []
    monkeypatch.setattr(launches, "_run", lambda *x: (aligned.append(x[4]), run(*x)))
    param, flat = torch.randn(shape).requires_grad_(), torch.ones(torch.Size(shape).numel() + 1)
    optimizer = Adafactor([param], fused=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    (launch,) = optimizer._stepper._plans[None].table.launches
    assert launch.kernels.sixteens
    for of_param, expected in ((torch.ones(shape), True), (flat[1:].view(shape), False), (torch.ones(shape), True)):
        param.grad = of_param
        optimizer.step()
        assert aligned[-1] == expected
    assert (launch,) == tuple(optimizer._stepper._plans[None].table.launches)


def test_what_lies_elsewhere_is_found(on_gpu: Memory) -> None:
    """Gradients, parameters and states move between steps; what stays is not sent again."""
    param = torch.randn(8, 24).requires_grad_()
    optimizer = Adafactor([param], fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    (launch,) = optimizer._stepper._plans[None].table.launches
    pointers = launch.there.pointers
    optimizer.step()
    assert launch.there.pointers is pointers
    other = param.detach().clone().requires_grad_()
    reference = Adafactor([other], foreach=False)
    reference.load_state_dict(optimizer.state_dict())
    param.grad, other.grad = torch.ones_like(param), torch.ones_like(param)
    param.data = param.detach().clone()
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
        optimizer.state[param][key].set_(optimizer.state[param][key].clone())
    optimizer.step()
    reference.step()
    torch.testing.assert_close(param, other)
    assert launch.there.pointers is not pointers


def test_state_without_memory(on_gpu: Memory) -> None:
    param = torch.randn(8, 24).requires_grad_()
    optimizer = Adafactor([param], fused=True)
    param.grad = torch.randn_like(param)
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["exp_avg_sq_row"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"the state of parameter 0 .* has no memory; nothing was stepped"):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


def test_repeated_steps_give_the_same_bits(on_gpu: Memory) -> None:
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
        optimizer = Adafactor(params, fused=True, beta1=0.9)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_autograd_sees_what_a_step_writes(on_gpu: Memory) -> None:
    params = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    optimizer = Adafactor(params, fused=True, beta1=0.9)
    for param in params:
        param.grad = torch.randn_like(param)
    loss = (params[0] * params[0]).sum()
    before = [param._version for param in params]
    optimizer.step()
    assert all(param._version > version for param, version in zip(params, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_interrupted_step_says_who_was_stepped(on_gpu: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    from adafactor_compiled._fused.gpu import steps

    params = [torch.randn(shape).requires_grad_() for shape in [(8, 24), (31,)]]
    optimizer = Adafactor(params, fused=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()

    def fails_for_short_ones(of: Any, *arguments: Any) -> None:
        if of.kind == SHORT:
            raise KeyboardInterrupt
        step(of, *arguments)

    step = steps.step
    monkeypatch.setattr(steps, "step", fails_for_short_ones)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [2, 1]


@pytest.mark.parametrize("shape", [(300, 640), (40, 2048), (3000,), (9000,), (40, 30, 3, 3), (90, 60, 1, 1)], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_bytes_that_are_said_to_be_moved(
    on_gpu: Memory, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], momentum: float | None
) -> None:
    """What profiles/gpu_kernels.py counts is what kernels read and write, but for their tables."""
    param = torch.randn(shape).requires_grad_()
    optimizer = Adafactor([param], fused=True, beta1=momentum)
    param.grad = torch.randn_like(param)
    optimizer.step()
    said = said_to_be_moved(monkeypatch)
    on_gpu.bytes = 0
    optimizer.step()
    assert said() <= on_gpu.bytes <= 1.1 * said()


CHANGES = {
    "another dtype": lambda x: x.to(torch.bfloat16),
    "float64": lambda x: x.double(),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("key", ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg", "RMS"])
def test_state_that_was_changed_in_its_place(on_gpu: Memory, key: str, change: Any) -> None:
    """Kernels know addresses alone: a state of another dtype or stride is made to fit before they see it."""
    param = torch.randn(8, 24).requires_grad_()
    other = param.detach().clone().requires_grad_()
    optimizer, reference = Adafactor([param], fused=True, beta1=0.9), Adafactor([other], foreach=False, beta1=0.9)
    for p in (param, other):
        p.grad = torch.ones_like(p)
    for of in (optimizer, reference):
        of.step()
    value = reference.state[other][key]
    value.copy_(change(value))
    optimizer.state[param][key].data = change(optimizer.state[param][key])
    for of in (optimizer, reference):
        of.step()
    torch.testing.assert_close(param, other)
    assert optimizer.state[param][key].dtype is torch.float32


def test_what_is_sent_while_a_graph_is_captured_serves_no_other_step(on_gpu: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent when the graph is replayed, and not before: a step in between would read addresses that are not there."""
    param = torch.randn(8, 24).requires_grad_()
    optimizer = Adafactor([param], fused=True, capturable=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    (launch,) = optimizer._stepper._plans[None].table.launches
    known = launch.there.pointers
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(launches, "_captured", [])
    with monkeypatch.context() as patch:
        patch.setattr(launches, "_is_capturing", lambda device: True)
        optimizer.step()
        assert launches._captured[-1] == (launch.there.tables, known)
        param.grad = torch.full_like(param, 2.0)
        optimizer.step()
    *_, (tables, pointers), of_graph = launches._captured
    assert (tables, pointers) == (launch.there.tables, None)
    assert not torch.equal(of_graph, known)
    assert launch.there.pointers is known
    optimizer.step()
    assert launch.there.pointers is not of_graph
    assert torch.equal(launch.there.pointers, of_graph)  # the same addresses, sent again


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter is numpy's
@pytest.mark.parametrize("shape", [(40,), (5000,), (), (9, 4, 1, 1), (5000, 1, 1)], ids=str)
def test_a_square_that_overflows_spoils_no_vector(on_gpu: Memory, shape: tuple[int, ...]) -> None:
    """But what has rows: one that is infinite is divided by the average of all."""
    param = torch.ones(shape).requires_grad_()
    optimizer = Adafactor([param], fused=True)
    param.grad = torch.ones(shape)
    param.grad.view(-1)[0] = 1e30
    optimizer.step()
    assert (param.isnan() if len(shape) > 1 else param.isfinite()).all()


def test_a_row_without_gradient_beside_large_ones(on_gpu: Memory) -> None:
    """The ratio of the one to the others would underflow, and its root not be finite."""
    params = [torch.ones(shape).requires_grad_() for shape in [(4, 2, 3, 3), (2, 40, 48)]]
    for param in params:
        param.grad = torch.full_like(param, 1e8)
        param.grad[..., 0, :] = 0
    Adafactor(params, fused=True).step()
    assert all(param.isfinite().all() for param in params)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter is numpy's
def test_a_gradient_that_is_not_finite_is_undone(on_gpu: Memory) -> None:
    """Kernels of a GPU look at nothing before they write; also where the option was set between two steps."""
    params = [torch.randn(shape).requires_grad_() for shape in [(8, 24), (31,)]]
    optimizer = Adafactor(params, fused=True)
    for bad in (False, True, True, False):
        for param in params:
            param.grad = torch.ones_like(param)
        if bad:
            optimizer.param_groups[0]["nonfinite"] = "skip"
            params[0].grad[0, 0] = torch.inf
        before = [[param.detach().clone(), *map(torch.as_tensor, optimizer.state[param].values())] for param in params]
        before = [[x.clone() for x in of] for of in before]
        optimizer.step()
        for i, param in enumerate(params):
            skipped, now = bad and i == 0, [param, *map(torch.as_tensor, optimizer.state[param].values())]
            assert all(torch.equal(x, y) for x, y in zip(before[i], now, strict=True)) == skipped
        assert [x.skipped for x in optimizer.telemetry()] == [bad / 2]


@pytest.mark.parametrize("overflows", [False, True])
def test_what_a_grad_scaler_hands_over(on_gpu: Memory, overflows: bool) -> None:
    """Gradients are float32 then, and of float16 parameters; an overflow is undone on the device."""
    params = [torch.randn(shape).half().requires_grad_() for shape in [(64, 48), (31,), (6, 4, 3, 3)]]
    others = [param.detach().clone().requires_grad_() for param in params]
    optimizer, reference = Adafactor(params, fused=True, capturable=True), Adafactor(others, foreach=False)
    for step in range(2):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * 8
        undone = overflows and step == 1
        before = [param.detach().clone() for param in params]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(undone))
        optimizer.step()
        reference.step()
        assert kinds_of(optimizer) == {MATRICES, SHORT, SLICES}
        for p, q, old in zip(params, others, before, strict=True):
            torch.testing.assert_close(p, old if undone else q, rtol=2e-3, atol=2e-3)
            assert optimizer.state[p]["step"] == (1 if undone else step + 1)


def test_members_that_take_turns(on_gpu: Memory) -> None:
    """As experts do: as many as in the last step, and others."""
    params = [torch.randn(8, 24).requires_grad_() for _ in range(3)]
    others = [param.detach().clone().requires_grad_() for param in params]
    optimizer, reference = Adafactor(params), Adafactor(others, foreach=False)
    for without in (None, 0, 1, 2, 0, 1):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = None if i == without else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_launches_share_the_numbers_of_a_step(on_gpu: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, run = [], launches._run
    monkeypatch.setattr(launches, "_run", lambda *x: (numbers.append(x[5]), run(*x)))
    params = [torch.ones(shape, dtype=dtype).requires_grad_() for shape in [(8, 24), (31,)] for dtype in (FLOAT32, FLOAT64)]
    optimizer = Adafactor(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        numbers.clear()  # also of what was tried out in the first step
        optimizer.step()
    assert len(numbers) == 4
    assert len(set(map(id, numbers))) == 2
