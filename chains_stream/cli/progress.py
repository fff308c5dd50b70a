"""What a person sees of long work on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType
from typing import Any, Self

import click

from chains_stream.cli.report import say

EVERY = 10.0  # seconds between two lines, where there is no bar
_TO_LINE_START = "\r\x1b[K"  # and clear the line


class Progress:
    """Shows how much is done, of a total if that is known. Lines that are said meanwhile go through it."""

    def __init__(self, unit: str, total: int | None, *, bar: bool = True) -> None:
        self._unit = unit
        self._total = total
        self._shown = 0
        self._last = time.monotonic()
        self._bar: Any = None
        if bar and total is not None and sys.stderr.isatty():
            self._bar = click.progressbar(length=total, file=sys.stderr, show_pos=True, show_eta=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
            self._bar = None

    def show(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._shown)
        elif time.monotonic() - self._last >= EVERY and done > self._shown:
            self._last = time.monotonic()
            say(f"{done:,} {self._unit} done" if self._total is None else f"{done:,} of {self._total:,} {self._unit}")
        else:
            return
        self._shown = done

    def say(self, text: str) -> None:
        if self._bar is not None:
            click.echo(_TO_LINE_START, err=True, nl=False)
        say(text)
