"""The progress bar of a first step, on a terminal and on whatever else stands in for standard error."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import pytest
import torch
from compilers import aot_eager, compiled_by

from adafactor_compiled import Adafactor
from adafactor_compiled._compile.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# option, whether standard error is a terminal, whether a bar is shown
BARS = [(None, True, True), (None, False, False), (True, False, True), (False, True, False)]


@pytest.mark.parametrize(("show_progress", "terminal", "shown"), BARS)
def test_progress(show_progress: bool | None, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    optimizer = Adafactor(
        [torch.ones(shape, requires_grad=True) for shape in [(4, 6), (7,)]], compile=True, show_progress=show_progress
    )
    monkeypatch.setattr(sys, "stderr", stream)
    with compiled_by(aot_eager):
        optimizer.warm_up()
        monkeypatch.setattr(sys, "stderr", again := Terminal())
        optimizer.warm_up()
    text = stream.getvalue()
    assert bool(text) == shown
    if shown:
        assert "compiling Adafactor [" in text
        assert "0/2" in text  # a matrix, and vectors
        assert text.endswith("\r\x1b[K")  # the bar vanishes
    assert "compiling" not in again.getvalue()  # nothing was left to compile


class Broken(Terminal):
    """A terminal that has gone."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


class WithoutIsatty:
    """As some loggers stand in for standard error."""

    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> None:
        self.written += text

    def flush(self) -> None:
        pass


def closed(stream: io.StringIO) -> io.StringIO:
    stream.close()
    return stream


STREAMS = {
    "None": lambda: None,
    "closed": lambda: closed(io.StringIO()),
    "closed terminal": lambda: closed(Terminal()),
    "without isatty": WithoutIsatty,
    "broken": Broken,
    "without anything": object,
    "terminal": Terminal,
}


@pytest.mark.parametrize("show", [None, True, False])
@pytest.mark.parametrize("name", STREAMS)
def test_progress_survives_standard_error(name: str, show: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = STREAMS[name]()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(["a", "b"], "title", show)) == ["a", "b"]
    if isinstance(stream, WithoutIsatty):
        assert bool(stream.written) == (show is True)
    if type(stream) is Terminal and not stream.closed:
        assert bool(stream.getvalue()) == (show is not False)
        assert stream.getvalue().endswith("\x1b[K") or show is False
