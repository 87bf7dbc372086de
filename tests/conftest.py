"""Settings of the whole suite: Hypothesis profiles, and the parity figures that a run ends with."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from typing import Any

import pytest
import tolerances
from compile_ahead import compiling_ahead
from hypothesis import HealthCheck, settings

# A step of a drawn problem may compile, and a shared machine may be slow: no deadline anywhere.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", derandomize=True, print_blob=True, **COMMON)
settings.register_profile("dev", print_blob=True, **COMMON)  # new examples each run; a failure prints how to replay it
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MANY = 300  # tests: all of them, rather than a file or two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the longest that compiles no passes, and those of several ranks last: the others find more compiled ahead."""
    items.sort(key=lambda item: ("distributed" in item.path.parts) - (item.path.name == "test_train_loop.py"))


def pytest_collection_finish() -> None:
    """Tracing makes objects by the million: the collector need not go through all modules each time. It takes a tenth less."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Any:
    with compiling_ahead() if len(session.items) > MANY else nullcontext():
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how close the paths came, where this run compared any."""
    if tolerances.largest_errors:
        terminalreporter.section("largest error of a parameter, relative to its largest element")
        for (path, dtype), error in sorted(tolerances.largest_errors.items(), key=str):
            limit = tolerances.TOLERANCES[dtype].param
            terminalreporter.write_line(f"{path:<42} {dtype!s:<15} {error:8.1e}   (limit {limit:.1e})")
