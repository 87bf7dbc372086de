"""Interruptions in the middle of a step: step counts stay true, the error says who was stepped, and the next step works."""

import copy
import math
import sys

import pytest
import torch
from parameters import parameters, set_gradients
from paths import PATHS

from adafactor_compiled import Adafactor
from adafactor_compiled._compile import graphs
from adafactor_compiled._update import members, multi_tensor, reference

SHAPES = [(6, 8), (6, 8), (4, 4), (5,), (5,), ()]


def steps_of(optimizer, params):
    return [int(optimizer.state[p]["step"]) for p in params]


def fail_at(monkeypatch, module, name, call, error):
    """Have the call-th call of a function raise instead."""
    function, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


def told(error):
    """The message of an error with its notes, which Python 3.10 has in its arguments."""
    return " ".join([*map(str, error.args), *getattr(error, "__notes__", [])])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Few members of a class too."""
    monkeypatch.setattr(members, "FEW", 0)


INTERRUPTED = {
    # path: (module, function that is called part by part, stepped before its second call, as the note has it)
    "reference": (reference, "step_parameter", [0], ": of 6 parameters, 0 had been stepped"),
    "multi-tensor": (multi_tensor, "apply", [0, 1], ": of 6 parameters, 0-1 had been stepped"),
    "compiled": (graphs, "run", [0], ": of 6 parameters, 0 had been stepped"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("path", INTERRUPTED)
def test_between_parameters(monkeypatch, path, capturable, error):
    module, name, stepped, message = INTERRUPTED[path]
    params = parameters(SHAPES)
    optimizer = Adafactor(params, **PATHS[path], capturable=capturable)
    set_gradients(params, 0)
    optimizer.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = Adafactor(twins, **PATHS[path], capturable=capturable)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    with monkeypatch.context() as patched:
        fail_at(patched, module, name, 2, error)
        with pytest.raises(error) as raised:
            optimizer.step()
    assert message in told(raised.value)
    assert steps_of(optimizer, params) == [2 if i in stepped else 1 for i in range(len(params))]

    # As if the others had had no gradient: from here on both go on alike.
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        q.grad = p.grad if i in stepped else None
    twin.step()
    set_gradients(params, 1)
    set_gradients(twins, 1)
    optimizer.step()
    twin.step()
    for p, q in zip(params, twins, strict=True):
        # One parameter alone may be summed in another order than several that are stacked.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", INTERRUPTED)
def test_before_the_first_parameter_there_is_nothing_to_say(monkeypatch, path):
    module, name, *_ = INTERRUPTED[path]
    params = parameters(SHAPES)
    optimizer = Adafactor(params, **PATHS[path])
    set_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    with monkeypatch.context() as patched:
        fail_at(patched, module, name, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt) as raised:
            optimizer.step()
    assert told(raised.value) == ""
    assert repr(optimizer.state_dict()) == repr(before[0])
    assert all(torch.equal(p, q) for p, q in zip(params, before[1], strict=True))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("path", ["reference", "multi-tensor"])
def test_at_every_call_within_a_step(path, capturable):
    """An interruption at the n-th call of any function within a step, for every n: counted if and only if written."""
    params = parameters(SHAPES)
    optimizer = Adafactor(params, beta1=0.9, **PATHS[path], capturable=capturable)
    set_gradients(params, 0)
    optimizer.step()
    interruptions, partial, done = 0, 0, False
    while not done:
        steps, values = steps_of(optimizer, params), [p.detach().clone() for p in params]
        calls = 0

        def interrupt(frame, event, argument, target=interruptions):
            nonlocal calls
            if event in ("call", "c_call"):
                calls += 1
                if calls == target + 1:
                    raise KeyboardInterrupt

        try:
            sys.setprofile(interrupt)
            optimizer.step()
            sys.setprofile(None)  # a call too: the last one that can be interrupted
            done = calls <= interruptions  # else it fell on what Python ignores, the end of a generator
        except KeyboardInterrupt:
            sys.setprofile(None)
            torch.set_grad_enabled(True)  # torch.no_grad may have been interrupted on its way out
        counted = [after - before for after, before in zip(steps_of(optimizer, params), steps, strict=True)]
        written = [int(not torch.equal(p, q)) for p, q in zip(params, values, strict=True)]
        assert counted == written, f"at call {interruptions}"
        partial += 0 < sum(counted) < len(params)
        interruptions += 7  # every seventh call: a prime number, so that no pattern of calls is skipped
    assert interruptions > 100
    assert partial > 0
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_parameter_alone(path, value):
    params = parameters(SHAPES)
    optimizer = Adafactor(params, **PATHS[path])
    set_gradients(params, 0)
    params[0].grad[1, 2] = value
    params[3].grad[2] = value
    optimizer.step()
    spoiled = [not bool(torch.isfinite(p).all()) for p in params]
    assert spoiled == [True, False, False, True, False, False]


@pytest.mark.parametrize("path", PATHS)
def test_without_clipping_a_vector_is_spoiled_where_its_gradient_is(path):
    """Also among others that are stepped with it."""
    params = parameters([(50,), (50,), (40,), (30,), (20,)])
    optimizer = Adafactor(params, clip_threshold=None, **PATHS[path])
    set_gradients(params, 0)
    params[0].grad[3] = torch.inf
    optimizer.step()
    assert params[0].isnan().nonzero().flatten().tolist() == [3]
    assert all(bool(torch.isfinite(p).all()) for p in params[1:])


@pytest.mark.parametrize("path", PATHS)
def test_a_column_whose_mean_overflows_spoils_nothing(path):
    params = parameters([(300, 40)])
    optimizer = Adafactor(params, **PATHS[path])
    set_gradients(params, 0)
    params[0].grad[:, 5] = 3e18
    optimizer.step()
    assert torch.isinf(optimizer.state[params[0]]["exp_avg_sq_col"]).nonzero().flatten().tolist() == [5]
    assert torch.isfinite(params[0]).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("shape", "spoiled"), [((40,), False), ((70000,), False), ((40, 40, 1, 1), True)], ids=str)
def test_a_square_that_overflows_spoils_no_vector(path, shape, spoiled):
    """But what has rows: one that is infinite is divided by the average of all."""
    params = parameters([shape])
    optimizer = Adafactor(params, **PATHS[path])
    set_gradients(params, 0)
    params[0].grad.view(-1)[3] = 1e30
    optimizer.step()
    assert params[0].isnan().all() if spoiled else params[0].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("capturable", [False, True])
def test_skip_leaves_a_parameter_and_its_state_untouched_and_steps_the_others(path, capturable):
    """As if the spoiled gradients had not been there at all: the twin gets None in their place."""
    options = {**PATHS[path], "beta1": 0.9, "weight_decay": 0.1, "capturable": capturable}
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, twin = Adafactor(params, nonfinite="skip", **options), Adafactor(twins, **options)
    for step, spoiled in enumerate([(1,), (), (0, 3), (5,), ()]):
        set_gradients(params, step)
        set_gradients(twins, step)
        for i in spoiled:
            params[i].grad.view(-1)[-1] = (torch.nan, torch.inf, -torch.inf)[step % 3]
            twins[i].grad = None
        optimizer.step()
        twin.step()
        assert optimizer.telemetry()[0].skipped == pytest.approx(len(spoiled) / len(params))
        assert math.isfinite(optimizer.telemetry()[0].update_rms)
        for p, q in zip(params, twins, strict=True):
            # One parameter alone may be summed in another order than several that are stacked.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert steps_of(optimizer, params) == steps_of(twin, twins) == [4, 4, 5, 4, 5, 4]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_skipped_is_bit_equal(path):
    params = parameters(SHAPES)
    optimizer = Adafactor(params, nonfinite="skip", beta1=0.9, **PATHS[path])
    set_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    for p in params:
        p.grad.fill_(torch.nan)
    optimizer.step()
    assert repr(optimizer.state_dict()) == repr(before[0])
    assert all(torch.equal(p, q) for p, q in zip(params, before[1], strict=True))


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"capturable": True}], ids=str)
def test_what_others_keep_in_the_state_is_left_alone(options):
    """By a step that may have to be undone, too: a sparse tensor could not be put back."""
    params = parameters(SHAPES)
    optimizer = Adafactor(params, compile=False, **options)
    kept = optimizer.state[params[0]]["theirs"] = torch.eye(3).to_sparse()
    set_gradients(params, 0)
    optimizer.found_inf = torch.ones(1) if "capturable" in options else None
    optimizer.step()
    assert optimizer.state[params[0]]["theirs"] is kept


def test_skip_is_an_option_of_a_group():
    params = parameters(SHAPES)
    groups = [{"params": params[:2], "nonfinite": "skip"}, {"params": params[2:]}]
    optimizer = Adafactor(groups, compile=False)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert [bool(torch.isfinite(p).all()) for p in params] == [True, True, False, False, False, False]
    with pytest.raises(ValueError, match='`nonfinite` should be "propagate" or "skip" but is'):
        Adafactor(parameters(SHAPES), nonfinite="ignore")
