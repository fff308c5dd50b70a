"""One case: what is sent over one connection, how, and whether what comes back is right."""

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from urllib.parse import SplitResult, urlsplit

from tests.fuzz import answers
from tests.fuzz.answers import Answer, WrongError
from tests.fuzz.drafts import Draft, draft
from tests.fuzz.mutations import damage, mutate

PATIENCE = 20.0  # seconds until a connection that is neither answered nor closed counts as stuck
MAX_AHEAD = 20  # requests that are sent at once: the server takes 16 beyond the first
PAUSE = 0.01  # seconds between pieces
AHEAD_SHARE = 0.1  # of cases that send more than one request
DAMAGED_SHARE = 0.25
LATER_SHARE = 0.9
READ = 64 << 10
_RESET = struct.pack("ii", 1, 0)


class Way(Enum):
    """How a client behaves."""

    ASKS = "reads one answer"
    STAYS = "reads to the end"
    SLOWLY = "sends in pieces"
    LEAVES = "leaves in the middle"
    SHUTS = "shuts its sending side"


_WAYS = (Way.ASKS, Way.ASKS, Way.ASKS, Way.ASKS, Way.ASKS, Way.ASKS, Way.STAYS, Way.SLOWLY, Way.LEAVES, Way.SHUTS)


@dataclass
class Case:
    """Made of a seed and a number, and of ids that the servers gave."""

    number: int
    server: int
    way: Way
    data: bytes
    requests: int
    head: bool
    cuts: Sequence[int]  # where it is sent in pieces
    resets: bool  # how the client leaves
    frames: bytes = b""  # sent once it is a WebSocket

    @classmethod
    def make(cls, seed: int, number: int, ids: Sequence[str]) -> "Case":
        choice = random.Random(f"{seed} {number}")
        first = draft(choice, ids)
        data, frames = _malformed(choice, first)
        requests = 1
        head = data.lstrip().startswith(b"HEAD ")
        if choice.random() < AHEAD_SHARE and not head:
            requests = choice.choice((2, 3, MAX_AHEAD))
            for _ in range(requests - 1):
                after = draft(choice, ids)
                after.method = "GET" if after.method == "HEAD" else after.method
                data += b"".join(_malformed(choice, after)) if choice.random() < 0.5 else after.write()
        cuts = sorted(choice.randrange(len(data) + 1) for _ in range(choice.randrange(1, 4)))
        way, resets = choice.choice(_WAYS), choice.choice((True, False))
        return cls(number, first.server, way, data, requests, head, cuts, resets, frames)


@dataclass
class Outcome:
    """What became of a case: its answers, or the word for none."""

    statuses: Counter[str]
    wrong: str = ""


async def strike(case: Case, url: str) -> Outcome:
    """Run a case, and judge what comes of it."""
    client = _Client(case)
    try:
        async with asyncio.timeout(PATIENCE):
            await client.run(urlsplit(url))
        return client.outcome()
    except TimeoutError:
        return Outcome(Counter(), f"neither answered nor closed within {PATIENCE:g} s; got {client.data[:200]!r}")
    except WrongError as error:
        return Outcome(Counter(), str(error))


class _Client:
    """A client over a raw socket."""

    def __init__(self, case: Case) -> None:
        self.data = b""
        self._case = case
        self._ended = self._reset = self._talks = False
        self._answers: list[Answer] = []

    async def run(self, url: SplitResult) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, (url.hostname, url.port))
            if self._case.resets:  # closing tells the other side of a failure
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sending = asyncio.create_task(self._send(connection))
            try:
                if self._case.way is Way.LEAVES:
                    await sending
                else:
                    await self._read(connection)
            finally:
                sending.cancel()
                await asyncio.wait([sending])

    async def _send(self, connection: socket.socket) -> None:
        loop, case = asyncio.get_running_loop(), self._case
        try:
            match case.way:
                case Way.SLOWLY:
                    for start, end in pairwise((0, *case.cuts, len(case.data))):
                        await loop.sock_sendall(connection, case.data[start:end])
                        await asyncio.sleep(PAUSE)
                case Way.LEAVES:
                    await loop.sock_sendall(connection, case.data[: case.cuts[-1]])
                    await asyncio.sleep(PAUSE * (case.number % 3))
                case _:
                    await loop.sock_sendall(connection, case.data)
                    if case.way is Way.SHUTS:
                        connection.shutdown(socket.SHUT_WR)
        except OSError:  # the server has closed: what it said before tells why
            self._reset = True

    async def _read(self, connection: socket.socket) -> None:
        loop, case = asyncio.get_running_loop(), self._case
        while not self._ended:
            try:
                read = await loop.sock_recv(connection, READ)
            except ConnectionResetError:
                self._reset, read = True, b""
            self.data += read
            self._ended = not read
            self._answers = answers.read(self.data, head=case.head, ended=self._ended and not self._reset)
            talks = bool(self._answers) and self._answers[-1].status == answers.SWITCHING
            if talks and not self._talks:
                self._talks = True
                await self._send_frames(connection)
            whole = bool(self._answers[-1].body) if talks else len(self._answers) >= case.requests
            if whole and case.way is not Way.STAYS:
                return

    async def _send_frames(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(connection, self._case.frames)
        except OSError:
            self._reset = True

    @property
    def _may_be_cut_short(self) -> bool:
        """Whether the server may break an answer off: the client says that it has left, or leaves it no time."""
        return self._case.way is Way.SHUTS or b"x-request-timeout" in self._case.data

    def outcome(self) -> Outcome:
        case = self._case
        for answer in self._answers:
            answers.judge(answer, head=case.head, of_openai=b"/v1/" in case.data)
        if any(not answer.whole for answer in self._answers) and not self._may_be_cut_short:
            raise WrongError(f"an answer is cut short: {self.data[-300:]!r}")
        statuses = Counter(f"{answer.status}{'' if answer.whole else ', cut short'}" for answer in self._answers)
        if not statuses:
            if case.way in (Way.LEAVES, Way.SHUTS):
                word = f"none: the client {case.way.value}"
            else:
                word = "none: reset" if self._reset else "none: closed, as it was no whole request"
            statuses[word] += 1
        return Outcome(statuses)


def _malformed(choice: random.Random, made: Draft) -> tuple[bytes, bytes]:
    """Write a request with one to three mistakes; and its frames, which most clients send once they may."""
    for _ in range(choice.choice((1, 1, 1, 2, 3))):
        mutate(choice, made)
    frames = b""
    if choice.random() < LATER_SHARE:
        frames, made.frames = made.frames, b""
    data = made.write()
    return (damage(choice, data) if choice.random() < DAMAGED_SHARE and not frames else data), frames
