"""Lines of JSON: a file of them, or stdin, as what a Chainlet is fed from, and another one as what it writes to."""

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from chains_stream.broker import Record, TopicSpec
from chains_stream.cli.output import one_line
from chains_stream.errors import BrokerError, ChainsUsageError
from chains_stream.messages import Headers, now_ms

STANDARD = "-"  # in the place of a file's name: stdin or stdout
LONGEST_LINE = 16 << 20  # bytes: what has no end is not held for ever
_READ = 256 << 10  # bytes at once
_BOM = b"\xef\xbb\xbf"


class LineSupply:
    """The lines of a file, each a record of one partition, whose offset is the number of its line, from 0."""

    def __init__(self, name: str, topic: str, too_long: Callable[[int], None]) -> None:
        """Read the file of that name as `topic`; `too_long` is told of lines that are. Raises ChainsUsageError."""
        self.starts = {0: 0}
        self._topic = topic
        self._too_long = too_long
        self._reading = _Reading(_opened(name), ours=name != STANDARD)
        self._partial = b""
        self._skipping = False  # the rest of a line that is too long
        self._number = 0  # of the next line
        self._lines: list[tuple[int, bytes]] = []  # the last one is next
        self._ended = False

    async def fetch(self, max_records: int) -> list[Record]:
        while not self._lines and not self._ended:
            self._split(await self._reading.next())
        now = now_ms()
        taken = [self._lines.pop() for _ in range(min(max_records, len(self._lines)))]
        return [Record(self._topic, 0, number, now, None, line, ()) for number, line in taken]

    def close(self) -> None:
        self._reading.close()

    def _split(self, data: bytes) -> None:
        """Take what was read apart; nothing is the end."""
        *whole, self._partial = (self._partial + data).split(b"\n")
        if not data:
            self._ended = True
            if self._partial or self._skipping:
                whole.append(self._partial)
        found = [(self._number + index, line) for index, line in enumerate(whole)]
        if whole:
            if self._skipping:
                del found[0]
            self._skipping = False
            self._number += len(whole)
        if len(self._partial) > LONGEST_LINE:
            self._too_long(self._number)
            self._skipping = True
        if self._skipping:
            self._partial = b""
        if found and found[0][0] == 0:
            found[0] = (0, found[0][1].removeprefix(_BOM))
        self._lines = [(number, line) for number, line in reversed(found) if line.strip()]


class _Reading:
    """A file that a thread reads, as no event loop can wait for files of every kind."""

    def __init__(self, descriptor: int, *, ours: bool) -> None:
        """Read a descriptor, which is closed with this if it is `ours`."""
        self._descriptor = descriptor
        self._ours = ours
        self._asked: queue.SimpleQueue[asyncio.Future[bytes] | None] = queue.SimpleQueue()
        self._next: asyncio.Future[bytes] | None = None
        # Nobody waits for it at the end of the process: it may wait for a person to type.
        self._thread = threading.Thread(target=self._read, daemon=True, name="lines")
        self._thread.start()

    async def next(self) -> bytes:
        """Give what comes next; nothing at the end. Cancelling it loses nothing. Raises OSError."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            self._asked.put(self._next)
        data = await asyncio.shield(self._next)
        self._next = None
        return data

    def close(self) -> None:
        self._asked.put(None)

    def _read(self) -> None:
        while (future := self._asked.get()) is not None:
            data, failed = b"", None
            try:
                data = os.read(self._descriptor, _READ)
            except OSError as error:
                failed = error
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, data, failed)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
        if self._ours:
            os.close(self._descriptor)


def _settle(future: "asyncio.Future[bytes]", data: bytes, failed: OSError | None) -> None:
    if future.done():
        return
    if failed is None:
        future.set_result(data)
    else:
        future.set_exception(failed)


def _opened(name: str) -> int:
    if name == STANDARD:
        return sys.stdin.fileno()
    try:
        descriptor = os.open(name, os.O_RDONLY)
        os.read(descriptor, 0)  # of a folder it fails
    except OSError as error:
        raise ChainsUsageError(f"{name} can't be read: {error.strerror}") from error
    return descriptor


class LineOutlet:
    """A file that values are written to, a line each, as they come.

    Attributes:
        count: how many were written.
        broken: fails with what keeps it from writing.
    """

    def __init__(self, name: str, stdout: IO[bytes], *, append: bool = False) -> None:
        """Open the file, or take `stdout`: `sys.stdout` may be another one meanwhile. Raises ChainsUsageError."""
        self.count = 0
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._name = name
        self._stdout = stdout
        self._to = stdout if name == STANDARD else _to_write(name, append=append)
        self._storing: list[asyncio.Future[int]] = []  # what was written in this turn of the loop
        self._error: OSError | None = None

    async def ensure(self, spec: TopicSpec) -> None:
        """Nothing to create."""

    async def partitions(self) -> int:
        return 1

    async def record_limit(self) -> None:
        """Any line can be written."""

    async def publish(
        self,
        value: bytes,
        *,
        partition: int,  # noqa: ARG002 - there is but one
        key: bytes | None,  # noqa: ARG002 - a line is the value alone
        headers: Headers,  # noqa: ARG002 - as above
    ) -> "asyncio.Future[int]":
        if self._error is None:
            self._write(one_line(value) + b"\n")
        if self._error is not None:
            raise self._closed()
        loop = asyncio.get_running_loop()
        if not self._storing:
            loop.call_soon(self._flush)  # together with what else is written in this turn
        stored: asyncio.Future[int] = loop.create_future()
        self._storing.append(stored)
        self.count += 1
        return stored

    def close(self) -> None:
        """Write what is buffered. Raises OSError, of earlier writes too."""
        self._flush()
        if self._to is not self._stdout:
            with suppress(OSError):  # of what it could not flush
                self._to.close()
        if self._error is not None:
            raise self._error
        self.broken.cancel()

    def _write(self, line: bytes) -> None:
        try:
            self._to.write(line)
        except OSError as error:
            self._break(error)

    def _flush(self) -> None:
        if self._error is None:
            try:
                self._to.flush()
            except OSError as error:
                self._break(error)
        for stored in self._storing:
            if not stored.done():  # whoever awaited it may have been cancelled
                stored.set_result(self.count)
        self._storing.clear()

    def _break(self, error: OSError) -> None:
        self._error = error
        if not self.broken.done():  # else nobody waits for it any more, and `close` tells
            self.broken.set_exception(error)
            self.broken.exception()  # as below
        for stored in self._storing:
            if not stored.done():
                stored.set_exception(self._closed())
                stored.exception()  # nobody needs to await it
        self._storing.clear()

    def _closed(self) -> BrokerError:
        return BrokerError(f"{self._name}: nothing more can be written")


def _to_write(name: str, *, append: bool) -> IO[bytes]:
    try:
        return Path(name).open("ab" if append else "wb")
    except OSError as error:
        raise ChainsUsageError(f"{name} can't be written: {error.strerror}") from error


def same_file(one: str, other: str) -> bool:
    """Tell whether two names, neither of which may exist, are of one file."""
    try:
        return STANDARD not in (one, other) and Path(one).samefile(other)
    except OSError:
        return False
