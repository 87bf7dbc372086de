"""`capturable=True`: what a CUDA graph needs of a step, as far as it can be checked without CUDA."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from parameters import take_over
from strategies import problems
from tolerances import assert_same_parameter, assert_same_state
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adafactor_compiled import Adafactor, AdafactorSchedule

PATHS = [{"compile": False}, {"foreach": False}]
SHAPES = [(4, 6), (4, 6), (4, 6), (2, 3, 4), (5,), (5,), ()]


READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default}


class Operations(TorchDispatchMode):
    """Notes every operation; with `device`, each tensor that comes out of one must be there."""

    def __init__(self, device=None):
        super().__init__()
        self.device, self.calls = device, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        result = function(*args, **(kwargs or {}))
        if self.device is not None:
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    assert x.device.type == self.device, f"{function} made a tensor on {x.device}"
        return result

    @property
    def reads(self):
        return [function for function, _ in self.calls if function in READS]


def parameters(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    params = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape).to(device, dtype)
    return params


def manual(**options):
    return {"lr": 1e-2, "relative_step": False, **options}


def test_numbers_live_in_tensors():
    optimizer = Adafactor(parameters(), **manual(), capturable=True)
    optimizer.step()
    for state in optimizer.state.values():
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        assert state["step"] == 1
    lr = optimizer.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor)
    optimizer.add_param_group({"params": parameters([(2, 2)]), "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == torch.tensor(0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert all(isinstance(state["step"], torch.Tensor) for state in copied.state.values())
        copied.step()


def test_lr_tensor_has_the_widest_dtype_of_its_group():
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    optimizer = Adafactor(params, **manual(), capturable=True)
    assert optimizer.param_groups[0]["lr"].dtype == torch.float64


def test_lr_tensor_stays_the_users():
    lr = torch.tensor(0.5)
    optimizer = Adafactor(parameters(), lr=lr, relative_step=False, capturable=True)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("first", [True, False])
def test_state_dict_is_the_same_in_both_modes(first):
    """The step count is an int in it, as transformers has it; either mode loads it and goes on alike."""
    params = parameters()
    source = Adafactor(params, beta1=0.9, compile=False, capturable=first)
    source.step()
    saved = source.state_dict()
    assert all(type(state["step"]) is int for state in saved["state"].values())
    others = [param.detach().clone().requires_grad_() for param in params]
    for param, other in zip(params, others, strict=True):
        other.grad = param.grad.clone()
    target = Adafactor(others, beta1=0.9, compile=False, capturable=not first)
    target.load_state_dict(saved)
    assert all(isinstance(target.state[param]["step"], torch.Tensor) is not first for param in others)
    for _ in range(3):
        source.step()
        target.step()
    for param, other in zip(params, others, strict=True):
        assert_same_parameter(other, param, "the other mode")
        assert_same_state(target.state[other], source.state[param], param.dtype)


@settings(max_examples=25)
@given(problems())
def test_capturable_equals_the_reference(problem):
    for path in PATHS:
        groups, reference_groups = problem.param_groups(), problem.param_groups()
        optimizer, reference = Adafactor(groups, **path, capturable=True), Adafactor(reference_groups, foreach=False)
        for t in range(4):
            problem.set_gradients(groups, t)
            problem.set_gradients(reference_groups, t)
            optimizer.step()
            reference.step()
            for group, reference_group in zip(groups, reference_groups, strict=True):
                for p, q in zip(group["params"], reference_group["params"], strict=True):
                    assert_same_parameter(p, q, f"capturable {path}", where=f"step {t}")
                    assert_same_state(optimizer.state[p], reference.state[q], q.dtype, f"step {t}")
            take_over(reference, optimizer)


SCHEDULES = [
    (manual(), lambda x: LambdaLR(x, lambda t: 0.9**t)),
    (manual(), lambda x: CosineAnnealingLR(x, 10)),
    ({}, AdafactorSchedule),
    ({"warmup_init": True}, AdafactorSchedule),
]


@pytest.mark.parametrize("path", [*PATHS, {"compile": True}], ids=str)
@pytest.mark.parametrize(("options", "schedule"), SCHEDULES)
def test_no_host_reads(path, options, schedule):
    optimizer = Adafactor(parameters(), **options, **path, capturable=True)
    schedule = schedule(optimizer)
    optimizer.step()
    schedule.step()
    operations = Operations()
    with operations:
        for _ in range(2):
            optimizer.step()
            schedule.step()
    assert operations.calls
    assert not operations.reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"warmup_init": True, "beta1": 0.9}, manual(clip_threshold=None, weight_decay=0.1)])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_step_stays_on_its_device(path, options, dtype):
    """The meta device stands for a GPU: it has no data to read, and a number made on the host would show."""
    if "lr" in options:  # a number would be kept on the host, where it is not lost
        options = {**options, "lr": torch.tensor(options["lr"], device="meta")}
    optimizer = Adafactor(parameters(dtype=dtype, device="meta"), **options, **path, capturable=True)
    for _ in range(2):
        operations = Operations("meta")
        with operations:
            optimizer.step()
        assert operations.calls
        assert not operations.reads


def test_the_order_is_breadth_first():
    """One operation over all members, launch by launch, rather than one member after the other; on a CPU it is the latter."""
    params = parameters([(4, 6)] * 5, device="meta")
    optimizer = Adafactor(params, compile=False, capturable=True)
    optimizer.step()
    operations = Operations("meta")
    with operations:
        optimizer.step()
    writes = [
        args[0]
        for function, args in operations.calls
        if function is torch.ops.aten._foreach_sub_.List and args[0][0].shape == (4, 6)
    ]
    assert [len(tensors) for tensors in writes] == [5]


CAPTURES = [
    ({"capturable": False}, "`capturable` should be True to capture a step in a CUDA graph but is: False (parameter group 0)"),
    (
        {"capturable": True, "relative_step": False, "lr": torch.tensor(0.1, device="meta")},
        "`lr` should be a tensor on the parameters' device to capture a step in a CUDA graph but is on: meta "
        "(parameter group 0)",
    ),
]


@pytest.mark.parametrize(("options", "message"), CAPTURES)
def test_errors_while_capturing(options, message, monkeypatch):
    params = parameters()
    optimizer = Adafactor(params, **options, compile=False)
    before = [param.detach().clone() for param in params]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert str(error.value) == message
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values())
