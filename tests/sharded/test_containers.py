"""torchtitan's trainer: an optimizer and a schedule for each sharded part of a model, saved together by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from paths import PATHS
from sharded_training import assert_close
from test_accelerate import whole
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from adafactor_compiled import Adafactor

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OPTIONS: dict[str, Any] = {"lr": 1e-2, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1}


class Part(nn.Module):
    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return next(self.children())(x)


def parts_of(seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [Part("first", nn.Linear(5, 4)), Part("norm", nn.LayerNorm(4)), Part("last", nn.Linear(4, 3))]


class Container:
    def __init__(self, parts: list[nn.Module], **options: Any) -> None:
        self.parts, self.optimizers = parts, [Adafactor(x.parameters(), **OPTIONS, **options) for x in parts]
        self.schedules = [LambdaLR(x, lambda t: 1 / (t + 1)) for x in self.optimizers]

    def train(self, steps: range, per_rank: bool, scheduled: bool = True) -> None:
        for t in steps:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(t))
            if per_rank:
                x = x.chunk(dist.get_world_size())[dist.get_rank()]
            for part in self.parts:
                x = part(x)
            x.square().mean().backward()
            if scheduled:
                nn.utils.clip_grad_norm_([p for part in self.parts for p in part.parameters()], 0.1)
            for y in [*self.optimizers, *(self.schedules if scheduled else ())]:
                y.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self.parts, self.optimizers, strict=True)
        return {key: x for pair in pairs for key, x in get_optimizer_state_dict(*pair, options=FLAT).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for pair in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(*pair, state_dict, options=FLAT)


def check_container(folder: str, mode: dict[str, Any]) -> None:
    parts, plain = parts_of(), Container(parts_of(), foreach=False)
    sharded = Container([fully_shard(x) for x in parts], **mode)
    sharded.train(range(3), per_rank=True)
    dcp.save({"optimizer": sharded.state_dict()}, checkpoint_id=folder)
    resumed = Container(parts, **mode)
    loaded = {"optimizer": resumed.state_dict()}
    dcp.load(loaded, checkpoint_id=folder)
    resumed.load_state_dict(loaded["optimizer"])
    for old, new in zip(sharded.schedules, resumed.schedules, strict=True):
        new.load_state_dict(old.state_dict())
    resumed.train(range(3, 6), per_rank=True)
    plain.train(range(6), per_rank=False)
    for part, other, optimizer, reference in zip(parts, plain.parts, resumed.optimizers, plain.optimizers, strict=True):
        for p, q in zip(part.parameters(), other.parameters(), strict=True):
            assert_close(whole(p), q, 1e-5, tuple(q.shape))
            assert optimizer.state[p]["step"] == reference.state[q]["step"] == 6


@pytest.mark.parametrize("path", PATHS)
def test_a_container_goes_on_from_one_flat_checkpoint(ranks, tmp_path, path):
    ranks(2).run(check_container, str(tmp_path), PATHS[path])


def check_in_backward(mode: dict[str, Any]) -> None:
    """An optimizer for each parameter, stepped when its gradient has been scattered; a step waits for the other ranks."""
    parts, plain = parts_of(), Container(parts_of(), foreach=False)
    model = nn.Sequential(*[fully_shard(x) for x in parts])
    fully_shard(model)
    saved = None
    for start in (0, 3):
        optimizers = {p: Adafactor([p], **OPTIONS, **mode) for p in model.parameters()}
        if saved is not None:
            set_optimizer_state_dict(model, list(optimizers.values()), saved, options=FLAT)

        def hook(p: torch.Tensor, optimizers: dict[Any, Any] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(hook) for p in optimizers]
        for t in range(start, start + 3):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(t))
            model(x.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
        for handle in handles:
            handle.remove()
        saved = get_optimizer_state_dict(model, list(optimizers.values()), options=FLAT)
    plain.train(range(6), per_rank=False, scheduled=False)
    expected = [q for part in plain.parts for q in part.parameters()]
    for p, q in zip(model.parameters(), expected, strict=True):
        assert_close(whole(p), q, 1e-5, tuple(q.shape))


@pytest.mark.parametrize("path", PATHS)
def test_optimizers_in_backward(ranks, path):
    ranks(2).run(check_in_backward, PATHS[path])
