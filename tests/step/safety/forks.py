"""Steps in a process that was forked from one that had stepped."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from safety.cases import case, check_error, check_steps, give_gradients, made


def in_a_child(run: Callable[[], None], seconds: float = 120) -> None:
    """Run a function in a forked child, which must end by itself."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, "the forked child failed, see its traceback"
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the forked child did not end within {seconds} s")


@case("fork", "a fork after a step")
def fork(path: str) -> None:
    _, optimizer = made(path, before=2)
    _, another = made(path)
    for group in (*optimizer.param_groups, *another.param_groups):
        if path == "compiled":
            group["compile"], group["fused"] = None, False

    def run() -> None:
        for own in (optimizer, another):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check_steps(own, path)
                check_steps(own, path)
            said = [str(x.message) for x in caught if "Adafactor" in str(x.message)]
            assert len(said) == (path == "compiled"), said
            assert all("forked" in x and '"spawn"' in x for x in said), said

    in_a_child(run)
    check_steps(optimizer, path)  # compiled, since a warning would be an error here


@case("fork", "a fork with compile=True")
def fork_insisting(path: str) -> None:
    _, optimizer = made(path, before=2)
    give_gradients(optimizer, 50)

    def run() -> None:
        if path == "compiled":
            check_error(optimizer, "`compile=True` needs torch.compile to work but this process was forked")
            optimizer.param_groups[0]["compile"] = False
        check_steps(optimizer, path)

    in_a_child(run)
    check_steps(optimizer, path)
