"""What public programs do to their optimizer, in a few lines each, beside transformers' Adafactor; README.md has the sources.

A program gets `make`, which makes an optimizer, and gives the tensors to compare.
"""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from compilers import compiled_by, uncompiled
from tolerances import assert_same_parameter
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import PostLocalSGDOptimizer, _apply_optimizer_in_backward, _NamedOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_map
from transformers.optimization import Adafactor as TransformersAdafactor

from adafactor_compiled import Adafactor

PATHS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "multi-tensor": {"compile": False},
    "compiled": {"compile": True},
    "fused": {"fused": True},
}
SETTINGS = {"lr": 1e-2, "scale_parameter": False, "relative_step": False}

Make = Callable[..., Any]
Program = Callable[[Make], Iterable[Tensor]]
PROGRAMS: dict[str, Program] = {}


def program(run: Program) -> Program:
    PROGRAMS[run.__name__] = run
    return run


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).to(dtype)


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: int = 3, start: int = 0) -> None:
    for t in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, t)
        optimizer.step()


def trained(make: Make, **options: Any) -> tuple[nn.Sequential, Any]:
    """A model and its optimizer after three steps."""
    model = model_of()
    optimizer = make(model.parameters(), **options, **SETTINGS)
    train(model, optimizer)
    return model, optimizer


def reload(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def step_copies(model: nn.Module, params: list[Tensor], copies: list[Tensor], optimizers: list[Any], t: int) -> None:
    """A step of copies with the gradients of parameters, which then follow."""
    model.zero_grad()
    backward(model, t)
    for p, x in zip(params, copies, strict=True):
        x.grad = p.grad.to(x.dtype)
    for optimizer in optimizers:
        optimizer.step()
    for p, x in zip(params, copies, strict=True):
        p.data.copy_(x.detach())


def tensors_of(optimizer: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
    return [(state, key, x) for state in optimizer.state.values() for key, x in state.items() if isinstance(x, Tensor)]


# Other parameters in the groups ------------------------------------------------------------------------------------------


@program
def flat_partition(make: Make) -> Iterable[Tensor]:
    """DeepSpeed: each group gets one flat float32 copy, whose state a step of zeros makes."""
    model = model_of(torch.bfloat16)
    optimizer = make(model.parameters(), beta1=0.9, **SETTINGS)
    (group,) = optimizer.param_groups
    low = nn.utils.parameters_to_vector(group["params"]).detach()
    nn.utils.vector_to_parameters(low, group["params"])
    flat = low.float().requires_grad_()
    group["params"] = [flat]
    flat.grad = torch.zeros_like(flat)
    optimizer.step()
    for t in range(3):
        model.zero_grad()
        backward(model, t)
        flat.grad = torch.cat([p.grad.flatten() for p in model.parameters()]).float()
        optimizer.step()
        low.copy_(flat.detach())
    assert set(optimizer.state) == {flat}  # what was made for the others has gone
    reload(optimizer)
    optimizer.step()
    return [flat, *model.parameters()]


@program
def sub_groups(make: Make) -> Iterable[Tensor]:
    """DeepSpeed ZeRO-3: one partition after the other is alone in the group, which is empty between steps."""
    model = model_of()
    optimizer = make(model.parameters(), **SETTINGS)
    (group,) = optimizer.param_groups
    partitions = [nn.utils.parameters_to_vector(x.parameters()).detach().requires_grad_() for x in model]
    for t in range(3):
        for partition in partitions:
            partition.grad = torch.sin(torch.arange(len(partition)) * (t + 1.0))
            group["params"] = [partition]
            optimizer.step()
            group["params"] = []
    group["params"] = partitions
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2}
    return partitions


@program
def main_parameters(make: Make) -> Iterable[Tensor]:
    """Megatron, NeMo, apex: float32 copies take over places and states, and the state is loaded into itself."""
    model = model_of(torch.bfloat16)
    optimizer = make(model.parameters(), **SETTINGS)
    params = optimizer.param_groups[0]["params"]
    for i, p in enumerate(model.parameters()):
        params[i] = p.detach().clone().float()
        if p in optimizer.state:
            optimizer.state[params[i]] = optimizer.state.pop(p)
    optimizer.load_state_dict(optimizer.state_dict())
    for t in range(3):
        step_copies(model, list(model.parameters()), params, [optimizer], t)
    return params


@program
def block_by_block(make: Make) -> Iterable[Tensor]:
    """BAdam: a new state and new groups, of copies of another block, every few steps."""
    model = model_of(torch.bfloat16)
    optimizer = make(model.parameters(), **SETTINGS)
    for t in range(4):
        if t % 2 == 0:
            block = list(model[t].parameters())
            copies = [p.detach().clone().float().requires_grad_() for p in block]
            optimizer.state = defaultdict(dict)
            optimizer.param_groups = [{"params": copies, **optimizer.defaults}]
        step_copies(model, block, copies, [optimizer], t)
    return model.parameters()


@program
def layers_taken_out(make: Make) -> Iterable[Tensor]:
    """Composer: a frozen layer leaves the groups, here before it is stepped."""
    model = model_of()
    optimizer = make(model.parameters(), **SETTINGS)
    (group,) = optimizer.param_groups
    for p in model[0].requires_grad_(False).parameters():
        group["params"] = [q for q in group["params"] if q is not p]
    train(model, optimizer)
    reload(optimizer)
    train(model, optimizer, start=3)
    return model.parameters()


@program
def grown_parameters(make: Make) -> Iterable[Tensor]:
    """gsplat: a larger parameter takes the place of another in its group."""
    param = nn.Parameter(torch.ones(8, 4))
    optimizer = make([{"params": [param], "name": "means"}], **SETTINGS)
    for t in range(3):
        optimizer.state.pop(param, None)
        param = nn.Parameter(torch.cat([param.detach(), torch.ones(2, 4)]))
        optimizer.param_groups[0]["params"] = [param]
        param.grad = torch.sin(torch.arange(param.numel()) * (t + 1.0)).view_as(param)
        optimizer.step()
    return [param]


# Frozen parameters, and parameters of another kind -----------------------------------------------------------------------


@program
def frozen_packed_weights(make: Make) -> Iterable[Tensor]:
    """bitsandbytes, fp8 base models, rotary tables: `model.parameters()` with weights that are no float32."""
    model = model_of()
    frozen = [torch.ones(3, dtype=torch.uint8), torch.ones(3, dtype=torch.complex64), torch.ones(3).to(torch.float8_e4m3fn)]
    packed = nn.ParameterList([nn.Parameter(x, requires_grad=False) for x in frozen])
    optimizer = make([*packed, *model.parameters()], **SETTINGS)
    train(model, optimizer)
    reload(optimizer)
    train(model, optimizer, start=3)
    return model.parameters()


@program
def lazy_modules(make: Make) -> Iterable[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8), nn.Linear(8, 6))
    optimizer = make(model.parameters(), **SETTINGS)
    if isinstance(optimizer, Adafactor):  # what looks at all parameters passes over those without a shape
        optimizer.warm_up()
        optimizer.summary()
    train(model, optimizer)
    return model.parameters()


@program
def frozen_and_unfrozen(make: Make) -> Iterable[Tensor]:
    """LISA, fastai: another layer trains every step, at rates of numpy; in between the state is cleared."""
    model = model_of()
    optimizer = make([{"params": x.parameters()} for x in model], **SETTINGS)
    for t in range(6):
        for i, layer in enumerate(model):
            layer.requires_grad_(i == t % 3)
        for group, lr in zip(optimizer.param_groups, np.geomspace(1e-4, 1e-2, 3), strict=True):
            group["lr"] = lr
        if t == 4:
            optimizer.state = defaultdict(dict, {})
        train(model, optimizer, 1, start=t)
    reload(optimizer)
    train(model, optimizer, 1)
    return model.parameters()


# State that is moved, changed, saved and loaded --------------------------------------------------------------------------


@program
def state_moved(make: Make) -> Iterable[Tensor]:
    """verl, prime-rl: state leaves the device between steps, also that of frozen parameters, which is then empty."""
    model = model_of()
    model[0].weight.requires_grad_(False)
    optimizer = make(model.parameters(), **SETTINGS)
    for t in range(3):
        train(model, optimizer, 1, start=t)
        for p in model.parameters():
            state = optimizer.state[p]
            for key, x in state.items():
                state[key] = x.to("cpu", copy=True) if isinstance(x, Tensor) else x
    reload(optimizer)
    train(model, optimizer, start=3)
    return model.parameters()


@program
def state_behind_buffers(make: Make) -> Iterable[Tensor]:
    """DeepSpeed's offload of states: through `.data`, with a key of its own beside each."""
    model = model_of()
    optimizer = make(model.parameters(), beta1=0.9, **SETTINGS)
    for t in range(3):
        train(model, optimizer, 1, start=t)
        for state, key, x in tensors_of(optimizer):
            if key == "exp_avg":
                state["buffer"] = x.data.clone()
                x.data = torch.empty(0)
                x.data = state["buffer"].clone()
    return model.parameters()


@program
def emptied_storages(make: Make) -> Iterable[Tensor]:
    """Memory savers: storages of no bytes between steps; and averaged weights that are swapped in to evaluate."""
    model = model_of()
    optimizer = make(model.parameters(), **SETTINGS)
    for t in range(3):
        train(model, optimizer, 1, start=t)
        for x in [*model.parameters(), *(x for *_, x in tensors_of(optimizer))]:
            kept, size = x.detach().clone(), x.untyped_storage().size()
            x.untyped_storage().resize_(0)
            x.untyped_storage().resize_(size)
            x.data.copy_(kept)
        for p in model.parameters():
            p.data, kept = torch.empty(0), p.data
            p.data = kept
    return model.parameters()


@program
def moments_pruned(make: Make) -> Iterable[Tensor]:
    """ReLoRA: most of the moments become zero in place."""
    model, optimizer = trained(make, beta1=0.9)
    for _, key, x in tensors_of(optimizer):
        if key in ("exp_avg", "exp_avg_sq"):
            x.mul_((torch.arange(x.numel()) % 3 == 0).view_as(x))
    train(model, optimizer, start=3)
    return model.parameters()


@program
def begun_anew(make: Make) -> Iterable[Tensor]:
    """Resets in the middle: `state.clear()`, a parameter's own, and a group that leaves and comes back with its state."""
    model = model_of()
    optimizer = make([{"params": x.parameters()} for x in model], beta1=0.9, **SETTINGS)
    train(model, optimizer)
    optimizer.state.clear()
    reload(optimizer)
    train(model, optimizer, start=3)
    optimizer.state[model[0].weight].clear()
    optimizer.state[model[2].weight] = {}
    left = optimizer.param_groups.pop(1)
    train(model, optimizer, start=6)
    optimizer.add_param_group(left)
    train(model, optimizer, start=9)
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    train(model, optimizer, start=12)
    return model.parameters()


@program
def groups_in_another_order(make: Make) -> Iterable[Tensor]:
    """OneTrainer: the state of a run goes to groups in another order, with keys of its own at the top."""
    model = model_of()
    parts = {"unet": model[0], "text": model[2]}
    old = make([{"params": x.parameters(), "name": name} for name, x in parts.items()], **SETTINGS)
    train(model, old)
    new = make([{"params": parts[name].parameters(), "name": name} for name in ("text", "unet")], **SETTINGS)
    saved = copy.deepcopy(old.state_dict())
    saved["param_groups"].reverse()
    new.load_state_dict({**saved, "param_group_mapping": ["text", "unet"]})
    train(model, new, start=3)
    return model.parameters()


@program
def state_through_numpy(make: Make) -> Iterable[Tensor]:
    """RLlib: every number of the state comes back as a tensor."""
    model, optimizer = trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict({**saved, "state": tree_map(lambda x: torch.from_numpy(np.asarray(x)), saved["state"])})
    train(model, optimizer, start=3)
    return model.parameters()


@program
def checkpoint_in_bfloat16(make: Make) -> Iterable[Tensor]:
    """speculators: all that is floating-point is saved in bfloat16, to save room."""
    model, optimizer = trained(make, beta1=0.9)
    for state, key, x in tensors_of(optimizer):
        state[key] = x.bfloat16()
    reload(optimizer)
    train(model, optimizer, start=3)
    return model.parameters()


@program
def flattened_checkpoint(make: Make) -> Iterable[Tensor]:
    """torchtitan: a flat optimizer state, by names."""
    model, options = model_of(), StateDictOptions(flatten_optimizer_state_dict=True)
    model[0].bias.requires_grad_(False)
    old, new = make(model.parameters(), **SETTINGS), make(model.parameters(), **SETTINGS)
    train(model, old)
    old.zero_grad()  # torch makes state where there is none, but not beside gradients
    set_optimizer_state_dict(model, new, get_optimizer_state_dict(model, old, options=options), options=options)
    train(model, new, start=3)
    return model.parameters()


@program
def rate_finder(make: Make) -> Iterable[Tensor]:
    """pytorch-lr-finder, hivemind: a state of zeros from a step of zeros, kept, and loaded after training has blown up."""
    model = model_of()
    optimizer = make(model.parameters(), weight_decay=0.1, **SETTINGS)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    schedule = LambdaLR(optimizer, lambda t: 100.0**t)
    for t in range(4):
        train(model, optimizer, 1, start=t)
        schedule.step()
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    train(model, optimizer)
    return model.parameters()


@program
def made_in_inference_mode(make: Make) -> Iterable[Tensor]:
    model = model_of()
    with torch.inference_mode():
        optimizer = make(model.parameters(), **SETTINGS)
    train(model, optimizer)
    return model.parameters()


# Wrappers, subclasses, hooks ---------------------------------------------------------------------------------------------


@program
def lookahead(make: Make) -> Iterable[Tensor]:
    """timm: slow weights in the base optimizer's state, in the parameter's dtype, also after they were loaded."""
    model = model_of(torch.bfloat16)
    optimizer = make(model.parameters(), **SETTINGS)
    optimizer.defaults["lookahead_k"] = optimizer.param_groups[0]["lookahead_k"] = 2
    for t in range(4):
        train(model, optimizer, 1, start=t)
        for p in map(Tensor.detach, model.parameters()) if t % 2 else ():
            state = next(state for q, state in optimizer.state.items() if q.data_ptr() == p.data_ptr())
            slow = state.setdefault("slow", p.clone())
            p.copy_(slow.add_(p - slow, alpha=0.5))
            assert slow.dtype is torch.bfloat16
        if t == 1:
            reload(optimizer)
    return model.parameters()


class SAM(Optimizer):
    """An optimizer of the same groups, and one step up before each step."""

    def __init__(self, params: Any, make: Make, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05, "adaptive": False, **options})
        self.base = make(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.defaults.update(self.base.defaults)

    @torch.no_grad()
    def climb(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"])

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base.step(closure)


@program
def sharpness_aware(make: Make) -> Iterable[Tensor]:
    model = model_of()
    optimizer = SAM(model.parameters(), make, **SETTINGS)
    for t in range(3):
        backward(model, t)
        optimizer.climb()
        train(model, optimizer, 1, start=t)
        optimizer.zero_grad()
    return model.parameters()


@program
def subclass_of_the_class(make: Make) -> Iterable[Tensor]:
    """Horovod, detectron2: a class made from that of an optimizer, by type(), over its groups, which a schedule has as well."""
    model = model_of()

    def __init__(self: Any, params: Any) -> None:
        super(self.__class__, self).__init__(params)

    def step(self: Any, closure: Any = None) -> Any:
        nn.utils.clip_grad_value_(self.param_groups[0]["params"], 0.01)
        return super(type(self), self).step(closure)

    base = make(model.parameters(), weight_decay=0.1, **SETTINGS)
    schedule = LambdaLR(base, lambda t: 0.5**t)
    optimizer = type("Distributed", (type(base),), {"__init__": __init__, "step": step})(base.param_groups)
    for t in range(3):
        train(model, optimizer, 1, start=t)
        schedule.step()
    return model.parameters()


@program
def counted_step(make: Make) -> Iterable[Tensor]:
    """mmengine: a group for each parameter; `step` counts and knows its optimizer weakly. ms-swift: `foreach` off later."""
    model = model_of()
    optimizer = make([{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(model.parameters())], **SETTINGS)
    owner, function = weakref.ref(optimizer), optimizer.step.__func__

    @functools.wraps(function)
    def counted(*args: Any) -> Any:
        owner().steps = getattr(owner(), "steps", 0) + 1
        return function.__get__(owner(), type(owner()))(*args)

    optimizer.step = counted
    train(model, optimizer)
    for group in optimizer.param_groups:
        group["foreach"] = False
    train(model, optimizer, start=3)
    assert optimizer.steps == 6
    return model.parameters()


@program
def private_gradients(make: Make) -> Iterable[Tensor]:
    """Opacus: gradients with noise in the place of those of backward, here by a hook, and another hook that drops them."""
    model = model_of()
    optimizer = make(model.parameters(), **SETTINGS)

    def noisy(*_: Any) -> None:
        for p in model.parameters():
            p.grad = (p.grad + 0.01).view_as(p)

    optimizer.register_step_pre_hook(noisy)
    optimizer.register_step_post_hook(lambda *_: model.zero_grad())
    for t in range(3):
        backward(model, t)
        optimizer.step()
    return model.parameters()


@program
def one_optimizer_a_parameter(make: Make) -> Iterable[Tensor]:
    """torchtune, GaLore: stepped from hooks in backward, each with a schedule of its own."""
    model = model_of()
    optimizers = {p: make([{"params": [p], "rank": 2}], **SETTINGS) for p in model.parameters()}
    schedules = {p: LambdaLR(x, lambda t: 0.5**t) for p, x in optimizers.items()}

    def hook(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()
        schedules[p].step()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(hook)
    for t in range(3):
        backward(model, t)
        for x in optimizers.values():
            reload(x)
    return model.parameters()


@program
def torch_in_backward(make: Make) -> Iterable[Tensor]:
    """torch.distributed.optim, TorchRec: the same by torch itself."""
    model = model_of()
    _apply_optimizer_in_backward(make, model.parameters(), SETTINGS)
    for t in range(3):
        backward(model, t)
    return model.parameters()


@program
def copies_on_the_host(make: Make) -> Iterable[Tensor]:
    """torchao: an optimizer for the host's copy of each parameter, which requires no gradient and has one."""
    model = model_of()
    copies = [p.detach().clone() for p in model.parameters()]
    optimizers = [make([{"params": x, **SETTINGS}], lr=1.0, relative_step=False) for x in copies]
    for t in range(3):
        step_copies(model, list(model.parameters()), copies, optimizers, t)
    return copies


# Containers, proxies, copies ---------------------------------------------------------------------------------------------

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@program
def optimizers_container(make: Make) -> Iterable[Tensor]:
    """torchtitan: an optimizer and a schedule for each part of a model, and all of their states by name in one flat dict."""
    model = model_of()
    parts = [nn.ModuleDict({"first": model[0], "norm": model[1]}), nn.ModuleDict({"last": model[2]})]
    optimizers = [make(part.parameters(), **SETTINGS) for part in parts]
    saved: dict[str, Any] = {}
    for start in (0, 3):
        schedules = [LambdaLR(x, lambda t: 1 / (t + 1)) for x in optimizers]
        for t in range(start, start + 3):
            model.zero_grad()
            backward(model, t)
            for x in [*optimizers, *schedules]:
                x.step()
        model.zero_grad()
        for part, optimizer in zip(parts, optimizers, strict=True):
            saved |= get_optimizer_state_dict(part, optimizer, options=FLAT)
        optimizers = [make(part.parameters(), **SETTINGS) for part in parts]
        for part, optimizer in zip(parts, optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, saved, options=FLAT)
    return [*model.parameters(), *(x for optimizer in optimizers for _, key, x in tensors_of(optimizer) if key != "RMS")]


@program
def container_in_backward(make: Make) -> Iterable[Tensor]:
    """torchtitan: an optimizer for each parameter, stepped in backward, all saved and loaded as those of one model."""
    model, saved = model_of(), None
    for start in (0, 3):
        optimizers = {p: make([p], **SETTINGS) for p in model.parameters()}
        if saved is not None:
            set_optimizer_state_dict(model, list(optimizers.values()), saved, options=FLAT)

        def hook(p: Tensor, optimizers: dict[Any, Any] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(hook) for p in optimizers]
        for t in range(start, start + 3):
            backward(model, t)
        for handle in handles:
            handle.remove()
        saved = get_optimizer_state_dict(model, list(optimizers.values()), options=FLAT)
    return model.parameters()


class Proxy:
    """What is none of the optimizer's, asked of it; its class is made a subclass of the optimizer's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.__class__ = type("Proxy", (Proxy, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@program
def proxy(make: Make) -> Iterable[Tensor]:
    """Lightning Fabric: an optimizer by its class, with nothing of its own, that a schedule takes for one."""
    model = model_of()
    optimizer = Proxy(make(model.parameters(), **SETTINGS))
    schedule = LambdaLR(optimizer, lambda t: 0.5**t)  # type: ignore[arg-type]
    for t in range(4):
        train(model, optimizer, 1, start=t)
        schedule.step()
        reload(optimizer)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * t
    return model.parameters()


@program
def copied_in_the_middle(make: Make) -> Iterable[Tensor]:
    """Population-based training, pickled workers: model, optimizer and schedule are copied, and all go on."""
    model = model_of()
    optimizer = make([{"params": x.parameters()} for x in model], beta1=0.9, **SETTINGS)
    schedule = ExponentialLR(optimizer, 0.9)
    train(model, optimizer)
    run = model, optimizer, schedule
    runs = [run, copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
    for k, (of_model, of_optimizer, of_schedule) in enumerate(runs):
        for t in range(3):
            train(of_model, of_optimizer, 1, start=3 + t + k)
            of_schedule.step()
    return [p for of_model, *_ in runs for p in of_model.parameters()]


@program
def thawed_layers(make: Make) -> Iterable[Tensor]:
    """Lightning's BaseFinetuning, ULMFiT: frozen layers join as groups of their own, at lower rates, between steps."""
    model = model_of()
    for layer in model[:2]:
        layer.requires_grad_(False)
    optimizer = make(filter(lambda p: p.requires_grad, model.parameters()), beta1=0.9, **SETTINGS)
    schedule = ExponentialLR(optimizer, 0.9)
    for t, layer in enumerate([None, model[1], None, model[0], None]):
        if layer is not None:
            layer.requires_grad_(True)
            optimizer.add_param_group({"params": layer.parameters(), "lr": optimizer.param_groups[0]["lr"] / 2})
        train(model, optimizer, 1, start=t)
        schedule.step()
        reload(optimizer)
    return model.parameters()


class Keyed(Optimizer):
    """The same state and groups as another optimizer, loaded in place and by name."""

    def __init__(self, model: nn.Module, base: Any) -> None:
        self.names = {p: name for name, p in model.named_parameters()}
        super().__init__(base.param_groups, {})
        self.base, self.state, self.param_groups = base, base.state, base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"state": {self.names[p]: state for p, state in self.state.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for p, state in self.state.items():
            for key, x in state_dict["state"][self.names[p]].items():
                if isinstance(x, Tensor):
                    state[key].detach().copy_(x)
                else:
                    state[key] = copy.deepcopy(x)


@program
def keyed_optimizer(make: Make) -> Iterable[Tensor]:
    """TorchRec: names for keys; a state of zeros is made by a step, and loaded in place."""
    model = model_of()
    old, new = (Keyed(model, make(model.parameters(), beta1=0.9, **SETTINGS)) for _ in range(2))
    train(model, old)
    saved, kept = copy.deepcopy(old.state_dict()), copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    new.step()
    model.load_state_dict(kept)
    new.load_state_dict(saved)
    train(model, new, start=3)
    return model.parameters()


class Averager:
    """Of no other ranks."""

    step = 0

    def average_parameters(self, params: Any) -> None:
        self.step += 1


@program
def wrappers_of_torch(make: Make) -> Iterable[Tensor]:
    """torch.distributed.optim: a number at the top of the checkpoint; a state by names, loaded into what a step made."""
    model = model_of()
    averaged = PostLocalSGDOptimizer(make(model.parameters(), **SETTINGS), Averager())  # type: ignore[arg-type]
    train(model, averaged)
    reload(averaged)
    assert averaged.averager.step == 3
    train(model, averaged)
    named = _NamedOptimizer(model.named_parameters(), make, **SETTINGS)  # type: ignore[arg-type]
    named.init_state()
    for t in range(4):
        model.zero_grad()
        backward(model, t)
        named.step()
        reload(named)
    return model.parameters()


@program
def step_by_its_parts(make: Make) -> Iterable[Tensor]:
    """kohya sd-scripts, OneTrainer: `step_parameter` and `step` of their own, that call the optimizer's parts, in hooks."""
    model = model_of()
    groups = [{"params": x.parameters(), "lr": lr} for x, lr in zip(model, (1e-2, 1e-3, 1e-4), strict=True)]
    optimizer = make(groups, **SETTINGS)

    @torch.no_grad()
    def step_parameter(self: Any, p: Tensor, group: dict[str, Any]) -> None:
        state, update = self.state[p], p.grad.square() + group["eps"][0]
        factored, use_first_moment = self._get_options(group, p.shape)
        if not state:
            moments = {"exp_avg_sq_row": update[..., 0], "exp_avg_sq_col": update[0]} if factored else {"exp_avg_sq": update}
            state.update(step=0, **{key: torch.zeros_like(x) for key, x in moments.items()})
        state["step"] += 1
        state["RMS"] = self._rms(p)
        beta2 = 1.0 - state["step"] ** group["decay_rate"]
        if factored:
            state["exp_avg_sq_row"].lerp_(update.mean(-1), 1.0 - beta2)
            state["exp_avg_sq_col"].lerp_(update.mean(-2), 1.0 - beta2)
            update = self._approx_sq_grad(state["exp_avg_sq_row"], state["exp_avg_sq_col"])
        else:
            update = state["exp_avg_sq"].lerp_(update, 1.0 - beta2).rsqrt()
        update = update * p.grad
        assert not use_first_moment
        p.sub_(update / (self._rms(update) / group["clip_threshold"]).clamp(min=1.0) * self._get_lr(group, state))

    def step(self: Any, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                self.step_parameter(p, group)

    train(model, optimizer, 1)
    own = optimizer.step, getattr(optimizer, "step_parameter", None)
    optimizer.step, optimizer.step_parameter = MethodType(step, optimizer), MethodType(step_parameter, optimizer)
    schedule = LambdaLR(optimizer, [lambda t, i=i: 0.5 ** (t + i) for i in range(3)])
    for group in optimizer.param_groups:
        for p in group["params"]:

            def hook(p: Tensor, group: dict[str, Any] = group) -> None:
                optimizer.step_parameter(p, group)
                p.grad = None

            p.register_post_accumulate_grad_hook(hook)
    for name in ("train", "eval"):
        assert not hasattr(optimizer, name)
    for t in range(3):
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    reload(optimizer)
    for p in model.parameters():
        p._post_accumulate_grad_hooks.clear()  # type: ignore[attr-defined]
        p.grad = torch.ones_like(p)
    own[0]()
    return model.parameters()


@program
def memory_efficient_half(make: Make) -> Iterable[Tensor]:
    """fairseq: what `load_state_dict` rounds is put back by hand, as it was in the checkpoint, into `state`."""
    model = model_of(torch.bfloat16)
    old = make(model.parameters(), beta1=0.9, **SETTINGS)
    train(model, old)
    saved = copy.deepcopy(old.state_dict())
    new = make(model.parameters(), beta1=0.9, **SETTINGS)
    new.load_state_dict(saved)
    for i, p in enumerate(new.param_groups[0]["params"]):
        new.state[p] = saved["state"][i]
    train(model, new, start=3)
    return model.parameters()


@program
def recast_model(make: Make) -> Iterable[Tensor]:
    """`model.to(dtype)` between steps, by `.data` and by swapping tensors: the parameters stay, with another dtype."""
    model = model_of()
    optimizer = make(model.parameters(), **SETTINGS)
    for t, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]):
        optimizer.zero_grad()
        torch.__future__.set_swap_module_params_on_conversion(t > 1)
        try:
            model.to(dtype)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        train(model, optimizer, 2, start=2 * t)
    reload(optimizer)
    train(model, optimizer)
    return model.parameters()


@program
def averaged_weights(make: Make) -> Iterable[Tensor]:
    """torch.optim.swa_utils: averages beside the parameters, swapped in and out, and a schedule with a key of its own."""
    model = model_of()
    optimizer = make(model.parameters(), weight_decay=0.1, **SETTINGS)
    schedule = CosineAnnealingLR(optimizer, 4)
    averages, last = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)), SWALR(optimizer, 5e-3, anneal_epochs=2)
    for t in range(6):
        train(model, optimizer, 1, start=t)
        if t < 3:
            schedule.step()
            continue
        averages.update_parameters(model)
        last.step()
        reload(optimizer)
        pairs = list(zip(model.parameters(), averages.module.parameters(), strict=True))
        for _ in range(2):
            for p, q in pairs:
                p.data, q.data = q.data, p.data
    return [*model.parameters(), *averages.module.parameters()]


@program
def projected_gradients(make: Make) -> Iterable[Tensor]:
    """PCGrad: gradients of two losses in flat vectors, projected; what each parameter gets is a view of their sum."""
    model = model_of()
    params = list(model.parameters())
    optimizer = make(params, **SETTINGS)
    for t in range(3):
        flat = []
        for seed in (t, t + 10):
            optimizer.zero_grad(set_to_none=True)
            backward(model, seed)
            flat.append(torch.cat([p.grad.flatten() for p in params]))
        one, other = flat
        one = one - torch.dot(one, other).clamp(max=0) / other.square().sum() * other
        for p, x in zip(params, (one + other).split([p.numel() for p in params]), strict=True):
            p.grad = x.view(p.shape[::-1]).t() if p.ndim == 2 and t == 2 else x.view(p.shape)
        optimizer.step()
    return params


# Gradients ---------------------------------------------------------------------------------------------------------------


@program
def views_of_flat_buffers(make: Make) -> Iterable[Tensor]:
    """Flat buffers for parameters and gradients, at odd addresses; the gradients are zeroed, and stay there."""
    model = model_of()
    params = list(model.parameters())
    flat = torch.cat([torch.zeros(1), *(p.detach().flatten() for p in params)])
    grads = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat[1:], params)
    begin = 1
    for p in params:
        p.grad = grads[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    optimizer = make(params, **SETTINGS)
    for t in range(3):
        grads.zero_()
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return [flat, *params]


@program
def gradients_of_another_dtype(make: Make) -> Iterable[Tensor]:
    """float32 gradients of bfloat16 parameters, summed by the program; and the other way round."""
    dtypes = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for dtype in dtypes for shape in ((6, 8), (7,))]
    optimizer = make(params, **SETTINGS)
    for t in range(3):
        for p in params:
            p.grad_dtype = dtypes[p.dtype]
            p.grad = torch.sin(torch.arange(p.numel()) * (t + 1.0)).view(p.shape).to(dtypes[p.dtype])
        optimizer.step()
    return params


# The comparisons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("path", PATHS)
def test_as_with_transformers(path: str, run: Program) -> None:
    theirs = [x.detach().clone() for x in run(TransformersAdafactor)]
    with compiled_by(uncompiled) if path == "compiled" else nullcontext():
        ours = run(functools.partial(Adafactor, **PATHS[path]))
    for actual, expected in zip(ours, theirs, strict=True):
        assert_same_parameter(actual, expected, "in programs", scale=1.0, where=run.__name__)


@pytest.mark.parametrize("run", [flat_partition, state_moved, torch_in_backward], ids=lambda run: run.__name__)
def test_compiled(run: Program) -> None:
    theirs = [x.detach().clone() for x in run(TransformersAdafactor)]
    for actual, expected in zip(run(functools.partial(Adafactor, compile=True)), theirs, strict=True):
        assert_same_parameter(actual, expected, "in programs", scale=1.0, where=run.__name__)


# What is refused ---------------------------------------------------------------------------------------------------------


def replaced(make: Make) -> tuple[nn.Sequential, Any]:
    """A model whose parameters have taken the places of others in the groups."""
    model = model_of()
    optimizer = make(copy.deepcopy(model).parameters(), **SETTINGS)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return model, optimizer


@pytest.mark.parametrize("path", PATHS)
def test_flat_checkpoint_of_replaced_parameters(path: str) -> None:
    """torch asks `state` what to take out of a flat checkpoint, and so takes nothing before `state_dict()` was called."""
    make = functools.partial(Adafactor, **PATHS[path])
    with compiled_by(uncompiled) if path == "compiled" else nullcontext():
        model, old = replaced(make)
        train(model, old)
        old.zero_grad()
        saved = get_optimizer_state_dict(model, old, options=FLAT)
        other, new = replaced(make)
        other.load_state_dict(model.state_dict())
        with pytest.raises(
            ValueError, match=r"of parameter 0 \(shape \(8, 6\)\), which was put into its group by hand, is empty"
        ):
            set_optimizer_state_dict(other, new, saved, options=FLAT)
        new.state_dict()
        set_optimizer_state_dict(other, new, saved, options=FLAT)
        train(model, old, start=3)
        train(other, new, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("of", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor], ids=lambda of: of.__name__)
def test_checkpoint_of_another_optimizer(of: Callable[..., Optimizer]) -> None:
    """Resumed after `--optim` has changed."""
    model, optimizer = trained(Adafactor, foreach=False)
    other = of(model.parameters(), lr=1e-3)
    train(model, other)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="is another optimizer's: its parameter group 0 has "):
        optimizer.load_state_dict(other.state_dict())
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]


# Where transformers' Adafactor fails -------------------------------------------------------------------------------------


class ScheduleFree:
    """The average of the steps as the parameters, and the steps themselves as `z` in the state of the base optimizer."""

    def __init__(self, base: Adafactor) -> None:
        self.zero_grad, self.state_dict, self.load_state_dict = base.zero_grad, base.state_dict, base.load_state_dict
        self.base = base

    @torch.no_grad()
    def step(self) -> None:
        params = self.base.param_groups[0]["params"]
        averages = [p.clone() for p in params]
        for p in params:
            p.copy_(self.base.state[p].setdefault("z", p.clone()))
        self.base.step()
        for p, average in zip(params, averages, strict=True):
            self.base.state[p]["z"].copy_(p)
            p.copy_(average.lerp_(self.base.state[p]["z"], 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["reference", "multi-tensor"])
def test_schedule_free_goes_on_from_a_checkpoint(path: str, dtype: torch.dtype) -> None:
    """LoRA_Easy_Training_Scripts: transformers' Adafactor takes the key `z` for a state that it has made."""
    models = [model_of(dtype), model_of(dtype)]
    for i, model in enumerate(models):
        optimizer = ScheduleFree(Adafactor(model.parameters(), **SETTINGS, **PATHS[path]))
        train(model, optimizer)
        if i:
            reload(optimizer)
        train(model, optimizer, start=3)
    assert all(torch.equal(p, q) for p, q in zip(*(x.parameters() for x in models), strict=True))


class Int8(Tensor):
    """A matrix as int8 with a scale for each row, which knows how to be copied and not much more."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, x: Tensor) -> None:
        self.scale = x.abs().amax(1, keepdim=True) / 127
        self.codes = (x / self.scale).round().to(torch.int8)

    def __repr__(self, **_: Any) -> str:
        return f"Int8({self.plain()})"

    def plain(self) -> Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        if function is torch.ops.aten.zeros_like.default:
            return torch.zeros(args[0].shape, dtype=kwargs["dtype"])
        if function is not torch.ops.aten.copy_.default:
            raise NotImplementedError(function)
        to, x = args[:2]
        if isinstance(to, Int8):
            to.__init__(x.to(to.dtype))  # type: ignore[misc]
            return to
        return to.copy_(x.plain())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["reference", "multi-tensor"])
def test_quantized_weights(path: str, dtype: torch.dtype) -> None:
    """torchao's quantized training: a step, and then the rounding of the weight's own copy."""
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = nn.Parameter(Int8(weight)), nn.Parameter(Int8(weight).plain())
    options = {**SETTINGS, "lr": 0.1, "beta1": 0.9}
    optimizer, reference = Adafactor([ours], **options, **PATHS[path]), TransformersAdafactor([theirs], **options)
    for t in range(3):
        ours.grad = theirs.grad = torch.sin(torch.arange(48) * (t + 1.0)).view(8, 6).to(dtype)
        optimizer.step()
        reference.step()
        theirs.data = Int8(theirs.detach()).plain()
        assert_same_parameter(ours.detach().plain(), theirs, "in programs")  # type: ignore[attr-defined]
    reload(optimizer)
