"""Parts in processes of their own: a kernel that fails takes the device of its process with it, and a part may hang.

A child prints its whole record, one line of JSON, whenever it knows more; what it has said is kept when it is killed.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _card.errors import SHOWN

PROFILES = Path(__file__).resolve().parents[1]
ROOT = PROFILES.parent


Record = dict[str, Any]


class Job(NamedTuple):
    """One part, or one network of it."""

    part: str
    seconds: float  # at most
    options: dict[str, Any]
    network: str | None = None
    cache: str = "checks"  # the folder of its compile cache; jobs that share one find what the others have compiled

    def __str__(self) -> str:
        return f"{self.part} {self.network}" if self.network else self.part


class Child:
    """A job in its process, and the thread that hands on what it prints."""

    def __init__(self, job: Job, folder: Path, deadline: float, messages: queue.SimpleQueue[tuple[Child, str]]) -> None:
        self.job, self.start = job, time.monotonic()
        self.end = min(self.start + job.seconds, deadline)
        self.cut = False
        cache = folder / job.cache
        cache.mkdir(exist_ok=True)
        path = os.pathsep.join([str(PROFILES), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "TMPDIR": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        self._errors = folder / f"{job}.stderr"
        arguments = json.dumps({"network": job.network, **job.options} if job.network else job.options)
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "_card.child", job.part, arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        self._reader = threading.Thread(target=self._read, args=(messages,), daemon=True)
        self._reader.start()

    def _read(self, messages: queue.SimpleQueue[tuple[Child, str]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            messages.put((self, line))

    def ended(self) -> bool:
        """Whether the process is gone, and all it said is among the messages; it is killed when its time is up."""
        if time.monotonic() > self.end:
            self.cut = self.cut or self.process.poll() is None
            self.process.kill()
        if self.process.poll() is None:
            return False
        self._reader.join(2)  # not for ever: a process that it started may hold the pipe
        return True

    def outcome(self, record: Record) -> Record:
        """What the record of a process that has ended is still to say."""
        seconds = {"seconds": round(time.monotonic() - self.start, 1)}
        if self.cut:
            return {**seconds, "error": f"cut off after {seconds['seconds']} s"}
        if self.process.returncode and "error" not in record:
            tail = self._errors.read_text(errors="replace")[-SHOWN:]
            return {**seconds, "error": f"ended with {self.process.returncode}: {tail}"}
        return seconds

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def run_at_once(jobs: Sequence[Job], folder: Path, deadline: float) -> Iterator[tuple[Job, Record, bool]]:
    """Run jobs side by side.

    Args:
        jobs: what to run.
        folder: for compile caches and what the processes say on standard error.
        deadline: of all, by time.monotonic().

    Yields:
        (job, its record so far, whether it has ended), whenever there is more.
    """
    messages: queue.SimpleQueue[tuple[Child, str]] = queue.SimpleQueue()
    children: list[Child] = []
    records: dict[str, Record] = {str(job): {} for job in jobs}
    try:
        for job in jobs:
            if deadline - time.monotonic() < 5:
                yield job, {"error": "no time was left"}, True
            else:
                children.append(Child(job, folder, deadline, messages))
        running = list(children)
        while running:
            ended = [child for child in running if child.ended()]
            yield from _said(messages, records, 0 if ended else 0.2)
            for child in ended:
                running.remove(child)
                record = records[str(child.job)]
                record |= child.outcome(record)
                yield child.job, record, True
    finally:
        for child in children:
            child.stop()


def _said(
    messages: queue.SimpleQueue[tuple[Child, str]], records: dict[str, Record], patience: float
) -> Iterator[tuple[Job, Record, bool]]:
    """All that is in the queue, after waiting this long for the first."""
    while True:
        try:
            child, line = messages.get(timeout=patience) if patience else messages.get_nowait()
        except queue.Empty:
            return
        patience = 0
        records[str(child.job)] = json.loads(line)
        yield child.job, records[str(child.job)], False
