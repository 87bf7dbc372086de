"""Parts in processes of their own: a kernel that fails takes the device of its process with it, and a part may hang.

A child writes its whole record whenever it knows more; what it has written is kept when it is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from _shared.records import write_json

SHOWN = 1500  # characters of an error, from its end
LEAST_SECONDS = 5  # in which a process may say something

Record = dict[str, Any]
Emit = Callable[[], None]


class Job(NamedTuple):
    """One part, or one network of it."""

    part: Callable[..., None]  # of a record, what writes it, and options
    seconds: float  # at most
    options: dict[str, Any]
    cache: str = "checks"  # the folder of its compile cache; jobs that share one find what the others have compiled

    @property
    def network(self) -> str | None:
        return self.options.get("network")

    def __str__(self) -> str:
        return f"{self.part.__name__} {self.network}" if self.network else self.part.__name__


@contextlib.contextmanager
def recorded(record: Record, key: str = "error") -> Iterator[None]:
    """An exception becomes a text in the record, the end of its traceback, and what comes after goes on."""
    try:
        yield
    except Exception:  # whatever it is, it is a result
        record[key] = traceback.format_exc()[-SHOWN:]


def _child(job: Job, path: Path) -> None:
    with path.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    record: Record = {}
    with recorded(record):
        job.part(record, lambda: write_json(path, record), **job.options)
    write_json(path, record)


def run_at_once(jobs: Sequence[Job], folder: Path, deadline: float) -> Iterator[tuple[Job, Record, bool]]:
    """Run jobs side by side.

    Args:
        jobs: what to run.
        folder: for records, compile caches and what the processes print.
        deadline: of all, by time.monotonic().

    Yields:
        (job, its record so far, whether it has ended), every second or so.
    """
    running: list[tuple[Job, Any, float]] = []
    try:
        for job in jobs:
            if deadline - time.monotonic() < LEAST_SECONDS:
                yield job, {"error": "no time was left"}, True
                continue
            cache = folder / job.cache
            cache.mkdir(exist_ok=True)
            caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
            process = multiprocessing.get_context("spawn").Process(target=_child, args=(job, folder / f"{job}.json"))
            with mock.patch.dict(os.environ, {"TMPDIR": str(cache), **caches}):
                process.start()
            running.append((job, process, time.monotonic()))
        while running:
            time.sleep(0.5)
            for job, process, start in list(running):
                seconds = time.monotonic() - start
                cut = process.is_alive() and (seconds > job.seconds or time.monotonic() > deadline)
                if cut:
                    process.kill()
                    process.join()
                if ended := not process.is_alive():
                    running.remove((job, process, start))
                path = folder / f"{job}.json"
                record: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                record["seconds"] = round(seconds, 1)
                if cut:
                    record["error"] = f"cut off after {seconds:.1f} s"
                elif process.exitcode:
                    printed = path.with_suffix(".log").read_text(errors="replace")
                    record["error"] = f"ended with {process.exitcode}: {printed[-SHOWN:]}"
                yield job, record, ended
    finally:
        for _, process, _ in running:
            process.kill()
            process.join()
