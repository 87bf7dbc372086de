"""Checkpoints of other Adafactors, as checkpoints of this one.

Each function takes the `state_dict()` of another optimizer and an `Adafactor` over the same parameters, and returns what its
`load_state_dict` takes. The second moments are those that this optimizer would have after the same gradients. What cannot be
carried over raises a ValueError that says why. (transformers' and fairseq's checkpoints load as they are.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adafactor_compiled._state.options import Group

State = dict[str, Any]
RELATIVE_LR = 1e-2  # the most that `relative_step` chooses


def from_torch(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Convert a checkpoint of `torch.optim.Adafactor`.

    Its learning rate is `min(lr, 1 / sqrt(step))`, scaled by the parameter's RMS. With `lr` 0.01 and no scheduler, or once
    `1 / sqrt(step)` is below both `lr` and 0.01, that is `relative_step`. Before step `1 / lr ** 2` it is `lr`, and so it
    stays here: a run that goes on beyond that step keeps `lr`. Its `eps[0]`, a floor under the second moment, becomes 1e-30,
    which is added to the squared gradient; updates agree wherever its floor is not in use.

    Args:
        state_dict: `state_dict()` of a `torch.optim.Adafactor`.
        optimizer: an `Adafactor` over the same parameters in the same groups.

    Returns:
        A state for `optimizer.load_state_dict`; `state_dict` is left as it was.

    Raises:
        ValueError: weight decay, which is scaled differently there; a learning rate that has no counterpart; another number of
            parameters; or a state without the second moments.
    """

    def options(saved: Group, _: Group, steps: list[int], where: str) -> Group:
        if saved["weight_decay"]:
            raise ValueError(
                f"`weight_decay` should be 0 but is: {saved['weight_decay']!r}{where}; torch scales it by `lr` alone and this "
                "optimizer by the learning rate in use, so set it to 0 in the checkpoint and choose one after loading"
            )
        return {
            **_torch_lr(saved, max(steps, default=0), where),
            "eps": (1e-30, saved["eps"][1]),
            "clip_threshold": saved["d"],
            "decay_rate": saved["beta2_decay"],
            "beta1": None,
            "weight_decay": 0.0,
            "scale_parameter": True,
            "warmup_init": False,
            "maximize": saved["maximize"],
        }

    def state(saved: State, _: Group, param: Tensor, where: str) -> State:
        step = int(_field(saved, "step", where))
        if param.ndim < 2:
            return {"step": step, "exp_avg_sq": _field(saved, "variance", where)}
        row, col = _field(saved, "row_var", where), _field(saved, "col_var", where)
        if row.ndim != param.ndim or col.ndim != param.ndim or row.shape[-1] != 1 or col.shape[-2] != 1:
            raise ValueError(
                f"`row_var` and `col_var` {where} should have shapes {(*param.shape[:-1], 1)} and "
                f"{(*param.shape[:-2], 1, param.shape[-1])} but have {tuple(row.shape)} and {tuple(col.shape)}"
            )
        return {"step": step, "exp_avg_sq_row": row.squeeze(-1), "exp_avg_sq_col": col.squeeze(-2)}

    return _convert(state_dict, optimizer, options, state)


def from_timm(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Convert a checkpoint of timm's `Adafactor`.

    The whole second moment of a small matrix, which timm does not factor, becomes its row and column means: from here on such
    a matrix is factored. A convolution that timm factors over its channels cannot be converted, since this optimizer factors
    the last two dimensions. An external `lr` is not scaled by the parameter's RMS there, so `scale_parameter` becomes False.

    Args, Returns: as `from_torch`.

    Raises:
        ValueError: `caution`; a parameter factored over other dimensions; another number of parameters; or a state without
            the second moments.
    """

    def options(saved: Group, _: Group, __: list[int], where: str) -> Group:
        if saved.get("caution") and saved["beta1"] is not None:  # it changes nothing without momentum
            raise ValueError(f"`caution` should be False but is: True{where}; this optimizer has no masked update")
        relative = saved["relative_step"]
        return {
            "lr": None if relative else saved["lr"],
            "eps": (saved["eps"], saved["eps_scale"]),
            **{key: saved[key] for key in ("clip_threshold", "decay_rate", "beta1", "weight_decay", "warmup_init")},
            "scale_parameter": bool(relative and saved["scale_parameter"]),
            "relative_step": relative,
            "maximize": False,
        }

    def state(saved: State, group: Group, param: Tensor, where: str) -> State:
        converted: State = {key: saved[key] for key in ("step", "RMS", "exp_avg") if key in saved}
        least = group.get("min_dim_size_to_factor", 16)
        if param.ndim > 2 and min(param.shape[:2]) > least:
            raise ValueError(
                f"the second moment {where} is factored over its first two dimensions there but over its last two here, and "
                "one does not give the other; leave its entry out of the checkpoint's state to start it afresh"
            )
        return {**converted, **_factored(saved, param, where)}

    return _convert(state_dict, optimizer, options, state)


def from_pytorch_optimizer(state_dict: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Convert a checkpoint of pytorch_optimizer's `AdaFactor`.

    Its checkpoints hold no `decay_rate`, `clip_threshold` and `maximize`: those of `optimizer` stay. Its decay of the second
    moment is capped by `betas[1]`, which this optimizer's is not: runs agree until the step at which
    `1 - step ** decay_rate` exceeds the cap (5623 for 0.999).

    Args, Returns: as `from_torch`.

    Raises:
        ValueError: `ams_bound` or `cautious`; weight decay that is coupled or fixed; a cap that is already in use; another
            number of parameters; or a state without the second moments.
    """

    def options(saved: Group, group: Group, _: list[int], where: str) -> Group:
        for name in ("ams_bound", "cautious"):
            if saved.get(name):
                raise ValueError(f"`{name}` should be False but is: True{where}; this optimizer does not have it")
        if saved["weight_decay"] and (saved["fixed_decay"] or not saved["weight_decouple"]):
            raise ValueError(
                f"`weight_decay` should be decoupled and scaled by the learning rate but is not{where}; set it to 0 in the "
                "checkpoint and choose one after loading"
            )
        beta1, cap = saved["betas"][:2]
        step = int(saved.get("step", 0))
        if step and 1.0 - step ** group["decay_rate"] > cap:
            raise ValueError(
                f"the decay of the second moment is capped at `betas[1]` = {cap} since before step {step}{where}, and is not "
                "capped here; set `betas[1]` to 1.0 in the checkpoint to go on without the cap"
            )
        relative = saved["relative_step"]
        return {
            "lr": None if relative else saved["lr"],
            "eps": (saved["eps1"], saved["eps2"]),
            "beta1": beta1,
            **{key: saved[key] for key in ("weight_decay", "scale_parameter", "relative_step", "warmup_init")},
        }

    def state(saved: State, group: Group, param: Tensor, where: str) -> State:
        converted: State = {key: saved[key] for key in ("RMS", "exp_avg") if key in saved}
        return {**converted, "step": int(group.get("step", 0)), **_factored(saved, param, where)}

    return _convert(state_dict, optimizer, options, state)


def _convert(
    state_dict: Mapping[str, Any],
    optimizer: Optimizer,
    options: Callable[[Group, Group, list[int], str], Group],
    state: Callable[[State, Group, Tensor, str], State],
) -> dict[str, Any]:
    """Convert group by group and parameter by parameter.

    `options` gets a saved group, the optimizer's own and the step counts; `state` a parameter's saved state, its saved group
    and the parameter.
    """
    states, groups = {}, []
    for saved, group, pairs, where in _groups(state_dict, optimizer):
        converted = {}
        for position, index, param in pairs:
            if state_dict["state"].get(index):
                described = f"of parameter {position} (shape {tuple(param.shape)})"
                converted[index] = state(state_dict["state"][index], saved, param, described)
        states.update(converted)
        steps = [int(x["step"]) for x in converted.values()]
        kept: Group = {key: saved[key] for key in ("params", "param_names", "initial_lr") if key in saved}
        groups.append({**kept, **options(saved, group, steps, where)})
    return {"state": states, "param_groups": groups}


def _groups(
    state_dict: Mapping[str, Any], optimizer: Optimizer
) -> Iterator[tuple[Group, Group, list[tuple[int, int, Tensor]], str]]:
    """(saved group, the optimizer's, (position, index in the checkpoint, parameter) of each one, how to name the group)."""
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    lengths, saved_lengths = ([len(group["params"]) for group in x] for x in (groups, saved_groups))
    if lengths != saved_lengths:
        raise ValueError(f"the checkpoint's groups should have {lengths} parameters but have {saved_lengths}")
    position = 0
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        pairs = list(zip(range(position, position + len(group["params"])), saved["params"], group["params"], strict=True))
        position += len(pairs)
        yield saved, group, pairs, f" (parameter group {number} of the checkpoint)"


def _torch_lr(saved: Group, step: int, where: str) -> Group:
    """`lr` and `relative_step` that go on as torch's `min(lr, 1 / sqrt(step))` does."""
    lr = float(saved["lr"])
    scheduled = "initial_lr" in saved
    if lr == RELATIVE_LR and not scheduled:
        return {"lr": None, "relative_step": True}
    next_rate = (step + 1) ** -0.5
    if next_rate >= lr:
        return {"lr": saved["lr"], "relative_step": False}
    if next_rate <= RELATIVE_LR and not scheduled:
        return {"lr": None, "relative_step": True}
    raise ValueError(
        f"`lr` should be at most 1 / sqrt(step) = {next_rate:.4g} or 0.01 but is: {lr}{where}; torch lowers it by the step "
        "count and this optimizer takes it as it is, so set `lr` in the checkpoint to what it should be from here on"
    )


def _field(saved: State, key: str, where: str) -> Any:
    if key not in saved:
        raise ValueError(f"the checkpoint's state {where} lacks {key}")
    return saved[key]


def _factored(saved: State, param: Tensor, where: str) -> State:
    """Second moments under this optimizer's keys; those of a matrix that are kept whole become row and column means."""
    if param.ndim < 2:
        return {"exp_avg_sq": _field(saved, "exp_avg_sq", where)}
    if "exp_avg_sq" not in saved:
        return {key: _field(saved, key, where) for key in ("exp_avg_sq_row", "exp_avg_sq_col")}
    whole = saved["exp_avg_sq"]
    whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
    return {"exp_avg_sq_row": whole.mean(-1), "exp_avg_sq_col": whole.mean(-2)}
