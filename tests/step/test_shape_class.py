"""Grouping into shape classes: a pure function that loses, doubles and reorders nothing, and a plan that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Problem, problems

from adafactor_compiled import Adafactor
from adafactor_compiled._state.entries import Entry, entries_of
from adafactor_compiled._state.layout import group_by_key
from adafactor_compiled._state.shape_class import class_of as class_of_entry
from adafactor_compiled._state.views import with_dims_last
from adafactor_compiled._step.plan import plan_of


@settings(max_examples=200)
@given(keys=st.lists(st.integers(0, 5)))
def test_grouping_keeps_each_position_once_and_in_order(keys: list[int]) -> None:
    classes = group_by_key(keys)
    assert sorted(i for positions in classes.values() for i in positions) == list(range(len(keys)))
    for key, positions in classes.items():
        assert positions == sorted(positions)
        assert all(keys[i] == key for i in positions)
    assert list(classes) == list(dict.fromkeys(keys))
    assert group_by_key(keys) == classes


def test_a_class_is_what_a_graph_depends_on() -> None:
    group = Adafactor([torch.zeros(1)]).param_groups[0]

    def class_of(shape: tuple[int, ...] = (4, 6), options: dict[str, Any] | None = None, **like: Any) -> Any:
        p = torch.zeros(shape, **like)
        return class_of_entry(Entry(0, p, torch.zeros_like(p), {}, {**group, **(options or {})}))

    p = torch.zeros(4, 6)
    transposed = p.mT.contiguous().mT
    assert class_of() == class_of()
    others = [
        class_of((6, 4)),
        class_of(dtype=torch.float64),
        class_of(options={"beta1": 0.9}),
        class_of(options={"beta1": 0.9, "momentum_dtype": torch.bfloat16}),
        class_of(options={"beta1": 0.9, "cautious": True}),
        class_of(options={"min_dim_size_to_factor": 5}),
        class_of(options={"stochastic_rounding": True}, dtype=torch.bfloat16),
        class_of(dtype=torch.bfloat16),
        class_of(device="meta"),
        class_of_entry(Entry(0, p, transposed, {}, group)),
        class_of_entry(Entry(0, p, p.double(), {}, group)),
        class_of_entry(Entry(0, transposed, p, {}, group)),
    ]
    assert len({class_of(), *others}) == 1 + len(others)
    numbers = {"lr": 0.5, "relative_step": False, "beta2_cap": 0.9, "decay_offset": 3, "weight_decay_scale": "none"}
    assert class_of(options=numbers) == class_of()


@settings(max_examples=60)
@given(problem=problems())
def test_plan_covers_each_gradient_once(problem: Problem) -> None:
    groups = problem.param_groups()
    optimizer = Adafactor(groups)
    problem.set_gradients(groups, 0)
    entries = entries_of(optimizer.param_groups, optimizer.state)
    params = [p for group in groups for p in group["params"]]
    assert [e.position for e in entries] == [i for i, p in enumerate(params) if p.grad is not None]
    assert all(e.param is params[e.position] and e.grad is e.param.grad for e in entries)
    plan = plan_of(entries, None)
    assert sorted(i for part in plan.parts for i in part.positions) == list(range(len(entries)))
    seen = [with_dims_last(x) for x in entries]
    for part in plan.parts:
        for i in part.positions:
            assert part.shape_class == class_of_entry(seen[i])


def make_optimizer() -> tuple[list[torch.Tensor], Adafactor]:
    params = [torch.ones(4, 6, requires_grad=True) for _ in range(3)] + [torch.ones(5, requires_grad=True)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    return params, Adafactor(groups, lr=torch.tensor(1e-3), relative_step=False, compile=False)


def step(params: list[torch.Tensor], optimizer: Adafactor) -> Any:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer._stepper._plans[None]


def test_members_of_different_groups_share_a_class() -> None:
    params, optimizer = make_optimizer()
    assert [part.positions for part in step(params, optimizer).parts] == [[0, 1, 2], [3]]


def test_where_nothing_is_compiled_a_class_is_one_part() -> None:
    params = [torch.ones(4, 6, requires_grad=True) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Adafactor([{"params": params[::2], "foreach": True}, {"params": params[1::2], "compile": False}])
    plan = plan_of(entries_of(optimizer.param_groups, optimizer.state), None)
    assert [(part.path, part.positions) for part in plan.parts] == [("compiled", [0, 1]), ("multi_tensor", [2, 3])]
    assert [part.positions for part in plan.eager(compiles=True)] == [[2, 3]]
    assert [part.positions for part in plan.eager(compiles=False)] == [[0, 1, 2, 3]]


# Numbers are data: none of these is a reason to group again.
KEEPS: dict[str, Any] = {
    "lr": 5e-4,
    "eps": (1e-12, 1e-2),
    "clip_threshold": None,
    "decay_rate": -0.5,
    "weight_decay": 0.5,
    "scale_parameter": False,
    "maximize": True,
}
REDOES: dict[str, Any] = {"beta1": 0.9, "foreach": False, "capturable": True}


@pytest.mark.parametrize("option", [*KEEPS, *REDOES])
def test_plan_is_kept_unless_an_option_changes_the_graph(option: str) -> None:
    params, optimizer = make_optimizer()
    plan = step(params, optimizer)
    assert step(params, optimizer) is plan
    optimizer.param_groups[0][option] = (KEEPS | REDOES)[option]
    assert (step(params, optimizer) is plan) == (option in KEEPS)


def test_plan_is_redone_when_the_parameters_change() -> None:
    params, optimizer = make_optimizer()
    plan = step(params, optimizer)
    params[3].grad = None
    optimizer.step()
    assert optimizer._stepper._plans[None] is not plan
    plan = step(params, optimizer)
    params.append(torch.ones(2, 2, requires_grad=True))
    optimizer.add_param_group({"params": params[-1:]})
    assert step(params, optimizer) is not plan
    plan = optimizer._stepper._plans[None]
    optimizer.load_state_dict(optimizer.state_dict())
    assert step(params, optimizer) is not plan
    plan = optimizer._stepper._plans[None]
    params[0].data = params[0].data.double()
    params[0].grad = None
    assert step(params, optimizer) is not plan


@pytest.mark.parametrize(
    "grad",
    [torch.ones(6, 4).mT, torch.ones(4, 7)[:, :6]],
    ids=["transposed", "strided"],
)
def test_plan_is_redone_when_a_gradient_lies_otherwise(grad: torch.Tensor) -> None:
    params, optimizer = make_optimizer()
    plan = step(params, optimizer)
    params[0].grad = grad
    optimizer.step()
    assert optimizer._stepper._plans[None] is not plan


def test_gradient_that_does_not_fit_is_refused_after_ones_that_did() -> None:
    params, optimizer = make_optimizer()
    step(params, optimizer)
    before = [p.detach().clone() for p in params]
    params[1].data = torch.ones(6, 4)
    with pytest.raises(RuntimeError, match="should have its shape"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip([params[0], *params[2:]], [before[0], *before[2:]], strict=True))
