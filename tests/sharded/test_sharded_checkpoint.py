"""Checkpoints of sharded training: other numbers of ranks, one process, transformers' Adafactor, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers.optimization
from sharded_training import assert_close, set_gradients
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from adafactor_compiled import Adafactor

OPTIONS: dict[str, Any] = {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Model(nn.Module):
    """Linear and convolution weights that 2 and 4 ranks split unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.convolution = nn.Linear(9, 7), nn.Conv2d(3, 5, 2)
        generator = torch.Generator().manual_seed(7)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = list(model.parameters())
    for step in steps:
        set_gradients(params, [p.full_tensor().detach() if isinstance(p, DTensor) else nn.Parameter(p) for p in params], step)
        optimizer.step()


def uninterrupted() -> nn.Module:
    """20 steps on one process."""
    model = Model()
    train(model, Adafactor(model.parameters(), **OPTIONS, foreach=False), range(20))
    return model


def assert_on_the_trajectory(model: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), uninterrupted().parameters(), strict=True):
        assert_close(p, q, 1e-6, name)


def sharded() -> tuple[nn.Module, Adafactor]:
    model = Model()
    for p in model.parameters():
        p.data.fill_(5.0)  # what is loaded must replace it
    fully_shard(model)
    return model, Adafactor(model.parameters(), **OPTIONS)


def save(folder: str) -> None:
    model = Model()
    fully_shard(model)
    optimizer = Adafactor(model.parameters(), **OPTIONS)
    train(model, optimizer, range(10))
    for state, p in ((optimizer.state[p], p) for p in model.parameters() if p.ndim >= 2):
        assert state["exp_avg_sq_row"].placements == state["exp_avg"].placements == p.placements == (Shard(0),)
        assert state["exp_avg_sq_row"].shape == p.shape[:-1]
        assert state["exp_avg_sq_col"].placements == ((Shard(0),) if p.ndim > 2 else (Replicate(),))
        assert state["exp_avg_sq_col"].shape == p.shape[:-2] + p.shape[-1:]
        assert not isinstance(state["RMS"], DTensor)
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    full = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    if dist.get_rank() == 0:
        torch.save(full, f"{folder}/full.pt")


def load(folder: str) -> None:
    model, optimizer = sharded()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(10, 20))
    assert_on_the_trajectory(model)


def load_full(folder: str, broadcast: bool) -> None:
    model, optimizer = sharded()
    full = {"model": {}, "optimizer": {}}
    if dist.get_rank() == 0 or not broadcast:
        full = torch.load(f"{folder}/full.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, full["model"], options=options)
    set_optimizer_state_dict(model, optimizer, full["optimizer"], options=options)
    train(model, optimizer, range(10, 20))
    assert_on_the_trajectory(model)


def load_plain_state_dict(path: str) -> None:
    """`load_state_dict` of what one process saved: whole tensors, on every rank."""
    model, optimizer = sharded()
    full = torch.load(path, weights_only=True)
    set_model_state_dict(model, full["model"], options=StateDictOptions(full_state_dict=True))
    before = copy.deepcopy(full["optimizer"])
    optimizer.load_state_dict(full["optimizer"])
    train(model, optimizer, range(15, 20))
    assert_on_the_trajectory(model)
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(full["optimizer"]["state"][index][key]))
    state_dict = copy.deepcopy(full["optimizer"])
    state_dict["state"][0]["exp_avg_sq_row"] = torch.zeros(3)
    with pytest.raises(ValueError, match="`exp_avg_sq_row` of parameter 0"):
        optimizer.load_state_dict(state_dict)


@pytest.fixture(scope="module")
def checkpoint(ranks, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    ranks(4).run(save, folder)
    return folder


@pytest.mark.parametrize("size", [1, 2, 4])
def test_distributed_checkpoint(ranks, checkpoint, size):
    ranks(size).run(load, checkpoint)


@pytest.mark.parametrize("broadcast", [False, True], ids=["every rank reads", "broadcast from rank 0"])
def test_full_state_dict(ranks, checkpoint, broadcast):
    ranks(2).run(load_full, checkpoint, broadcast)


def test_transformers_and_back(ranks, checkpoint, tmp_path):
    """4 ranks, then transformers' Adafactor on one process for 5 steps, then 2 ranks from its state."""
    full = torch.load(f"{checkpoint}/full.pt", weights_only=True)
    model = Model()
    model.load_state_dict(full["model"])
    plain = transformers.optimization.Adafactor(model.parameters(), **OPTIONS)
    names = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    state = {names[name]: value for name, value in full["optimizer"]["state"].items()}
    plain.load_state_dict({"state": state, "param_groups": plain.state_dict()["param_groups"]})
    train(model, plain, range(10, 15))
    torch.save({"model": model.state_dict(), "optimizer": plain.state_dict()}, tmp_path / "transformers.pt")
    ranks(2).run(load_plain_state_dict, str(tmp_path / "transformers.pt"))
