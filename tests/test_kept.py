"""What has been compiled once is found by later processes, and shared out among those that compile at the same time."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from compilers import graphs
from filelock import FileLock
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from adafactor_compiled import _compile, _helper, _kept
from adafactor_compiled._blocked import Sums, statistics
from adafactor_compiled._direct import Direct
from adafactor_compiled._numbers import Numbers

STEP = """
import json
import sys
import threading

import torch


class Watched(list):
    threads = set()

    def insert(self, *arguments):
        self.threads.add(threading.current_thread() is threading.main_thread())
        super().insert(*arguments)


sys.meta_path = Watched(sys.meta_path)

from adafactor_compiled import Adafactor

generator = torch.Generator().manual_seed(0)
params = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(6, 8), (7,), (5,)]]
for p in params:
    p.grad = torch.randn(p.shape, generator=generator)
optimizer = Adafactor(params, compile=True)
optimizer.step()
from torch._dynamo.utils import counters

report = {kind: counters["adafactor_compiled"][f"passes_{kind}"] for kind in ("compiled", "found")}
report["inductor"] = "torch._inductor.compile_fx" in sys.modules
report["changes_imports_in_a_thread"] = False in Watched.threads
print(json.dumps(report | {"params": [p.tolist() for p in params], "versions": [p._version for p in params]}))
"""


def first_step(cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_later_process_compiles_nothing(tmp_path: Path) -> None:
    first = first_step(tmp_path)
    assert first["compiled"] + first["found"] == 2  # a matrix, and vectors: of two processes' making
    assert first["compiled"] > 0
    assert not first["changes_imports_in_a_thread"], "an import of the main thread may find nothing meanwhile"
    assert len(list(tmp_path.glob("adafactor_compiled/*.json"))) >= 2  # more where another process went on with other kinds
    second = first_step(tmp_path)
    assert (second["compiled"], second["found"], second["inductor"]) == (0, 2, False)
    assert second["params"] == first["params"]
    assert second["versions"] == first["versions"]


@pytest.mark.parametrize("text", ["", '{"source": "def', "{}", "[]"])
def test_a_damaged_file_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    place = tmp_path / "place.json"
    place.write_text(text)
    assert _kept.read(place) is None
    made = _kept.Made("call = list", ["p"], [0])
    _kept.write(place, made)
    assert _kept.read(place) == made


@pytest.fixture
def empty_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def direct(variant: tuple[Any, ...] = ("a test",)) -> Direct:
    return Direct(statistics, variant, _compile.CPU_OPTIONS, in_blocks=True)


def arguments() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    return p, g, torch.rand(3, 4, generator=generator), torch.rand(len(Numbers._fields), generator=generator)


@pytest.mark.usefixtures("empty_cache")
def test_what_is_found_does_the_same() -> None:
    """Results in a named tuple, a tensor that is written to, and its version."""
    made, found = direct(), direct()
    first, second = arguments(), arguments()
    assert not found.is_kept()
    expected = made(*first)
    assert found.is_kept()
    before = graphs(), counters["adafactor_compiled"]["passes_found"]
    result = found(*second)
    assert (graphs(), counters["adafactor_compiled"]["passes_found"]) == (before[0] + 1, before[1] + 1)
    assert isinstance(result, Sums)
    assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(second, first, strict=True))
    assert second[2]._version == first[2]._version == 1
    assert not torch.equal(first[2], arguments()[2])


@pytest.mark.usefixtures("empty_cache")
def test_a_place_is_for_one_set_of_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {_kept.place_of("a"), _kept.place_of("b")}
    with inductor_config.patch({"cpp.simdlen": 128}):
        places.add(_kept.place_of("a"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    places.add(_kept.place_of("a"))
    torch.set_num_threads(threads)
    monkeypatch.setattr(_kept, "_environment", lambda: "another version of this package, of torch, another processor")
    places.add(_kept.place_of("a"))
    monkeypatch.undo()
    assert len(places) == 5
    assert None not in places
    assert _kept.place_of("a") in places
    with inductor_config.patch(fx_graph_cache=False):
        assert _kept.place_of("a") is None
    with inductor_config.patch(force_disable_caches=True):
        assert _kept.place_of("a") is None


@pytest.mark.usefixtures("empty_cache")
def test_a_pass_is_compiled_by_one_process_at_a_time() -> None:
    function, place = direct(), _kept.place_of(direct()._name)
    assert place is not None
    place.parent.mkdir(parents=True)
    with FileLock(place.with_suffix(".lock")):
        assert function.compile(arguments(), wait=False) is None
    assert function.compile(arguments(), wait=False) is not None


CALLS = [_compile.Call(_compile.Pass(statistics, "cpu", (i,)), tuple(x.to("meta") for x in arguments())) for i in range(2)]


@pytest.mark.usefixtures("empty_cache")
def test_another_process_helps() -> None:
    _helper._start(CALLS, [])
    (process,) = _helper._running
    assert process.wait(timeout=300) == 0
    before = counters["adafactor_compiled"]["passes_compiled"]
    for call in CALLS:
        function = direct(call.key.variant)
        assert function.is_kept()
        function(*arguments())
    assert counters["adafactor_compiled"]["passes_compiled"] == before


@pytest.mark.parametrize(
    ("calls", "threads", "ranks", "helps"),
    [(2, 2, 1, True), (1, 2, 1, True), (0, 2, 1, False), (2, 1, 1, False), (2, 2, 2, False)],
)
def test_who_is_helped(calls: int, threads: int, ranks: int, helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(_helper, "_start", lambda calls, others: started.append((calls, others)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with inductor_config.patch(compile_threads=threads), _helper.helped(CALLS[:calls], {}, CALLS):
        pass
    assert started == ([(CALLS[:calls], CALLS)] if helps else [])


@pytest.mark.parametrize("parent_lives", [True, False])
def test_it_goes_on_with_other_kinds_at_a_low_priority(parent_lives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    parents = iter([1, 1, *[1 if parent_lives else 0] * 2])
    stdin = io.TextIOWrapper(io.BytesIO(pickle.dumps((torch.get_num_threads(), CALLS[:1], CALLS))))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "nice", done.append)
    monkeypatch.setattr(Direct, "compile", lambda self, arguments, wait: done.append((self._name, wait)))
    _helper.main()
    first, second = ((direct(call.key.variant)._name, False) for call in CALLS)
    assert done == [first, 10, *([first, second] if parent_lives else [])]


def test_it_ends_with_its_parent() -> None:
    _helper._start(CALLS, CALLS)
    (process,) = _helper._running
    _helper.stop()
    assert process.returncode == -signal.SIGKILL
    assert not _helper._running
