"""State and checkpoints: to and from transformers in the middle of training, and across every way to run a step."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from parameters import parameters, params_of, set_gradients
from paths import PATHS
from strategies import Problem, problems
from tolerances import assert_same_parameter, assert_same_state, largest
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers.optimization import Adafactor as TransformersAdafactor

from adafactor_compiled import Adafactor
from adafactor_compiled._state.options import OPTIONS

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
UNCOMPILED = [path for path in PATHS if path != "compiled"]


def run(problem: Problem, groups: list[dict[str, Any]], optimizer: Any, steps: range) -> None:
    for t in steps:
        problem.set_gradients(groups, t)
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def check_hand_over(problem: Problem, first: Any, second: Any) -> None:
    """Half of the training with the first class, half with the second, against all of it with the first."""
    whole, start, rest = problem.param_groups(), problem.param_groups(), problem.param_groups()
    expected, saved, loaded = first(whole), first(start), second(rest)
    scales = [largest(p) for p in params_of(whole)]
    run(problem, whole, expected, range(3))
    scales = [max(s, largest(p)) for s, p in zip(scales, params_of(whole), strict=True)]
    run(problem, whole, expected, range(3, 6))
    run(problem, start, saved, range(3))
    with torch.no_grad():
        for p, q in zip(params_of(rest), params_of(start), strict=True):
            p.copy_(q)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    run(problem, rest, loaded, range(3, 6))
    for p, q, scale in zip(params_of(rest), params_of(whole), scales, strict=True):
        assert_same_parameter(p, q, "after a checkpoint", scale)
        if expected.state[q] and loaded.state[p]:
            assert_same_state(loaded.state[p], expected.state[q], p.dtype)


@pytest.mark.parametrize("path", ["reference", "multi-tensor"])
def test_from_transformers(path: str) -> None:
    @settings(max_examples=25)
    @given(problem=problems(ours=False, max_params=3))
    def check(problem: Problem) -> None:
        check_hand_over(problem, TransformersAdafactor, lambda groups: Adafactor(groups, **PATHS[path]))

    check()


@settings(max_examples=25)
@given(problem=problems(dtypes=FLOATS, ours=False, max_params=3))  # transformers rounds the state of others when it loads
def test_to_transformers(problem: Problem) -> None:
    check_hand_over(problem, lambda groups: Adafactor(groups, foreach=False), TransformersAdafactor)


@settings(max_examples=25)
@given(problem=problems(max_params=3))
def test_to_itself(problem: Problem) -> None:
    check_hand_over(problem, lambda groups: Adafactor(groups, compile=False), lambda groups: Adafactor(groups, compile=False))


def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Adafactor]:
    params = parameters([(6, 8), (4, 6), (7,), (), (0,)], dtype)
    return params, Adafactor(params, **options)


def step(params: list[Tensor], optimizer: Any, seed: int = 1) -> None:
    set_gradients(params, seed)
    optimizer.step()


def assert_equal_trees(first: Any, second: Any) -> None:
    flat, spec = torch.utils._pytree.tree_flatten(first)
    other, other_spec = torch.utils._pytree.tree_flatten(second)
    assert spec == other_spec
    for a, b in zip(flat, other, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b or (a != a and b != b)


MODES = [(path, capturable) for path in PATHS for capturable in (False, True)]


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(MODES, MODES)), ids=str)
def test_another_way_to_run(saved: tuple[str, bool], loaded: tuple[str, bool]) -> None:
    """How a step runs is chosen anew when a checkpoint is loaded; what it computes goes on."""
    (params, before), (others, after) = (make(capturable=c, **PATHS[path]) for path, c in (saved, loaded))
    twins, reference = make(foreach=False)
    step(params, before)
    step(twins, reference)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    step(others, after, seed=2)
    step(twins, reference, seed=2)
    assert all(isinstance(after.state[p]["step"], Tensor) == loaded[1] for p in others)
    for p, q in zip(others, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert_same_state({**after.state[p], "step": int(after.state[p]["step"])}, reference.state[q], p.dtype)


@pytest.mark.parametrize("capturable", [False, True])
def test_what_is_saved_is_what_transformers_saves(capturable: bool) -> None:
    params, optimizer = make(beta1=0.9, compile=False, capturable=capturable)
    theirs = TransformersAdafactor([p.detach().clone().requires_grad_() for p in params], beta1=0.9)
    step(params, optimizer)
    step(theirs.param_groups[0]["params"], theirs)
    ours, expected = optimizer.state_dict(), theirs.state_dict()
    assert ours["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert ours["state"][index].keys() == state.keys()
        assert type(ours["state"][index]["step"]) is int
        for key in state.keys() - {"step"}:
            assert ours["state"][index][key].shape == state[key].shape
            assert ours["state"][index][key].dtype == state[key].dtype
    assert ours["param_groups"][0].items() >= expected["param_groups"][0].items()


def test_empty_and_untouched_parameters_load() -> None:
    """The RMS of no elements is NaN, in transformers too; and state exists before the first gradient."""
    params, optimizer = make(compile=False)
    optimizer.load_state_dict(optimizer.state_dict())
    step(params, optimizer)
    assert optimizer.state[params[-1]]["RMS"].isnan()
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    step(params, optimizer)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_keeps_float32_state(dtype: torch.dtype) -> None:
    params, optimizer = make(dtype, beta1=0.9, compile=False)
    step(params, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    others, other = make(dtype, beta1=0.9, compile=False)
    other.load_state_dict(before)
    assert_equal_trees(other.state_dict()["state"], before["state"])
    assert all(x.dtype == torch.float32 for p in others for x in other.state[p].values() if isinstance(x, Tensor))


def test_loaded_state_never_aliases_its_source() -> None:
    params, optimizer = make(beta1=0.9, compile=False, lr=torch.tensor(1e-2), relative_step=False)
    step(params, optimizer)
    others, other = make(beta1=0.9, compile=False, lr=torch.tensor(1e-2), relative_step=False)
    source = optimizer.state_dict()
    before = copy.deepcopy(source)
    other.load_state_dict(source)
    step(others, other, seed=2)
    other.param_groups[0]["lr"].fill_(1.0)
    assert_equal_trees(source, before)
    assert_equal_trees(optimizer.state_dict(), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("path", PATHS)
def test_copies_go_on_alike(path: str, copied: Any) -> None:
    params, optimizer = make(**PATHS[path])
    step(params, optimizer)
    twin = copied(optimizer)
    others = twin.param_groups[0]["params"]
    step(params, optimizer, seed=2)
    step(others, twin, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert_equal_trees(twin.state_dict(), optimizer.state_dict())
    assert repr(twin) == repr(optimizer)


@pytest.mark.parametrize("path", PATHS)
def test_pickled_before_an_option_existed(path: str) -> None:
    params, optimizer = make(**PATHS[path])
    step(params, optimizer)
    old = copy.deepcopy(optimizer)
    for group in (old.defaults, *old.param_groups):
        for name in OPTIONS.keys() - inspect.signature(TransformersAdafactor).parameters.keys() - PATHS[path].keys():
            del group[name]
    del old.show_progress
    twin = pickle.loads(pickle.dumps(old))
    assert twin.defaults.items() >= optimizer.defaults.items()
    others = twin.param_groups[0]["params"]
    step(params, optimizer, seed=2)
    step(others, twin, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    twin.add_param_group({"params": parameters([(3,)])})


@pytest.mark.parametrize("path", PATHS)
def test_momentum_that_is_turned_on_later_starts_from_zero(path: str) -> None:
    params, optimizer = make(lr=1e-2, relative_step=False, **PATHS[path])
    step(params, optimizer)
    optimizer.param_groups[0]["beta1"] = 0.5
    twins, plain = make(lr=1e-2, relative_step=False, foreach=False)
    step(twins, plain)
    before = [p.detach().clone() for p in params]
    step(params, optimizer, seed=2)
    step(twins, plain, seed=2)
    for p, q, b in zip(params, twins, before, strict=True):
        torch.testing.assert_close(b - p, 0.5 * (b - q), rtol=1e-4, atol=1e-6)
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_hooks_of_users_see_and_replace_what_is_loaded() -> None:
    params, optimizer = make(compile=False)
    step(params, optimizer)
    seen = []

    def replace(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "weight_decay": 0.25} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    others, other = make(compile=False)
    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[others[0]]["RMS"])))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["weight_decay"] == 0.25
    assert seen == [float(optimizer.state[params[0]]["RMS"])]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_parameters_put_into_a_group_by_hand_are_saved_and_loaded(path: str, full: bool) -> None:
    """accelerate and Trainer put DTensors there; torch.distributed.checkpoint then finds state, that of the first ones."""
    models, optimizers = [nn.Linear(3, 2, bias=False) for _ in range(2)], []
    for model in models:
        optimizers.append(Adafactor(model.parameters(), lr=1e-3, relative_step=False, **PATHS[path]))
        model.weight = nn.Parameter(torch.ones(2, 3))
        optimizers[-1].param_groups[0]["params"] = [model.weight]
    options = StateDictOptions(full_state_dict=full)
    assert get_optimizer_state_dict(models[1], optimizers[1], options=options)["state"]["weight"]["step"] == 0
    step([models[0].weight], optimizers[0])
    models[0].zero_grad()
    set_optimizer_state_dict(models[1], optimizers[1], get_optimizer_state_dict(models[0], optimizers[0]), options=options)
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        step([model.weight], optimizer, seed=2)
    assert torch.equal(models[0].weight, models[1].weight)
    assert_equal_trees(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


RATES = [{}, {"lr": 1e-3, "relative_step": False}, {"lr": torch.tensor(1e-3), "relative_step": False, "capturable": True}]


@pytest.mark.parametrize("options", RATES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_step_of_zeros_that_is_to_make_state_makes_nothing_else(path: str, options: dict[str, Any]) -> None:
    """torch.distributed.checkpoint takes it, at `lr` 0, where there is no state: `relative_step` has a rate none the less."""
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer = Adafactor(model.parameters(), weight_decay=0.1, weight_decay_scale="none", **options, **PATHS[path])
    optimizer.state.clear()
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert_equal_trees(dict(model.state_dict()), dict(before))
    assert [x["step"] for x in state.values()] == [0, 0]
    assert all(not x.any() for of_param in state.values() for key, x in of_param.items() if key != "step")
    assert optimizer.param_groups[0]["lr"] is options.get("lr")


def test_a_step_at_lr_0_of_an_optimizer_without_state_is_a_step() -> None:
    params, optimizer = make(lr=0.0, relative_step=False, compile=False)
    optimizer.state.clear()
    step(params, optimizer)
    assert [optimizer.state[p]["step"] for p in params] == [1] * len(params)


@pytest.mark.parametrize("path", UNCOMPILED)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "momentum_dtype": torch.bfloat16}], ids=["plain", "momentum"])
def test_a_state_under_other_names_is_refused(path: str, options: dict[str, Any]) -> None:
    """Its tensors are the same, in the same order: kernels that take them by name would write beyond them."""
    params = parameters([(8,), (4, 400), (8,)])
    optimizer = Adafactor(params, **options, **PATHS[path])
    for seed in range(3):
        step(params, optimizer, seed)
    state, before = optimizer.state[params[1]], [p.detach().clone() for p in params]
    names = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}
    renamed = {names.get(name, name): value for name, value in state.items()}
    state.clear()
    state.update(renamed)
    with pytest.raises(RuntimeError, match=r"`exp_avg_sq_row` of parameter 1 .* should have shape .*nothing was stepped"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [optimizer.state[p]["step"] for p in params] == [3, 3, 3]


@pytest.mark.parametrize("path", UNCOMPILED)
def test_a_step_count_that_is_deleted_begins_anew(path: str) -> None:
    params = parameters([(4, 40), (4, 40)])
    optimizer = Adafactor(params, **PATHS[path])
    for seed in range(5):
        if seed == 3:
            del optimizer.state[params[0]]["step"]
        step(params, optimizer, seed)
    assert [optimizer.state[p]["step"] for p in params] == [2, 5]


@pytest.mark.parametrize("path", UNCOMPILED)
def test_a_step_count_in_a_tensor_may_have_a_dimension(path: str) -> None:
    params = parameters([(4, 40), (4, 40)])
    optimizer = Adafactor(params, **PATHS[path])
    for seed in range(2):
        step(params, optimizer, seed)
        optimizer.state[params[0]]["step"] = torch.tensor([4.0])
    step(params, optimizer)
    assert [int(optimizer.state[p]["step"]) for p in params] == [5, 3]
