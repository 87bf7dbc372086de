"""Steps in several threads at once, and with other numbers of threads."""

from __future__ import annotations

import functools
import threading
import traceback

import pytest
import torch

from adafactor_compiled._compile.toolchain import reason_not_to_compile
from safety.cases import assert_same, case, check_steps, give_gradients, made, reference_of


def step_in_threads(path: str, count: int) -> None:
    """Threads whose optimizers begin at once; the first such case of a process compiles in all of them."""
    gate, failures = threading.Barrier(count), []

    def run() -> None:
        try:
            _, optimizer = made(path)
            gate.wait()
            if path == "compiled" and reason_not_to_compile() is not None:  # see there, and below
                give_gradients(optimizer, 0)
                with pytest.raises(RuntimeError, match="a thread that has compiled"):
                    optimizer.step()
                return
            for _ in range(3):
                check_steps(optimizer, path)
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)


case("two threads", "2 threads")(functools.partial(step_in_threads, count=2))
case("threads", "6 threads")(functools.partial(step_in_threads, count=6))


@case("threads", "another number of threads in each step")
def change_threads(path: str) -> None:
    _, optimizer = made(path)
    threads = torch.get_num_threads()
    try:
        for t, count in enumerate([1, 2, 1]):
            torch.set_num_threads(count)
            give_gradients(optimizer, t)
            reference = reference_of(optimizer)
            reference.step()
            optimizer.step()
            assert_same(optimizer, reference, path)
    finally:
        torch.set_num_threads(threads)
