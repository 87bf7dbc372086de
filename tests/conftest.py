"""Settings of the whole suite: Hypothesis profiles, and the parity figures that a run ends with."""

from __future__ import annotations

import gc
import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: threads of two processes share the cores

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # the cache does not tell for which of them code was made
    folder = os.path.join(tempfile.gettempdir(), f"inductor_{capability}_{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)

import pytest
import tolerances
import torch
import two_processes
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read with Triton, where that is: kernels for a GPU run on this CPU

# A step of a drawn problem may compile, and a shared machine may be slow: no deadline anywhere.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", derandomize=True, print_blob=True, **COMMON)
settings.register_profile("dev", print_blob=True, **COMMON)  # new examples each run; a failure prints how to replay it
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: two processes then end together."""
    items.sort(key=lambda item: item.path.name != "test_train_loop.py")


def pytest_collection_finish() -> None:
    """Tracing makes objects by the million: the collector need not go through all modules each time. It takes a tenth less."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    return two_processes.run(session)


def pytest_configure(config: pytest.Config) -> None:
    if two_processes.is_second():
        config.pluginmanager.register(two_processes.Reports(config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show how close the paths came, where this run compared any."""
    if tolerances.largest_errors:
        terminalreporter.section("largest error of a parameter, relative to its largest element")
        for (path, dtype), error in sorted(tolerances.largest_errors.items(), key=str):
            limit = tolerances.TOLERANCES[dtype].param
            terminalreporter.write_line(f"{path:<42} {dtype!s:<15} {error:8.1e}   (limit {limit:.1e})")
