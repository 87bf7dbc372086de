"""torch.amp.GradScaler around our step: gradients are unscaled, and a step that overflowed changes nothing at all."""

import copy

import pytest
import torch
from tolerances import assert_same_parameter, assert_same_state
from torch.utils._python_dispatch import TorchDispatchMode

from adafactor_compiled import Adafactor

PATHS = [{"foreach": False}, {"compile": False}, {"compile": True}]
SHAPES = [(4, 6), (4, 6), (5,), ()]
SCALE = 2.0**10


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step waited for the device"
        return function(*args, **(kwargs or {}))


def parameters(dtype):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]


def set_gradients(params, t, scale=1.0, overflow=False):
    generator = torch.Generator().manual_seed(t)
    for param in params:
        # Powers of two times a float16: scaling loses nothing.
        param.grad = (torch.randn(param.shape, generator=generator).half() * scale).to(param.dtype)
    if overflow:
        params[1].grad[0, 0] = torch.inf


def snapshot(params, optimizer):
    states = [{key: torch.as_tensor(x) for key, x in optimizer.state[param].items()} for param in params]
    return copy.deepcopy(list(zip([param.detach() for param in params], states, strict=True)))


def assert_identical(before, after):
    for (param, state), (new_param, new_state) in zip(before, after, strict=True):
        assert torch.equal(param, new_param)
        assert set(state) == set(new_state)
        for key, value in state.items():
            assert torch.equal(value.double(), new_state[key].double()), key


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "capturable"), [(torch.float16, False), (torch.float16, True), (torch.float32, False), (torch.float32, True)]
)
def test_overflow_leaves_everything_untouched(dtype, capturable, path):
    """Overflows at the first step and later; between them the steps are those of an optimizer without a scaler."""
    params, others = parameters(dtype), parameters(dtype)
    options = {"beta1": 0.9, "weight_decay": 0.01}
    optimizer, plain = Adafactor(params, **options, **path, capturable=capturable), Adafactor(others, **options, foreach=False)
    assert optimizer._step_supports_amp_scaling == (capturable or dtype is torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    scaler.scale(torch.ones(()))  # makes the scale
    for t in range(6):
        overflow = t in (0, 3)
        set_gradients(params, t, scaler.get_scale(), overflow)
        before, scale = snapshot(params, optimizer), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if overflow else scale)
        if overflow:
            assert_identical(before, snapshot(params, optimizer))
            continue
        set_gradients(others, t)
        plain.step()
        for param, other in zip(params, others, strict=True):
            assert_same_parameter(param, other, "under GradScaler")
            assert_same_state(optimizer.state[param], plain.state[other], dtype)
            with torch.no_grad():
                param.copy_(other)
    assert optimizer.state_dict()["state"][0]["step"] == 4


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_scaling_reads_nothing(path):
    params = parameters(torch.float16)
    optimizer = Adafactor(params, **path, capturable=True)
    optimizer.warm_up()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(0.0)
    for t in range(3):
        set_gradients(params, t, SCALE)
        if t == 0:  # compiles for float32 gradients
            optimizer.step()
        else:
            with NoReads():
                optimizer.step()


def test_unscaled_by_hand_and_clipped():
    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer, plain = Adafactor(params, compile=False, capturable=True), Adafactor(others, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))
    for t in range(3):
        set_gradients(params, t, SCALE)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        set_gradients(others, t)
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        plain.step()
        for param, other in zip(params, others, strict=True):
            assert_same_parameter(param, other, "under GradScaler")


def test_tiny_gradients_survive():
    """Unscaled in float16, a gradient of 1e-9 would be zero."""
    params = [torch.ones(4, 4, dtype=torch.float16).requires_grad_()]
    optimizer = Adafactor(params, lr=0.1, relative_step=False, compile=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.ones(()))
    params[0].grad = torch.full((4, 4), 1e-9 * 2.0**16, dtype=torch.float16)
    scaler.step(optimizer)
    assert (params[0] < 1).all()
