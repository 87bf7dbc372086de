"""The tests that need a device, counted as they end."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

SHOWN = 1000  # characters of a failure, from its end
MOST = 12  # failures that are shown


class Counter:
    """A plugin of pytest that adds each report to the record."""

    def __init__(self, record: dict[str, Any], emit: Callable[[], None]) -> None:
        self.record, self.emit = record, emit
        self.seconds: dict[str, float] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add("failed", report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.seconds[report.nodeid] = round(report.duration, 1)
            slowest = sorted(self.seconds, key=lambda name: -self.seconds[name])[:5]
            self.record["slowest"] = {name: self.seconds[name] for name in slowest}
            self._add(report.outcome, report)

    def _add(self, outcome: str, report: Any) -> None:
        self.record[outcome] += 1
        failures = self.record["failures"]
        if outcome == "failed" and len(failures) < MOST:
            failures[report.nodeid] = report.longreprtext[-SHOWN:]
        self.emit()


def tests(record: dict[str, Any], emit: Callable[[], None], marker: str) -> None:
    """`pytest -m` with this marker."""
    import pytest

    record.update(marker=marker, cuda=torch.cuda.is_available(), passed=0, failed=0, skipped=0, failures={}, slowest={})
    # The file that has them: others import what a machine with a GPU may lack, and so do the settings of the whole suite.
    arguments = ["-m", marker, "-q", "--tb=short", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    if importlib.util.find_spec("hypothesis") is None:
        arguments.insert(0, "--noconftest")
        record["without"] = "hypothesis"
    record["status"] = int(pytest.main(arguments, plugins=[Counter(record, emit)]))
