"""Whether a step runs compiled: what it lacks is compiled before anything has changed, or else it goes without."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from adafactor_compiled._compile import passes
from adafactor_compiled._compile.toolchain import cause_of, forbid_in_children, reason_not_to_compile
from adafactor_compiled._state.options import Group
from adafactor_compiled._step.plan import Plan


class Compilation:
    """Of one optimizer; `failed`: whether it was tried and could not be done."""

    def __init__(self, failed: bool) -> None:
        self.failed = failed
        self._ready: list[tuple[Plan, int]] = []  # what is known to have all its passes, and in which environment

    def compiles(self, plan: Plan, groups: Sequence[Group], show_progress: bool | None) -> bool:
        """Whether the calls of a plan run compiled, as passes or as part of an outer graph.

        Raises:
            RuntimeError: a group has `compile=True`, and nothing can be compiled.
        """
        if torch.compiler.is_compiling():
            return True
        if self.failed or not plan.passes:
            return not self.failed
        if (reason := reason_not_to_compile()) is not None:
            return self._give_up(groups, *reason)
        try:
            environment = passes.environment()
            if environment is None:  # the user has switched torch.compile off, or is in a mode that it does not know
                return False
            if not any(of is plan and where == environment for of, where in self._ready):
                forbid_in_children()
                passes.make_ready(plan.passes, environment, show_progress)
                self._ready = [*self._ready[-7:], (plan, environment)]
        except Exception as error:  # whatever it is that keeps torch from compiling, there is another way to step
            return self._give_up(groups, *cause_of(error), error=error)
        return True

    def _give_up(self, groups: Sequence[Group], cause: str, remedy: str, error: Exception | None = None) -> bool:
        if any(group["compile"] for group in groups):
            raise RuntimeError(f"`compile=True` needs torch.compile to work but {cause}; {remedy}") from error
        self.failed = True
        warnings.warn(
            f"Adafactor steps without torch.compile, since {cause}; {remedy}, or pass `compile=False`, which takes the same "
            "multi-tensor path without this warning",
            stacklevel=7,  # past torch's wrappers of `step`
        )
        return False
