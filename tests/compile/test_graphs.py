"""What is compiled, how often and when: counted, on the graphs that Dynamo makes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from compilers import aot_eager, compiled_by, count_graphs, viewed_otherwise
from parameters import parameters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adafactor_compiled import Adafactor
from adafactor_compiled._compile import graphs

LOOK_AT = (
    "{new} new graph(s) where none was expected. Something that varies has become part of a graph: TORCH_LOGS=recompiles names "
    "the guard. A hyperparameter or a step count belongs in `Numbers` (numbers.py), a size that Inductor specializes on in "
    "`magnitude` (calls.py)."
)

LAYER = [(24, 40), (40, 24), (40,), (24,), (96, 1024)]  # of a network that grows in depth


@pytest.fixture(autouse=True)
def _calls_of_two() -> Iterator[None]:
    """Calls of one and of two members: of less code than those of four."""
    with viewed_otherwise(K=2):
        yield


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    """No pass compiled yet, and AOTAutograd without Inductor as the compiler."""
    with compiled_by(aot_eager):
        yield


def set_gradients(params: Sequence[Tensor], t: int, missing: bool = False) -> None:
    for i, p in enumerate(params):
        p.grad = None if missing and (i + t) % 3 == 0 else torch.full_like(p, 0.1 * (t + 1))


def assert_no_graph_since(before: int) -> None:
    new = count_graphs() - before
    assert new == 0, LOOK_AT.format(new=new)


def test_nothing_is_compiled_after_the_first_steps() -> None:
    """Over a learning-rate schedule, changed options, a checkpoint, and gradients that come and go."""
    params = parameters(LAYER * 3)
    groups = [{"params": params[:6]}, {"params": params[6:], "weight_decay": 0.1}]
    optimizer = Adafactor(groups, lr=1e-2, relative_step=False, compile=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for t in range(2):
        set_gradients(params, t)
        optimizer.step()
    before = count_graphs()
    changes = {4: {"weight_decay": 0.3}, 5: {"eps": (1e-20, 1e-2)}, 6: {"clip_threshold": None}, 7: {"maximize": True}}
    changes |= {8: {"lr": torch.tensor(1e-3)}, 9: {"scale_parameter": False}, 10: {"decay_rate": -0.5}}
    for t in range(2, 13):
        set_gradients(params, t, missing=t % 2 == 0)
        optimizer.param_groups[t % 2].update(changes.get(t, {}))
        optimizer.step()
        if t < 8:
            scheduler.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    set_gradients(params[:1], 0)  # a member alone
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    assert_no_graph_since(before)


def test_members_of_different_ages_share_count_graphs() -> None:
    params = parameters(LAYER * 2)
    optimizer = Adafactor(params[:5], compile=True)
    for t in range(3):
        set_gradients(params, t)
        optimizer.step()
    before = count_graphs()
    optimizer.add_param_group({"params": params[5:], "warmup_init": True})
    optimizer.step()
    assert_no_graph_since(before)


@pytest.mark.usefixtures("fresh_cache")
def test_graphs_do_not_grow_with_depth() -> None:
    counts = []
    for depth in (1, 2, 12):  # calls of one, and of two
        with compiled_by(aot_eager):
            before, params = count_graphs(), parameters(LAYER * depth)
            optimizer = Adafactor(params, compile=True)
            for t in range(2):
                set_gradients(params, t)
                optimizer.step()
            counts.append(count_graphs() - before)
    assert len(set(counts)) == 1, f"{counts} graphs for 1 to 12 layers: {LOOK_AT.format(new=counts[-1] - counts[0])}"
    assert counts[0] == 3, "matrices of one block, of several, and vectors"


@pytest.mark.usefixtures("fresh_cache")
def test_one_set_of_graphs_serves_every_width() -> None:
    params = parameters([(8, 16 + 2 * i) for i in range(12)] + [(16 + i,) for i in range(12)])
    optimizer = Adafactor(params, compile=True)
    before = count_graphs()
    set_gradients(params, 0)
    optimizer.step()
    assert 1 <= count_graphs() - before <= 3, LOOK_AT.format(new=count_graphs() - before)


@pytest.mark.usefixtures("fresh_cache")
def test_more_classes_than_the_recompile_limit() -> None:
    """Each pass is one graph, none is given up, and the global limit stays."""
    limit = torch._dynamo.config.recompile_limit
    groups, twins = [], []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for beta1 in (None, 0.9):
            shapes = [(4, 6), (7,)]
            groups.append({"params": parameters(shapes, dtype), "beta1": beta1})
            twins.append({"params": parameters(shapes, dtype), "beta1": beta1})
    optimizer, reference = Adafactor(groups, compile=True), Adafactor(twins, foreach=False)
    before = count_graphs()
    for t in range(2):
        for group in groups + twins:
            set_gradients(group["params"], t)
        optimizer.step()
        reference.step()
    compiled = count_graphs() - before
    assert compiled == len(graphs._ready), "a pass is one graph: what its graph depends on belongs in its variant"
    assert compiled > limit
    assert torch._dynamo.config.recompile_limit == limit == 8
    for group, twin in zip(groups, twins, strict=True):
        for p, q in zip(group["params"], twin["params"], strict=True):
            torch.testing.assert_close(p, q)


def test_twelve_optimizers_share_count_graphs() -> None:
    """More instances than the recompile limit, in one process."""
    before, first = count_graphs(), None
    for i in range(12):
        params = parameters(LAYER)
        optimizer = Adafactor(params, lr=1e-3 * (i + 1), relative_step=False, compile=True)
        set_gradients(params, 0)
        optimizer.step()
        first = count_graphs() if first is None else first
    assert_no_graph_since(first if first is not None else before)


def test_warm_up_with_inductor() -> None:
    """Also the calls on chunks of a large matrix; one element has no graph of its own, as it has under Dynamo's guards."""
    params = parameters([*LAYER, (4101, 1030), (70_000,), (), (1,)])
    optimizer = Adafactor(params, compile=True)
    optimizer.warm_up()
    before = count_graphs()
    set_gradients(params, 0)
    optimizer.step()
    assert_no_graph_since(before)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_warm_up_changes_nothing_and_leaves_nothing_to_compile(beta1: float | None) -> None:
    params = parameters([*LAYER, (0,), (1, 5), (70_000,), (3, 3, 2)])
    optimizer = Adafactor(params, beta1=beta1, compile=True)
    values, state, groups = copy.deepcopy([params, dict(enumerate(optimizer.state.values())), optimizer.param_groups])
    before = count_graphs()
    optimizer.warm_up()
    warmed = count_graphs()
    assert warmed > before
    assert all(torch.equal(p, v) and p.grad is None for p, v in zip(params, values, strict=True))
    for now, then in zip(optimizer.state.values(), state.values(), strict=True):
        assert now.keys() == then.keys()
        assert all(torch.equal(torch.as_tensor(now[key]), torch.as_tensor(then[key])) for key in then)
    options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    for t in range(3):
        set_gradients(params, t, missing=t == 1)
        optimizer.step()
    assert_no_graph_since(warmed)


def test_another_number_of_threads_compiles_for_every_shape() -> None:
    """A graph has a number of threads and is called without guards: sizes that are equal by chance must not be one in it."""
    threads = torch.get_num_threads()
    for shape in ((12, 12), (12, 24), (24, 12)):
        params, twins = parameters([shape]), parameters([shape])
        optimizer, reference = Adafactor(params, compile=True), Adafactor(twins, foreach=False)
        optimizer.warm_up()
        torch.set_num_threads(threads + 1)  # which no other test uses
        try:
            set_gradients(params + twins, 0)
            optimizer.step()
        finally:
            torch.set_num_threads(threads)
        reference.step()
        torch.testing.assert_close(params, twins)


def test_more_environments_than_the_recompile_limit() -> None:
    """Each number of threads is another graph of each pass; the ninth is compiled as the first was."""
    threads, params = torch.get_num_threads(), parameters([(4, 6)])
    optimizer = Adafactor(params, compile=True)
    with compiled_by(aot_eager):
        try:
            for count in range(1, 11):
                torch.set_num_threads(count)
                set_gradients(params, 0)
                optimizer.step()
                assert graphs._ready
                assert optimizer.summary().classes[0].compiled
        finally:
            torch.set_num_threads(threads)


def test_a_dispatch_mode_that_has_ended() -> None:
    """In a mode nothing is compiled (Dynamo never compiles a function again that it meets in one), and after it as before."""
    params = parameters([(4, 6)])
    optimizer = Adafactor(params, compile=True)
    ran: list[graphs.Graph] = []

    def noting(key: graphs.Graph) -> Callable[..., Any]:
        function = aot_eager(key)
        return lambda *arguments: (ran.append(key), function(*arguments))[1]

    with compiled_by(noting):
        for modes in (0, 1, 0, 3, 0):
            ran.clear()
            for _ in range(max(modes, 1)):
                set_gradients(params, 0)
                with FlopCounterMode(display=False) if modes else contextlib.nullcontext():
                    optimizer.step()
            assert bool(ran) == (modes == 0)
