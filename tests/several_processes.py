"""Runs all tests in several processes where there are two cores: half of a run with an empty cache is compiling, on one core.

All go through the same files, and each takes those that no other has taken. The others leave their reports in files, and the
first counts them with its own.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pytest
import tolerances

from adafactor_compiled import _compile

MANY = 300  # tests: all of them, rather than a file or two
PROCESSES = 3  # on two cores: each waits a third of the time, for what another compiles and for ranks
DIRECTORY = "ADAFACTOR_COMPILED_TESTS"  # in the environment of the others: where all leave what the first must know
REPORTS = "reports-"  # the start of the names of files there


def run(session: pytest.Session) -> bool | None:
    """The loop over the tests of a session, for pytest_runtestloop; None where pytest's own is to run them."""
    if session.testsfailed or session.config.option.collectonly or len(session.items) <= MANY or os.cpu_count() == 1:
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compile, "helped", lambda *_: nullcontext())  # all cores have enough to do
        if is_another():
            _run_what_is_left(session, Path(os.environ[DIRECTORY]))
            _leave(tolerances.largest_errors)
        else:
            _run_with_others(session)
    return True


def is_another() -> bool:
    """Whether this is not the first process."""
    return DIRECTORY in os.environ


class Reports:
    """What another process has to say of its tests: a plugin, since its hook is not told the configuration."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _leave(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def _run_with_others(session: pytest.Session) -> None:
    config = session.config
    with tempfile.TemporaryDirectory() as directory, ExitStack() as running:
        others = [running.enter_context(_another(config, directory)) for _ in range(PROCESSES - 1)]
        _run_what_is_left(session, Path(directory))
        for process, output in others:
            status = process.wait()
            if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                output.seek(0)
                raise session.Failed(f"another process ended with {status}:\n{output.read()}")
        for path in Path(directory).glob(f"{REPORTS}*"):
            *reports, errors = _left(path)
            for data in reports:
                report = config.hook.pytest_report_from_serializable(config=config, data=data)
                config.hook.pytest_runtest_logreport(report=report)
            for key, error in errors.items():
                tolerances.largest_errors[key] = max(error, tolerances.largest_errors.get(key, 0.0))


@contextmanager
def _another(config: pytest.Config, directory: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Another process with the same arguments, which ends with the body, and the file of what it prints."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *config.invocation_params.args]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, DIRECTORY: directory},
            cwd=config.invocation_params.dir,
            text=True,
        )
        try:
            yield process, output
        finally:
            process.kill()
            process.wait()


def _run_what_is_left(session: pytest.Session, directory: Path) -> None:
    """The files that no other process has taken, one after the other."""
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
    with open(Path(os.environ[DIRECTORY], f"{REPORTS}{os.getpid()}"), "ab") as file:
        pickle.dump(something, file)


def _left(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        while file.peek(1):
            yield pickle.load(file)
