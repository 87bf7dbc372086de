"""accelerate and Trainer with FSDP2: the optimizer is made first, and its parameters are replaced by DTensors afterwards."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import load_fsdp_optimizer, save_fsdp_optimizer
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from paths import PATHS
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adafactor_compiled import Adafactor

OPTIONS: dict[str, Any] = {"beta1": 0.9, "weight_decay": 0.1}
RATES: dict[str, dict[str, Any]] = {"own rate": {"lr": 1e-2, "relative_step": False}, "relative step": {}}


def prepared(options: dict[str, Any]) -> tuple[nn.Module, Adafactor]:
    """As `Accelerator.prepare` does it on GPUs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = Adafactor(model.parameters(), **options)
    addresses = [p.data_ptr() for p in model.parameters()]
    params = optimizer.param_groups[0]["params"]
    for i, address in enumerate(addresses):
        params[i] = torch.empty(1)
        params[i].data_ptr = address
    fully_shard(model)
    fsdp2_switch_optimizer_parameters(optimizer, dict(zip(addresses, model.parameters(), strict=True)))
    return model, optimizer


def train(model: nn.Module, optimizer: Adafactor, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(2 * t + dist.get_rank())
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def whole(x: Any) -> torch.Tensor:
    return torch.as_tensor(x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def check_resumed(folder: str, kind: str, options: dict[str, Any], before: int) -> None:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)  # read by accelerate
    plugin, accelerator = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind), Accelerator(cpu=True)
    model, optimizer = prepared(options)
    train(model, optimizer, range(before))
    optimizer.zero_grad()
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    resumed, other = prepared(options)
    with torch.no_grad():
        for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    load_fsdp_optimizer(plugin, accelerator, other, resumed, folder)
    for of_model, of_optimizer in ((model, optimizer), (resumed, other)):
        train(of_model, of_optimizer, range(before, before + 3))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))
        assert optimizer.state[p]["step"] == before + 3
        for key, value in optimizer.state[p].items():
            assert torch.equal(whole(value), whole(other.state[q][key])), key


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("path", PATHS)
def test_a_resumed_run_goes_on(ranks, tmp_path, path, rate, kind, before):
    ranks(2).run(check_resumed, str(tmp_path), kind, {**OPTIONS, **RATES[rate], **PATHS[path]}, before)


def check_state_from_a_step_of_zeros() -> None:
    """As torch.distributed.checkpoint makes state where it finds none."""
    model, optimizer = prepared(OPTIONS)
    kept = [whole(p) for p in model.parameters()]
    optimizer.state.clear()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for p, x in zip(model.parameters(), kept, strict=True):
        assert torch.equal(whole(p), x)
        assert optimizer.state[p]["step"] == 0


def test_state_from_a_step_of_zeros(ranks):
    ranks(2).run(check_state_from_a_step_of_zeros)
