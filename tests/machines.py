"""Machines on which torch.compile cannot work, for Python in a process of its own with an empty cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 600  # that a process may take, on however busy a machine

# What every script begins with.
COMMON = """
import json
import os
import sys
import warnings

import torch
import torch._dynamo

from adafactor_compiled import Adafactor
from adafactor_compiled._compile import calls

calls.K = 2  # calls of less code


def make():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(7,), (6, 8), ()]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def same(first, second):
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def untouched(optimizer):
    states = optimizer.state.values()
    return same(params_of(optimizer), make()) and not any(torch.as_tensor(x).any() for state in states for x in state.values())


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


"""

# In namespaces of its own: a disk of memory for the cache, which goes with the process.
ON_A_DISK = """
disk=$1 options=$2 then=$3
shift 3
mount -t tmpfs -o "$options" none "$disk" && mkdir "$disk/cache" && eval "$then" || exit 77
exec "$@"
"""

needs_a_shell = pytest.mark.skipif(os.name == "nt", reason="the compilers are shell scripts")


class Kind(NamedTuple):
    """A machine on which compilation fails."""

    cause: str
    remedy: tuple[str, ...]
    cxx: str | None = None  # the compiler's text
    mode: int = 0o755  # and its mode
    disk: tuple[str, str] | None = None  # the cache on a disk of its own: mount's options, and a command behind it
    before: str = ""  # what Python does first
    flags: tuple[str, ...] = ()  # of Python
    environment: dict[str, str] | None = None  # beside that of the test
    may_work: bool = False  # some releases of torch, on some processors, compile none the less


class Run(NamedTuple):
    code: int
    printed: str
    complaints: str
    script: str


def prepare(kind: Kind, directory: Path, body: str) -> tuple[list[str], dict[str, str]]:
    """A command that runs `body` behind COMMON on such a machine, and its environment."""
    script, cxx, cache = directory / "script.py", directory / "g++", directory / "cache"
    script.write_text(COMMON + kind.before + body)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(kind.environment or {})}
    if kind.cxx is not None:
        environment["CXX"] = str(cxx)
        if kind.cxx:
            cxx.write_text(kind.cxx)
            cxx.chmod(kind.mode)
    command = [sys.executable, *kind.flags, str(script)]
    if kind.disk is not None:
        disk = directory / "disk"
        disk.mkdir()
        cache = disk / "cache"
        command = ["unshare", "-rm", "sh", "-c", ON_A_DISK, "sh", str(disk), *kind.disk, *command]
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return command, environment


def run(kind: Kind, directory: Path, body: str) -> Run:
    command, environment = prepare(kind, directory, body)
    if shutil.which(command[0]) is None:
        return Run(77, "", f"there is no {command[0]}", command[-1])
    ran = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS)
    return Run(ran.returncode, ran.stdout.decode(), ran.stderr.decode(errors="replace"), command[-1])
