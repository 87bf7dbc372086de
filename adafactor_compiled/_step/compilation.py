"""Whether a step runs compiled: what it lacks is compiled before anything has changed, or else it goes without."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adafactor_compiled._compile import graphs
from adafactor_compiled._compile.progress import progress
from adafactor_compiled._compile.toolchain import cause_of, forbid_in_children, reason_not_to_compile
from adafactor_compiled._fused.cpu.build import Unavailable
from adafactor_compiled._fused.launches import is_ready, make_ready
from adafactor_compiled._state.entries import Entry
from adafactor_compiled._state.options import Group
from adafactor_compiled._state.warn import warn
from adafactor_compiled._step.plan import Plan, plan_of


class Compilation:
    """Of one optimizer.

    Args:
        failed: whether torch.compile was tried and could not be done.
        fused: whether there are fused kernels, as far as is known.
    """

    def __init__(self, failed: bool, fused: bool) -> None:
        self.failed, self.fused = failed, fused
        self._ready: list[tuple[Plan, int]] = []  # what is known to have all its graphs, and in which environment

    def make_ready(self, entries: list[Entry], groups: Sequence[Group], show_progress: bool | None) -> None:
        """Compile all that steps of these entries need."""
        self.compiles(self.plan_of(entries, None, groups, show_progress), groups, show_progress)

    def plan_of(self, entries: list[Entry], last: Plan | None, groups: Sequence[Group], show_progress: bool | None) -> Plan:
        """The plan of a step, all kernels of which are there; see `plan_of`, and `_has_kernels` for what it raises."""
        plan = plan_of(entries, last, self.fused)
        return plan if plan is last or self._has_kernels(plan, groups, show_progress) else plan_of(entries, None, False)

    def _has_kernels(self, plan: Plan, groups: Sequence[Group], show_progress: bool | None) -> bool:
        """Whether all fused kernels of a plan are there; what they lack is compiled.

        Raises:
            RuntimeError: a group has `fused=True`, and they cannot be compiled.
        """
        missing = [kernels for kernels in dict.fromkeys(plan.kernels) if not is_ready(kernels)]
        try:
            for kernels in progress(missing, "compiling Adafactor", show_progress):
                make_ready(kernels)
        except Exception as error:  # whatever it is that keeps them from being compiled, there is another way to step
            cause, remedy = (error.cause, error.remedy) if isinstance(error, Unavailable) else cause_of(error)
            if any(group["fused"] for group in groups):
                raise RuntimeError(f"`fused=True` needs kernels to be compiled but {cause}; {remedy}") from error
            self.fused = False
            warn(
                f"Adafactor steps without its fused kernels, since {cause}; {remedy}, or pass `compile=False`, which takes the "
                "multi-tensor path without this warning"
            )
        return self.fused

    def compiles(self, plan: Plan, groups: Sequence[Group], show_progress: bool | None) -> bool:
        """Whether the calls of a plan run compiled, by themselves or as part of an outer graph.

        Raises:
            RuntimeError: a group has `compile=True`, and nothing can be compiled.
        """
        if torch.compiler.is_compiling():
            return True
        if self.failed or not plan.calls:
            return not self.failed
        if (reason := reason_not_to_compile()) is not None:
            return self._give_up(groups, *reason)
        try:
            environment = graphs.environment()
            if environment is None:  # the user has switched torch.compile off, or is in a mode that it does not know
                return False
            if not any(of is plan and where == environment for of, where in self._ready):
                forbid_in_children()
                graphs.make_ready((call.graph for call in plan.calls), environment, show_progress)
                self._ready = [*self._ready[-7:], (plan, environment)]
        except Exception as error:  # whatever it is that keeps torch from compiling, there is another way to step
            return self._give_up(groups, *cause_of(error), error=error)
        return True

    def _give_up(self, groups: Sequence[Group], cause: str, remedy: str, error: Exception | None = None) -> bool:
        if any(group["compile"] for group in groups):
            raise RuntimeError(f"`compile=True` needs torch.compile to work but {cause}; {remedy}") from error
        self.failed = True
        if not self.fused and not any(group["fused"] is False or group["foreach"] for group in groups):
            return False  # a warning of the same has just been given
        warn(
            f"Adafactor steps without torch.compile, since {cause}; {remedy}, or pass `compile=False`, which takes the same "
            "multi-tensor path without this warning"
        )
        return False
