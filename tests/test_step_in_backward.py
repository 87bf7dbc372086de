"""Stepping each parameter as its gradient arrives: the same results in a fraction of the gradients' memory."""

import copy

import pytest
import torch
from parameters import params_of
from paths import PATHS
from torch.multiprocessing.reductions import StorageWeakRef

from adafactor_compiled import Adafactor, AdafactorSchedule, StepInBackward


def make_model(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 6)
    )
    model[4].weight = torch.nn.Parameter(model[0].weight.detach().T.clone())
    return model


def loss_of(model, step):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.flip(1)).square().mean()


def train_in_backward(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_equal(optimizer, other, tolerance=0.0):
    params, others = params_of(optimizer), params_of(other)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        one, two = optimizer.state[p], other.state[q]
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "weight_decay": 0.1, "capturable": True}], ids=["plain", "momentum"])
def test_equals_the_ordinary_step(path, options):
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = Adafactor(model.parameters(), **PATHS[path], **options)
    other = Adafactor(twin.parameters(), **PATHS[path], **options)
    StepInBackward(optimizer)
    train_in_backward(model, optimizer, range(6))
    train(twin, other, range(6))
    # One vector alone is summed in another order than several that are stacked.
    assert_equal(optimizer, other, tolerance=1e-6)


def test_a_tied_weight_steps_once():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    optimizer, other = (Adafactor(x.parameters(), compile=False) for x in (model, twin))
    StepInBackward(optimizer)
    train_in_backward(model, optimizer, range(3))
    train(twin, other, range(3))
    assert_equal(optimizer, other)
    assert optimizer.state[model[0].weight]["step"] == 3


class GradientMemory:
    """The most bytes of parameter gradients that exist at one time."""

    def __init__(self, model):
        self.alive, self.peak = [], 0
        for p in model.parameters():
            p.register_hook(self.note)

    def note(self, grad):
        self.alive.append((StorageWeakRef(grad.untyped_storage()), grad.nbytes))
        self.alive = [(storage, nbytes) for storage, nbytes in self.alive if not storage.expired()]
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive))


def test_peak_gradient_memory_of_twelve_layers():
    layer = torch.nn.TransformerEncoderLayer(48, 4, 192, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    total = sum(p.nbytes for p in model.parameters())
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    peaks = []
    for attach in (lambda _: None, StepInBackward):
        copied = copy.deepcopy(model)
        optimizer = Adafactor(copied.parameters(), compile=False)
        memory = GradientMemory(copied)
        attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            copied(x).square().mean().backward()
        peaks.append(memory.peak / total)
    ordinary, in_backward = peaks
    assert ordinary == pytest.approx(1.0)  # the measurement sees all gradients where they stay
    assert in_backward <= 0.15


def test_a_learning_rate_schedule_works(recwarn):
    options = {"lr": 0.1, "relative_step": False, "compile": False}
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer, other = Adafactor(model.parameters(), **options), Adafactor(twin.parameters(), **options)
    StepInBackward(optimizer)
    schedules = [torch.optim.lr_scheduler.LambdaLR(x, lambda step: 0.5**step) for x in (optimizer, other)]
    for step in range(4):
        train_in_backward(model, optimizer, [step])
        train(twin, other, [step])
        for schedule in schedules:
            schedule.step()
    assert_equal(optimizer, other, tolerance=1e-6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_adafactor_schedule_reports():
    model = make_model()
    optimizer = Adafactor(model.parameters(), compile=False)
    StepInBackward(optimizer)
    schedule = AdafactorSchedule(optimizer)
    train_in_backward(model, optimizer, range(2))
    schedule.step()
    assert schedule.get_last_lr()[0] > 0


def test_is_removable_and_a_checkpoint_goes_on():
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer, other = (Adafactor(x.parameters(), compile=False) for x in (model, twin))
    in_backward = StepInBackward(optimizer)
    train_in_backward(model, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_in_backward(model, optimizer, range(2, 4))
    in_backward.remove()
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, range(4, 6))
    train(twin, other, range(6))
    assert_equal(optimizer, other, tolerance=1e-6)
    StepInBackward(optimizer).remove()


def test_new_groups_step_too():
    model = make_model()
    optimizer = Adafactor(model[0].parameters(), compile=False)
    StepInBackward(optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "beta1": 0.9})
    before = [p.detach().clone() for p in model[2].parameters()]
    model(torch.ones(1, 6)).sum().backward()
    assert not any(torch.equal(p, q) for p, q in zip(model[2].parameters(), before, strict=True))


def attached():
    model = make_model()
    optimizer = Adafactor(model.parameters(), compile=False)
    StepInBackward(optimizer)
    train_in_backward(model, optimizer, [0])
    return model, optimizer


CANNOT_WORK = {
    "step by habit": (lambda model, optimizer: optimizer.step(), r"`step\(\)` has nothing to do"),
    "closure": (lambda model, optimizer: optimizer.step(lambda: loss_of(model, 0)), r"`step\(\)` has nothing to do"),
    "accumulation": (lambda model, optimizer: loss_of(model, 1).backward(), "accumulation"),
    "clipping": (lambda model, optimizer: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0), "clipping by a global norm"),
    "clipping, no foreach": (
        lambda model, optimizer: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False),
        "clipping by a global norm",
    ),
    "scaler": (lambda model, optimizer: unscale(model, optimizer), "gradient scalers"),
    "twice": (lambda model, optimizer: StepInBackward(optimizer), "steps in backward already"),
    "unfrozen": (lambda model, optimizer: unfreeze_another(model, optimizer), r"parameter 8 \(shape \(3, 6\)\) has a gradient"),
}


def unscale(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


def unfreeze_another(model, optimizer):
    frozen = torch.nn.Parameter(torch.ones(3, 6), requires_grad=False)
    optimizer.add_param_group({"params": [frozen]})
    frozen.requires_grad_(True)
    optimizer.zero_grad()
    frozen.sum().backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", CANNOT_WORK)
def test_what_cannot_work_raises_and_changes_nothing(name):
    use, message = CANNOT_WORK[name]
    model, optimizer = attached()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=message):
        use(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name not in ("twice", "unfrozen"):
        train_in_backward(model, optimizer, [1])  # and the next step works
        assert all(optimizer.state[p]["step"] == 2 for p in model.parameters())


def test_the_hooks_by_which_fine_tuning_tools_drive_an_optimizer():
    model = make_model()
    twin = copy.deepcopy(model)
    groups = [{"params": list(model[:3].parameters())}, {"params": list(model[3:].parameters()), "weight_decay": 0.1}]
    optimizer = Adafactor(groups, compile=False)
    twins = [{"params": list(twin[:3].parameters())}, {"params": list(twin[3:].parameters()), "weight_decay": 0.1}]
    other = Adafactor(twins, compile=False)
    assert optimizer.supports_fused_back_pass

    def hook(param, group, i):
        optimizer.step_parameter(param, group, i)
        param.grad = None

    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            param.register_post_accumulate_grad_hook(lambda p, group=group, i=i: hook(p, group, i))
    for step in range(4):
        loss_of(model, step).backward()
    train(twin, other, range(4))
    assert_equal(optimizer, other, tolerance=1e-6)
    optimizer.step_parameter(model[0].weight, optimizer.param_groups[0], 0)  # without a gradient nothing happens
    assert optimizer.state[model[0].weight]["step"] == 4


def test_step_parameter_names_a_wrong_gradient_by_its_place_over_all_groups():
    a, b = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Adafactor([{"params": [a]}, {"params": [b]}], compile=False)
    b.grad = torch.sparse_coo_tensor([[0]], [1.0], (2,))
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step_parameter(b, optimizer.param_groups[1], 0)
    assert optimizer.state[b]["step"] == 0
