"""Step each parameter as its gradient arrives, and free the gradient before the next one is made."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from adafactor_compiled._state.warn import warn

if TYPE_CHECKING:
    from adafactor_compiled.adafactor import Adafactor

STEPS_IN_BACKWARD = (
    "`step()` has nothing to do since StepInBackward steps each parameter in `backward()`; drop the call, or go back to "
    "ordinary steps with `remove()`"
)


class UsedUpGradient(Tensor):
    """What `param.grad` is after the step: it has a shape and no memory, and says so where someone wants to use it.

    That is how gradient accumulation, clipping and gradient scalers find out: backward adds to it, they read it.
    """

    @staticmethod
    def __new__(cls, param: Tensor) -> UsedUpGradient:
        return torch.Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UsedUpGradient(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"this gradient was used up by its parameter's step in backward and cannot be read or added to ({function}): call "
            "`optimizer.zero_grad()` before each backward; gradient accumulation, clipping by a global norm and gradient "
            "scalers need all gradients at once and cannot go with StepInBackward"
        )


class Hooks:
    """What an optimizer that steps in backward owns: the hooks on its parameters.

    They know it weakly. Autograd holds them where Python's collector does not look: what they held would never go.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: Adafactor, group_index: int) -> None:
        """Hook the parameters of a group that take gradients."""
        for i, param in enumerate(optimizer.param_groups[group_index]["params"]):
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(_hook(weakref.ref(optimizer), group_index, i)))

    def check(self, optimizer: Adafactor) -> None:
        """Raise RuntimeError for a gradient that no hook has seen."""
        for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
            if param.grad is not None and not isinstance(param.grad, UsedUpGradient):
                raise RuntimeError(
                    f"parameter {number} (shape {tuple(param.shape)}) has a gradient but is not stepped in backward, since it "
                    "was frozen when StepInBackward was made; call its `remove()` and make another"
                )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _hook(owner: weakref.ref[Adafactor], group_index: int, i: int) -> Any:
    def step_and_free(param: Tensor) -> None:
        optimizer = owner()
        if optimizer is None:
            warn(
                "the optimizer that stepped this parameter in backward is gone, and its gradient stays; keep the optimizer or "
                "its StepInBackward as long as it is to step, or call `remove()` before it goes"
            )
            return
        # By index: load_state_dict puts other groups in the place of these.
        optimizer.step_parameter(param, optimizer.param_groups[group_index], i)
        param.grad = UsedUpGradient(param)

    return step_and_free


class StepInBackward:
    """Steps the parameters of an optimizer during `backward()`, each as soon as its gradient is complete.

    No more than a few gradients exist at any time. The training loop keeps its `zero_grad()` and loses its `step()`.
    Compilation happens here, ahead of the first backward. It ends with `remove()`, or when neither the optimizer nor this
    object is referred to any more: the model keeps neither alive, and its next backward says so in a UserWarning.

    Args:
        optimizer: an `Adafactor` of unsharded parameters. Learning-rate schedules, new parameter groups, `state_dict` and
            `load_state_dict` work as usual.

    Raises:
        RuntimeError: the optimizer steps in backward already. While it does: `step()`; a second backward without `zero_grad()`;
            any use of a gradient after backward, such as clipping by norm or a gradient scaler; and `zero_grad()`, where a
            parameter that was frozen at first has a gradient that was never used.

    Example:
        >>> import torch
        >>> from adafactor_compiled import Adafactor, StepInBackward
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Adafactor(model.parameters(), compile=False)
        >>> in_backward = StepInBackward(optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> in_backward.remove()
    """

    def __init__(self, optimizer: Adafactor) -> None:
        if optimizer._in_backward is not None:
            raise RuntimeError("this optimizer steps in backward already; call `remove()` on its StepInBackward first")
        if any(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"]):
            raise RuntimeError("StepInBackward steps parameters that are not sharded; ranks would wait for each other in it")
        self.optimizer = optimizer
        optimizer.warm_up()
        self._hooks = Hooks()
        for index in range(len(optimizer.param_groups)):
            self._hooks.attach(optimizer, index)
        optimizer._in_backward = self._hooks
        optimizer._stepper.records.clear()

    def remove(self) -> None:
        """Go back to ordinary steps."""
        self._hooks.remove()
        self.optimizer._in_backward = None
        self.optimizer._stepper.records.clear()
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if isinstance(param.grad, UsedUpGradient):
                    param.grad = None
