"""The optimizer: its arguments, its state, and the story of a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adafactor_compiled._state import checkpoint, edited, moments, options, overrides
from adafactor_compiled._state.entries import Entry, entries_of, entries_of_all, entry_of
from adafactor_compiled._state.groups import checked_parameters
from adafactor_compiled._state.options import Group
from adafactor_compiled._step import capture, scaling, scheduler
from adafactor_compiled._step.plan import plan_of
from adafactor_compiled._step.stepper import Stepper
from adafactor_compiled._update.parts import PARTS
from adafactor_compiled.step_in_backward import STEPS_IN_BACKWARD, Hooks
from adafactor_compiled.summary import Summary, summary_of
from adafactor_compiled.telemetry import GroupTelemetry, telemetry_of


class Adafactor(Optimizer):
    r"""Adafactor as transformers computes it, over shape classes, compiled.

    For a parameter :math:`p` with gradient :math:`g`, at its step :math:`t` (half precision is computed in float32):

    .. math::
        \rho &= \text{lr, or with `relative_step` } \min(10^{-2}, 1/\sqrt t)
            \text{, or with `warmup_init` } \min(10^{-6} t, 1/\sqrt t) \\
        \alpha &= \rho \max(\epsilon_2, \operatorname{RMS}(p)) \text{ with `scale_parameter`, else } \rho \\
        \beta_2 &= 1 - t^{\text{decay\_rate}} \\
        r &\leftarrow \beta_2 r + (1 - \beta_2) \operatorname{mean}_j (g^2 + \epsilon_1), \quad
        c \leftarrow \beta_2 c + (1 - \beta_2) \operatorname{mean}_i (g^2 + \epsilon_1) \\
        u &= g / \sqrt{r c / \operatorname{mean}(r)} \\
        u &\leftarrow \alpha\, u / \max(1, \operatorname{RMS}(u) / \text{clip\_threshold}) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) u \text{ if `beta1` is set; then } u = m \\
        p &\leftarrow p - \text{weight\_decay}\, \alpha\, p - u

    Rows and columns are the last two dimensions, unless options say otherwise; others are slices with factors of their own. A
    parameter with fewer than two dimensions keeps its whole second moment.

    Args:
        params: parameters, named parameters, or groups of either (float32, float64, bfloat16 or float16; frozen ones may have
            any dtype). DTensors, sharded or replicated, step where they lie; a step is then collective over their meshes, and
            the same on all of its ranks.
        lr: the learning rate, a number or a tensor with one element; None with `relative_step`.
        eps: what is added to the squared gradient, and the least RMS by which the learning rate is scaled.
        clip_threshold: the largest RMS of an update before the learning rate; None clips nothing.
        decay_rate: the exponent of the second moment's decay, at most 0.
        beta1: the decay of the momentum, in [0, 1); None keeps no momentum.
        weight_decay: decoupled weight decay, scaled by the learning rate in use.
        scale_parameter: scale the learning rate by the RMS of the parameter.
        relative_step: let the step count choose the learning rate; excludes `lr`.
        warmup_init: start the relative step at 1e-6 a step; needs `relative_step`.
        foreach: False takes the eager per-parameter path, uncompiled; True a multi-tensor path.
        compile: True compiles the multi-tensor path with torch.compile and raises where that does not work; False keeps it
            eager.
        fused: True steps by kernels, C++ on a CPU and Triton on a GPU, and raises where those cannot be compiled. By default
            they step what they can; where none can be compiled a warning says why, and the multi-tensor path steps.
        maximize: maximize the objective; gradients are left as they are.
        capturable: keep step counts and learning rates in tensors on the parameters' device, for steps inside torch.compile or
            a CUDA graph; a float `lr` becomes a 0-dim tensor in `param_groups`, which schedulers change in place.
        stochastic_rounding: round bfloat16 and float16 parameters up or down at random: small updates count on average.
        rounding_seed: seed of that rounding; the same seed, step and parameter draw the same everywhere.
        nonfinite: "skip" leaves a parameter and its state as they are when its gradient has a NaN or inf, decided on the
            device; "propagate" steps with what is there.
        min_dim_size_to_factor: keep the whole second moment of a parameter whose rows or columns are fewer (optax has 128).
        factor_dims: "last" takes the last two dimensions for rows and columns, "largest" the two largest, as optax does: a
            512 x 512 x 3 x 3 kernel then keeps 9,216 numbers and not 1.5 million.
        beta2_cap: the most that beta2 becomes; None for no cap (0.999 in https://arxiv.org/abs/2106.04560).
        decay_offset: steps that beta2 does not count, for a run that goes on from another one, as in optax.
        momentum_dtype: the dtype that the momentum is kept in, torch.bfloat16 for half of its memory; None for float32.
            The arithmetic stays float32, and `stochastic_rounding` rounds the momentum too.
        cautious: step only the elements whose momentum agrees with the gradient in sign, as much further as they are fewer
            (Liang et al., https://arxiv.org/abs/2411.16085). Needs `beta1`.
        weight_decay_scale: "lr" scales weight decay by the learning rate in use; "none" takes it as it is, as big_vision.
        show_progress: whether compilation shows a progress bar; None for "where standard error is a terminal".

    Every argument but `params` and `show_progress` can be set for a parameter group. Other keys of a group are kept.
    Where `_get_lr(group, state)` is overridden, it gives the learning rate in use: steps then take the reference path, with a
    warning, and `telemetry()` reports the rate of the options.

    State, per parameter, from construction: `step` (int), `RMS` (0-dim), `exp_avg_sq_row` of shape `[..., R]` and
    `exp_avg_sq_col` of shape `[..., C]` for a parameter of shape `[..., R, C]`, else `exp_avg_sq` of its shape; `exp_avg` of
    its shape when `beta1` is set. All float32, for float64 parameters float64; the momentum of `momentum_dtype`.

    Raises:
        ValueError: an option that is not what it must be or is misspelled, a parameter of another dtype, or twice in its group;
            at construction, in `add_param_group` and in `load_state_dict`.
        TypeError: an overridden `_get_options`, `_rms` or `_approx_sq_grad`, which steps would not call.
        RuntimeError: in `step`, before anything has changed: a sparse gradient, one that does not fit its parameter, or
            `compile=True` or `fused=True` without a working toolchain. At construction, as in torch.optim, for flags that
            contradict `fused=True`.

    Example:
        >>> import torch
        >>> from adafactor_compiled import Adafactor
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, compile=False)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()

    References:
        Shazeer and Stern, https://arxiv.org/abs/1804.04235; transformers' Adafactor, but for edge cases that the README lists.
    """

    _in_backward: Hooks | None = None
    show_progress: bool | None = None
    # By name, to be called and, the first, overridden.
    _get_lr, _get_options, _rms, _approx_sq_grad = map(staticmethod, PARTS.values())
    _parts = PARTS

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        foreach: bool | None = None,
        compile: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        nonfinite: str = "propagate",
        min_dim_size_to_factor: int = 0,
        factor_dims: str = "last",
        beta2_cap: float | None = None,
        decay_offset: int = 0,
        momentum_dtype: torch.dtype | None = None,
        cautious: bool = False,
        weight_decay_scale: str = "lr",
        show_progress: bool | None = None,
    ) -> None:
        given = locals()
        defaults = options.plain({name: given[name] for name in options.OPTIONS})
        options.check_manual_lr(lr, defaults["relative_step"])  # the rest is checked in groups, which have the last word
        self.show_progress = show_progress
        for name, own in self._parts.items():
            overrides.check(name, getattr(self, name), own)
        self._stepper = Stepper()
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "show_progress": self.show_progress}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        arguments = inspect.signature(Adafactor).parameters
        for group in (self.defaults, *self.param_groups):
            group.update({name: arguments[name].default for name in options.OPTIONS if name not in group})  # newer ones
        for group in self.param_groups:
            capture.lr_to_tensor(group)
        self._stepper = Stepper(getattr(self, "_stepper", None))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._parts:
            overrides.check(name, value, self._parts[name])
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched"):
            scheduler.check_scheduler(self.param_groups)
            if "step" not in self.__dict__:  # else someone has wrapped it already, who wants to be called
                value = scheduler.traceable_step(self)
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Raises:
            ValueError: as at construction; the optimizer is then as it was.
        """
        if isinstance(param_group, dict):  # else torch says so
            plain = options.plain(param_group)
            params = checked_parameters(plain, self.defaults, self.param_groups)
            param_group.update(plain, params=params)  # not a copy: schedules and wrappers hold this dict
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        with torch.inference_mode(False):
            capture.lr_to_tensor(group)
        moments.make_missing(self.state, [group])
        if self._in_backward is not None:
            self._in_backward.attach(self, len(self.param_groups) - 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: reevaluates the model, calls `backward()` and returns the loss; it runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: before anything has changed: a gradient that is sparse or does not fit its parameter, ranks that
                disagree on their DTensor parameters or gradients, or `compile=True` without a working toolchain.
        """
        if self._in_backward is not None:
            raise RuntimeError(STEPS_IN_BACKWARD)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        overrides.check_all(self, self._parts)
        self._settle_numbers()
        if checkpoint.asks_for_state(self):
            moments.make_missing(self.state, self.param_groups)
            return loss
        if self._get_lr is not self._parts["_get_lr"] or not self._stepper.again(self):
            entries = self._overridden(entries_of(self.param_groups, self.state))
            self._stepper.step(self, entries, self.show_progress)
        return loss

    @torch.no_grad()
    def step_parameter(self, param: Tensor, group: Group, i: int) -> None:
        """Step one parameter that has a gradient, as tools do that step in backward.

        Args:
            param: the parameter; without a gradient, nothing happens.
            group: its parameter group, from `param_groups`.
            i: its place in `group["params"]`.

        Raises:
            RuntimeError: as `step`, before anything has changed.
        """
        if isinstance(param, DTensor):
            raise RuntimeError("`step_parameter` steps parameters that are not sharded; ranks would wait for each other in it")
        self._settle_numbers()
        if param.grad is not None:
            entry = entry_of(param, group, i, self.param_groups, self.state)
            self._stepper.step(self, self._overridden([entry]), self.show_progress, param)
            self._opt_called = True  # or torch's schedulers warn that nothing was stepped

    supports_fused_back_pass = True  # tools may drive `step_parameter` from hooks of their own

    def _settle_numbers(self) -> None:
        if not torch.compiler.is_compiling():  # a graph takes them as they are
            for index, group in enumerate(self.param_groups):
                edited.settle(group, index)

    def _overridden(self, entries: list[Entry]) -> list[Entry]:
        overrides.check_all(self, self._parts)
        get_lr = self._get_lr
        return entries if get_lr is self._parts["_get_lr"] else overrides.with_lr_of(entries, get_lr)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return scaling.wanted(self.param_groups)

    @torch.no_grad()  # as in a step: a graph is compiled for one grad mode
    def warm_up(self) -> None:
        """Compile everything that steps of these parameters need, ahead of the first step.

        No parameter, gradient or state changes. A step compiles what is still missing by itself.

        Raises:
            RuntimeError: `compile=True` without a working toolchain.
        """
        self._settle_numbers()
        entries = self._overridden(entries_of_all(self.param_groups, self.state))
        self._stepper.compilation.make_ready(entries, self.param_groups, self.show_progress)

    def telemetry(self) -> list[GroupTelemetry]:
        """What the last step did, group by group: see `GroupTelemetry`. Costs one small transfer and compiles nothing.

        `adafactor_compiled.telemetry.flat` makes it a flat dict for a logger. Steps inside an outer torch.compile are not seen.
        """
        return telemetry_of(self.param_groups, self._stepper.records.values())

    def summary(self) -> Summary:
        """Shape classes, members, state bytes, path and compile seconds: see `Summary`; print it for a table."""
        self._settle_numbers()
        entries = self._overridden(entries_of_all(self.param_groups, self.state))
        compilation = self._stepper.compilation
        return summary_of(plan_of(entries, None, compilation.fused), entries, not compilation.failed)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, which saves their memory, or set them to zero."""
        if self._in_backward is not None:
            self._in_backward.check(self)
            set_to_none = True
        for group in self.param_groups:  # Optimizer.zero_grad breaks the graph of a compiled training loop
            for param in group["params"]:
                if set_to_none:
                    param.grad = None
                elif param.grad is not None:
                    param.grad = param.grad.detach().zero_()

    def state_dict(self) -> dict[str, Any]:
        """The state as transformers' Adafactor saves it; it loads there, and in any mode here."""
        moments.forget_replaced(self.state, self.param_groups)
        moments.make_missing(self.state, self.param_groups)
        state_dict = super().state_dict()
        state_dict["state"] = {key: checkpoint.portable(state) for key, state in state_dict["state"].items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of transformers' Adafactor, saved in any mode.

        `foreach`, `compile`, `fused` and `capturable` stay as they are here: how a step runs is not part of a checkpoint. A
        step that a CUDA graph has captured must be captured again, since its state lies elsewhere: a UserWarning says so.

        Raises:
            ValueError: a state that does not fit, naming the parameter; the optimizer is then as it was.
        """
        with checkpoint.loading(self):
            super().load_state_dict(state_dict)
        self._stepper.loaded()
