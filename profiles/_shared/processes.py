"""Functions in processes of their own, so that none finds what another left: a heap, compiled code, caches."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch


def in_fresh_process(function: Callable[..., Any], *arguments: Any, **variables: str) -> Any:
    """What a function of a module returns, or raises, in a new process with these environment variables and as many threads."""
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with mock.patch.dict(os.environ, variables), ProcessPoolExecutor(1, context, torch.set_num_threads, threads) as pool:
        return pool.submit(function, *arguments).result()
