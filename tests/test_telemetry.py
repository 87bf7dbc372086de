"""What the optimizer reports: right, cheap, and without compiling anything."""

import math

import pytest
import torch
from compilers import count_graphs
from parameters import parameters, set_gradients
from paths import PATHS
from torch.overrides import TorchFunctionMode

from adafactor_compiled import Adafactor, StepInBackward
from adafactor_compiled._update.numbers import Numbers
from adafactor_compiled.telemetry import _means, flat

SHAPES = [(6, 8), (6, 8), (5,), (), (2, 3, 4)]


def rms(x):
    return x.detach().double().square().mean().sqrt().item()


def first_update_rms(g):
    """RMS of the update of the first step, where the second moment is that of this gradient alone."""
    squared = g.double().square()
    if g.ndim >= 2:
        row, col = squared.mean(-1), squared.mean(-2)
        squared = row.unsqueeze(-1) * col.unsqueeze(-2) / row.mean(-1)[..., None, None]
    return rms(g.double() * squared.rsqrt())


@pytest.mark.parametrize("path", PATHS)
def test_the_first_step_of_two_groups(path):
    params = parameters(SHAPES)
    before = [rms(p) for p in params]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.1, "relative_step": False, "scale_parameter": False}]
    optimizer = Adafactor(groups, clip_threshold=0.9, **PATHS[path])
    set_gradients(params, 1)
    updates = [first_update_rms(p.grad) for p in params]
    optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.5  # as a scheduler does after the step; the report is of the step
    for telemetry, chosen in zip(optimizer.telemetry(), (slice(0, 3), slice(3, 5)), strict=True):
        count = len(params[chosen])
        expected_lr = sum(1e-2 * max(1e-3, x) for x in before[chosen]) / count if count == 3 else 0.1
        assert telemetry.parameters == count
        assert telemetry.lr == pytest.approx(expected_lr, rel=1e-5)
        assert telemetry.param_rms == pytest.approx(sum(before[chosen]) / count, rel=1e-5)
        assert telemetry.update_rms == pytest.approx(sum(updates[chosen]) / count, rel=1e-5)
        assert telemetry.clipped == pytest.approx(sum(x > 0.9 for x in updates[chosen]) / count)


def test_clipping_is_seen():
    params = parameters(SHAPES)
    optimizer = Adafactor(params, compile=False)
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
    set_gradients(params, 5, scale=100.0)
    optimizer.step()
    assert optimizer.telemetry()[0].clipped == 1.0
    set_gradients(params, 6, scale=1e-3)
    optimizer.step()
    assert optimizer.telemetry()[0].clipped == 0.0


def test_only_parameters_that_stepped_count_and_a_group_without_any_is_nan():
    params = parameters(SHAPES)
    optimizer = Adafactor([{"params": params[:2]}, {"params": params[2:]}], compile=False)
    assert all(group.parameters == 0 and math.isnan(group.lr) for group in optimizer.telemetry())
    set_gradients(params[:1], 0)
    optimizer.step()
    one, other = optimizer.telemetry()
    assert (one.parameters, other.parameters) == (1, 0)
    assert one.lr > 0
    assert math.isnan(other.lr)


def test_the_flat_dict():
    params = parameters(SHAPES)
    optimizer = Adafactor(params, compile=False)
    set_gradients(params, 0)
    optimizer.step()
    metrics = flat(optimizer.telemetry())
    assert list(metrics) == [f"adafactor/{x}" for x in ("parameters", "lr", "param_rms", "update_rms", "clipped", "skipped")]
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    several = Adafactor([{"params": params[:2]}, {"params": params[2:]}], compile=False)
    assert "opt.group1/lr" in flat(several.telemetry(), prefix="opt.")


def test_a_step_of_all_counts_after_one_of_a_parameter_alone():
    params = parameters(SHAPES)
    optimizer = Adafactor(params, lr=0.5, relative_step=False, scale_parameter=False, compile=False)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step_parameter(params[0], optimizer.param_groups[0], 0)
    assert optimizer.telemetry()[0].lr == pytest.approx((0.25 + 0.5 * (len(SHAPES) - 1)) / len(SHAPES))
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.step()
    assert optimizer.telemetry()[0].lr == 0.125


@pytest.mark.parametrize("path", PATHS)
def test_what_a_scaler_undoes_was_skipped(path):
    params = parameters(SHAPES)
    optimizer = Adafactor(params, capturable=True, **PATHS[path])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    reports = []
    for scale in (1.0, math.inf, 1.0):
        set_gradients(params, 1, scale)
        scaler.step(optimizer)
        scaler.update()
        reports += optimizer.telemetry()
    assert [report.skipped for report in reports] == [0.0, 1.0, 0.0]
    assert reports[1].update_rms == reports[0].update_rms
    assert all(math.isfinite(x) for report in reports for x in report)


def test_a_group_on_two_devices():
    """All is brought to one of them."""
    line = [torch.ones(len(Numbers._fields)), torch.tensor(2.0), torch.tensor(3.0), None]
    elsewhere = [x if x is None else x.to("meta") for x in line]
    assert _means([elsewhere, line], torch.device("meta")).shape == (5,)


def test_in_backward():
    params = parameters(SHAPES)
    optimizer = Adafactor(params, compile=False)
    StepInBackward(optimizer)
    sum((p * torch.ones_like(p) * 2).sum() for p in params).backward()
    telemetry = optimizer.telemetry()[0]
    assert telemetry.parameters == len(SHAPES)
    assert telemetry.update_rms == pytest.approx(1.0)


class Transfers(TorchFunctionMode):
    """Every way by which a tensor's value reaches Python."""

    WAYS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "to")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.WAYS and not (name == "to" and {*args[1:]} <= {torch.device("cpu"), torch.float32}):
            self.seen.append((name, args[0].numel()))
        return function(*args, **(kwargs or {}))


def test_it_costs_one_small_transfer_and_no_recompile():
    params = parameters(SHAPES)
    optimizer = Adafactor([{"params": params[:2]}, {"params": params[2:]}], compile=True)
    set_gradients(params, 0)
    optimizer.step()
    compiled = count_graphs()
    with Transfers() as transfers:
        optimizer.telemetry()
    assert transfers.seen == [("tolist", 10)]  # five numbers for each of two groups
    optimizer.step()
    assert count_graphs() == compiled


def test_the_summary_is_data_and_a_table():
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(40, 30), (40, 30), (7,)]]
    params.append(torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16), requires_grad=False))
    optimizer = Adafactor(params, beta1=0.9, compile=True)
    optimizer.warm_up()
    summary = optimizer.summary()
    matrices, vectors = summary.classes
    assert matrices.shape == (40, 30)
    assert (matrices.members, matrices.factored, matrices.momentum, matrices.path) == (2, True, True, "compiled")
    assert matrices.state_bytes == 2 * 4 * (40 + 30 + 40 * 30 + 1)
    assert (vectors.members, vectors.factored, vectors.state_bytes) == (1, False, 4 * (7 + 7 + 1))
    assert matrices.compiled
    assert matrices.compile_seconds > 0
    assert summary.compile_seconds == pytest.approx(matrices.compile_seconds + vectors.compile_seconds)
    assert summary.state_bytes == matrices.state_bytes + vectors.state_bytes
    lines = str(summary).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("40x30")
    assert lines[-1].startswith("3 parameters in 2 shape classes, 10.")


def test_the_summary_says_what_is_not_compiled_and_changes_nothing():
    params = parameters(SHAPES)
    optimizer = Adafactor([{"params": params[:2], "compile": False}, {"params": params[2:], "foreach": False}])
    before = repr(optimizer.state_dict())
    summary = optimizer.summary()
    assert {line.path for line in summary.classes} == {"multi_tensor", "reference"}
    assert not any(line.compiled for line in summary.classes)
    assert summary.compile_seconds == 0
    assert repr(optimizer.state_dict()) == before
