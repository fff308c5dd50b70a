"""Several gateway processes on one port: the parent, which serves nothing itself, and a child's link to it.

Each place for a child has a listening socket of its own, among which the kernel spreads connections (SO_REUSEPORT). The
parent holds them all open: what waits to be accepted outlives the child, and the next one in its place takes it. Where
the kernel does not spread (all but Linux), the places share one socket.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NoReturn

import click

from chains_stream.cli.hosting import guard, need_cluster
from chains_stream.cli.options import parameter_flags
from chains_stream.cli.process import Signals, end, print_line, run, until_stopped
from chains_stream.cli.report import FAILED, StoppedError
from chains_stream.errors import ChainsRuntimeError, ChainsUsageError
from chains_stream.gateway.server import SLACK, bind, explain
from chains_stream.log import get_logger
from chains_stream.settings import Settings

SOON = 10.0  # seconds: a child that ends sooner than that after its start may do so for ever
GIVE_UP = 5  # such ends of one place in a row, until the parent ends too
FIRST_DELAY = 0.5  # seconds until the second such child is replaced; doubled with each
PATIENT = (
    10.0  # seconds that new connections may wait for the next child in a place; if it takes longer, others get them
)
CLOSING = 30.0  # seconds beyond the grace period that a child has to let go of the broker, until it is killed

_STOP = b"stop\n"

log = get_logger(__name__)


class EndedError(Exception):
    """A child ended before it was ready."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a gateway process ended with status {status} before it was ready")
        self.status = status


class Link:
    """A child's side: the socket that it serves, and the channel to its parent."""

    def __init__(self, listening: int, channel: int) -> None:
        self.socket = socket.socket(fileno=listening)
        self._channel = socket.socket(fileno=channel)
        self._writer: asyncio.StreamWriter | None = None

    def announce(self, text: str) -> None:
        """Tell the parent that this process serves."""
        assert self._writer is not None, "followed"
        self._writer.write(text.encode() + b"\n")

    @asynccontextmanager
    async def followed(self, signals: Signals) -> AsyncIterator[None]:
        """Do as the parent says for the length of the block: a parent that is gone wants its children to stop."""
        reader, self._writer = await asyncio.open_connection(sock=self._channel)
        task = asyncio.create_task(self._follow(reader, signals), name="parent")
        try:
            yield
        finally:
            await end(task)
            self._writer.close()

    async def _follow(self, reader: asyncio.StreamReader, signals: Signals) -> None:
        with suppress(ConnectionError):
            if await reader.readline() == _STOP:
                signals.stop(signal.SIGTERM)
                await reader.readline()
        if signals.received is not None:  # it did not wait for our end: it had a second signal
            os._exit(128 + signals.received)
        log.warning("gateway.parent_gone", reason="the process that started this one has ended")
        signals.stop(signal.SIGTERM)


class Child:
    """A gateway process, as its parent sees it.

    Attributes:
        ended: gives its status.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._ready = False
        self._began = time.monotonic()
        self.pid = process.pid
        self.ended = asyncio.create_task(self._end(), name=f"gateway process {process.pid}")

    async def ready(self) -> str:
        """Wait until it serves, and give what it says then. Raises EndedError."""
        with suppress(ConnectionError):
            if line := await self._reader.readline():
                self._ready = True
                return line.decode().rstrip("\n")
        raise EndedError(await asyncio.shield(self.ended))

    async def _end(self) -> int:
        status = await self._process.wait()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()
        return status

    @property
    def age(self) -> float:
        return time.monotonic() - self._began

    async def stop(self, seconds: float) -> None:
        """Tell it to stop, and wait for its end; after so many `seconds` it is killed."""
        if self.ended.done():
            pass
        elif self._ready:
            # Not a signal: where all processes of a terminal or a container get one, it would be the second.
            self._writer.write(_STOP)
        else:
            self._process.terminate()  # it may not read yet
        await asyncio.wait({self.ended}, timeout=seconds)
        if not self.ended.done():
            log.error("gateway.process_killed", process=self.pid, reason=f"it had not ended after {seconds:g} s")
            self._process.kill()
            await asyncio.wait({self.ended})


class Place:
    """Where one child runs after another.

    Attributes:
        child: that serves here, or has ended last.
        starting: seconds that it took to be ready.
        changing: held by whoever starts the next one.
    """

    def __init__(self, listening: socket.socket) -> None:
        self.socket = listening
        self.child: Child
        self.starting = 0.0
        self.changing = asyncio.Lock()

    def shut(self) -> None:
        """Have the kernel send connections elsewhere until a child listens here again; those that wait are lost."""
        # Of a socket that does not listen, all connections that it ever took afterwards would be shut from the start.
        if self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self.socket.shutdown(socket.SHUT_RDWR)


class Fleet:
    """The children, and what is done for them."""

    def __init__(self, command: Sequence[str], settings: Settings) -> None:
        self._command = command
        self._patience = settings.grace_period + SLACK + CLOSING
        self._children: set[Child] = set()
        self._places: list[Place] = []
        self._spread = sys.platform == "linux"

    async def run(self, settings: Settings, signals: Signals) -> None:
        """Serve until a signal comes. Raises what keeps a child from serving."""
        renewal = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, renewal.set)
        try:
            listening = await _listening(settings, self._spread)
            self._places = [Place(each) for each in listening]
            await until_stopped(self._serve(renewal), signals)
        except StoppedError:
            log.info("stopping", signal=signals.name, reason="what runs may finish; a second signal ends it at once")
        finally:
            await asyncio.gather(*(child.stop(self._patience) for child in self._children))
            for place in self._places:
                place.socket.close()
            loop.remove_signal_handler(signal.SIGHUP)
        log.info("stopped")

    async def _serve(self, renewal: asyncio.Event) -> None:
        first, *others = self._places
        said = await self._start(first)  # alone: what is wrong with a Chain is said once
        starting = [asyncio.create_task(self._start(place)) for place in others]
        try:
            await asyncio.gather(*starting)
        finally:
            await end(*starting)
        print_line(said)
        tasks = [asyncio.create_task(self._keep(place)) for place in self._places]
        tasks.append(asyncio.create_task(self._renew_when(renewal)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(*tasks)

    async def _start(self, place: Place) -> str:
        """Start a child in a place, and wait until it serves; give what it says. Raises EndedError."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        with theirs:
            fds = place.socket.fileno(), theirs.fileno()
            link = ("--workers", "1", "--link", f"{fds[0]},{fds[1]}")
            try:
                process = await asyncio.create_subprocess_exec(
                    # Without -P the current folder would come first on the path, as it does not for `chains`.
                    *(sys.executable, "-P", "-m", "chains_stream", "gateway", *self._command, *link),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=fds,
                )
            except BaseException:
                writer.close()
                raise
        child = Child(process, reader, writer)
        self._children.add(child)
        child.ended.add_done_callback(lambda _: self._children.discard(child))
        said = await child.ready()
        place.child, place.starting = child, child.age
        log.info("gateway.process_ready", process=child.pid)
        return said

    async def _keep(self, place: Place) -> None:
        """Replace whichever child of a place ends. Raises ChainsRuntimeError if they all do so soon."""
        soon = 0
        while True:
            child = place.child
            await asyncio.wait({child.ended})
            async with place.changing:
                if place.child is not child:
                    continue
                status, age = child.ended.result(), child.age
                log.warning("gateway.process_ended", process=child.pid, status=status, seconds=round(age, 1))
                soon = soon + 1 if age < SOON else 0
                while place.child is child:
                    await self._delay(place, soon, status)
                    try:
                        await self._start(place)
                    except EndedError as error:
                        soon, status = soon + 1, error.status
                        log.warning("gateway.process_ended", status=status, reason="before it was ready")

    async def _delay(self, place: Place, soon: int, status: int) -> None:
        if soon >= GIVE_UP:
            raise ChainsRuntimeError(
                f"a gateway process ended {soon} times in a row soon after its start, with status {status} at last"
            )
        # Only while no child is there: one that starts may be listening already.
        if self._spread and (soon > 1 or place.starting > PATIENT):
            place.shut()
        if soon > 1:
            await asyncio.sleep(FIRST_DELAY * 2 ** (soon - 2))

    async def _renew_when(self, renewal: asyncio.Event) -> NoReturn:
        """Replace one child after another whenever `renewal` is set: the next one serves before the old one stops."""
        while True:
            await renewal.wait()
            renewal.clear()
            log.info("gateway.renewing", processes=len(self._places))
            for place in self._places:
                async with place.changing:
                    old = place.child
                    try:
                        await self._start(place)
                    except EndedError as error:
                        log.warning("gateway.not_renewed", status=error.status, reason="those that serve go on")
                        break
                await old.stop(self._patience)
            else:
                log.info("gateway.renewed", processes=len(self._places))


def supervise(file: str, flags: Mapping[str, str | None], settings: Settings) -> None:
    """Run as many gateway processes as the settings say, with the flags of this one. Raises ChainsUsageError."""
    need_cluster(settings)
    given = {name: value for name, value in flags.items() if value is not None and name != "workers"}
    command = [file, *parameter_flags(), *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]

    async def work(signals: Signals) -> None:
        await Fleet(command, settings).run(settings, signals)

    try:
        run(work)
    except EndedError as error:  # it has said why
        raise click.exceptions.Exit(error.status if error.status > 0 else FAILED) from error


async def _listening(settings: Settings, spread: bool) -> list[socket.socket]:  # noqa: FBT001
    """Give a bound socket for each place. Raises ChainsUsageError."""
    host, port, count = settings.host, settings.port, settings.workers
    try:
        first = await bind(host, port)
    except (OSError, UnicodeError) as error:
        raise ChainsUsageError(explain(host, port, error)) from error
    sockets = []
    try:
        guard(settings, first)
        if not spread:
            return [first.dup() for _ in range(count)]
        # Only now: bound with it, the first would not notice that another server has the port.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        for _ in range(count):
            # Bound to a port by its number, also where any would do: a socket that the kernel chose one for lets go of
            # it when its place is shut.
            another = socket.socket(first.family, first.type, first.proto)
            sockets.append(another)
            another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            another.bind(first.getsockname())
    except BaseException:
        for each in sockets:
            each.close()
        raise
    finally:
        first.close()
    return sockets
