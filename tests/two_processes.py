"""Runs all tests in two processes where there are two cores: half of a run with an empty cache is compiling, on one core.

Both go through the same files, and each takes those that the other has not taken. The second leaves its reports in a file, and
the first counts them with its own.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tolerances

MANY = 300  # tests: all of them, rather than a file or two
DIRECTORY = "ADAFACTOR_COMPILED_TESTS"  # in the environment of the second: where both leave what the other must know


def run(session: pytest.Session) -> bool | None:
    """The loop over the tests of a session, for pytest_runtestloop; None where pytest's own is to run them."""
    if session.testsfailed or session.config.option.collectonly or len(session.items) <= MANY or os.cpu_count() == 1:
        return None
    if is_second():
        try:
            _run_what_is_left(session, Path(os.environ[DIRECTORY]))
        finally:  # also where the first failure ends it
            _leave(tolerances.largest_errors)
    else:
        _run_with_another(session)
    return True


def is_second() -> bool:
    return DIRECTORY in os.environ


class Reports:
    """What the second process has to say of its tests: a plugin, since its hook is not told the configuration."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _leave(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def _run_with_another(session: pytest.Session) -> None:
    config = session.config
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *config.invocation_params.args]
        with open(Path(directory, "output"), "w+") as output:
            second = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, DIRECTORY: directory},
                cwd=config.invocation_params.dir,
            )
            try:
                _run_what_is_left(session, Path(directory))
                status = second.wait()
            finally:
                second.kill()
                second.wait()
            output.seek(0)
            text = output.read()
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise session.Failed(f"the second process ended with {status}:\n{text}")
        *reports, errors = _what_was_left(Path(directory))
        for data in reports:
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            config.hook.pytest_runtest_logreport(report=report)
        for key, error in errors.items():
            tolerances.largest_errors[key] = max(error, tolerances.largest_errors.get(key, 0.0))


def _run_what_is_left(session: pytest.Session, directory: Path) -> None:
    """The files that the other process has not taken, one after the other."""
    for number, (_, of_file) in enumerate(groupby(session.items, key=lambda item: item.path)):
        try:
            Path(directory, str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        items: list[Any] = list(of_file)
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)


def _leave(something: Any) -> None:
    with open(Path(os.environ[DIRECTORY], "reports"), "ab") as file:
        pickle.dump(something, file)


def _what_was_left(directory: Path) -> Iterator[Any]:
    with open(Path(directory, "reports"), "rb") as file:
        while file.peek(1):
            yield pickle.load(file)
