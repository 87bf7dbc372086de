"""Processes that stand for the ranks of a job: started once, handed one check after the other, always reaped.

They are forked from a server that has imported torch once, meet in a file (no port can clash) and talk gloo over loopback.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "adafactor_compiled"])

TIMEOUT = 300.0  # seconds of a check, and of a collective: a shared machine may be slow, and ranks compile at once


class Ranks:
    """`size` ranks of one process group.

    Args:
        size: how many.
        timeout: of a collective, in seconds.
    """

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._ends: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            arguments = (rank, size, self._folder.name, timeout, theirs)
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self.processes.append(process)

    def run(self, check: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """What `check(*arguments)` returns on each rank; an error of any rank is raised here, after all ranks have ended."""
        outcomes = self.outcomes(check, *arguments, timeout=timeout)
        errors = [f"rank {rank}:\n{outcome}" for rank, (ok, outcome) in enumerate(outcomes) if not ok]
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return [outcome for _, outcome in outcomes]

    def outcomes(self, check: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[tuple[bool, Any]]:
        """(whether it returned, what it returned or its traceback) of each rank."""
        message = pickle.dumps((check, arguments))
        for end in self._ends:
            end.send_bytes(message)
        deadline = time.monotonic() + timeout
        return [self._outcome(rank, max(0.0, deadline - time.monotonic()), timeout) for rank in range(self.size)]

    def _outcome(self, rank: int, left: float, timeout: float) -> tuple[bool, Any]:
        end, process = self._ends[rank], self.processes[rank]
        try:
            if end.poll(left):
                outcome: tuple[bool, Any] = pickle.loads(end.recv_bytes())
                return outcome
            return False, f"no answer within {timeout} s; its threads:\n{self._stacks_of(rank)}"
        except (EOFError, ConnectionError):
            process.join(timeout)
            return False, f"died, exit code {process.exitcode}"

    def _stacks_of(self, rank: int) -> str:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        return Path(self._folder.name, f"stacks-{rank}").read_text()

    def close(self) -> None:
        """End every process, by force where it does not end by itself."""
        for end in self._ends:
            end.close()
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes = []
        self._ends = []
        self._folder.cleanup()

    @property
    def closed(self) -> bool:
        return not self.processes


def _serve(rank: int, size: int, folder: str, timeout: float, end: Connection) -> None:
    faulthandler.enable()  # what every thread was doing, where a rank is ended by a signal
    stacks = open(Path(folder, f"stacks-{rank}"), "w")  # noqa: SIM115, open as long as the rank
    faulthandler.register(signal.SIGUSR1, stacks)
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(size))
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            check, arguments = pickle.loads(end.recv_bytes())
        except EOFError:
            os._exit(0)  # the other ranks may be gone: nothing to say goodbye to
        try:
            outcome = (True, check(*arguments))
        except Exception:
            outcome = (False, traceback.format_exc())
        end.send_bytes(pickle.dumps(outcome))
