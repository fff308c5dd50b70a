"""An answer as it arrives: frames in, a result or the chunks of a stream out, whoever reads them and from where.

`calls.Call` is the answer to a request of this process; `following.Following` is one read back from the log.
"""

import asyncio
from collections.abc import Awaitable

import msgspec

from chains_stream.errors import CallCancelledError, StreamInterruptedError, from_detail
from chains_stream.fold import Fold, Step
from chains_stream.messages import Cancelled, Chunk, Done, Failed, Frame

NOTHING = msgspec.Raw()


class Waited:
    """Something whose changes are waited for, by any number of tasks."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)


class Answer(Waited):
    """Makes a result or a stream of the frames that answer one request (`fold`).

    Attributes:
        id: the correlation id.
        had: chunks at its beginning that the reader has already: they are not given, and may not change.
        ended: whether nothing more comes.
        answered: whether it was the callee that ended it: there is nothing left to cancel.
    """

    __slots__ = (
        "_chunks",
        "_error",
        "_fold",
        "_modules",
        "_nudged",
        "_taken",
        "_taken_size",
        "_value",
        "answered",
        "ended",
        "had",
        "id",
    )

    def __init__(self, correlation_id: bytes, modules: tuple[str, ...], had: int = 0) -> None:
        super().__init__()
        self.id = correlation_id
        self.had = had
        self.ended = False
        self.answered = False
        self._modules = modules
        self._fold = Fold()
        self._chunks: list[msgspec.Raw | str] = []  # a str is where one lies in the store
        self._value: msgspec.Raw | str = NOTHING
        self._error: Exception | None = None
        self._nudged = False
        self._taken = self._taken_size = 0  # by the reader of the stream

    @property
    def chunks(self) -> int:
        """How many chunks of the stream have arrived, those that its reader had among them."""
        return self._fold.chunks

    @property
    def failure(self) -> Exception | None:
        """What the callee has failed with."""
        return self._error if self.answered else None

    async def result(self) -> msgspec.Raw:
        """Wait for the end of a unary call."""
        while not self.ended:
            await self._wait()
        if self._error is not None:
            raise self._error
        if isinstance(self._value, str):
            self._value = await self._fetch(self._value)
        return self._value

    async def next(self) -> list[msgspec.Raw] | None:
        """Wait for a chunk of a stream, and give all that are there, up to a part of the window; None at the end.

        Whoever comes back is done with those of the time before: only then the worker may send as many more.
        """
        self._credit()
        self._nudged = False
        while True:
            while not self._chunks:
                if self._nudged:
                    return []
                if self.ended:
                    if self._error is not None:
                        raise self._error
                    return None
                await self._wait()
            head = self._chunks[0]
            if not isinstance(head, str):
                return self._take(self._at_once())
            chunk = await self._fetch(head)
            if self._chunks and self._chunks[0] is head:  # else another worker has begun it again meanwhile
                self._chunks[0] = chunk
                return self._take((1, 0))

    def nudge(self) -> None:
        """Have whoever waits for a chunk now be given none."""
        self._nudged = True
        self._wake()

    def close(self) -> None:
        """Let go of it. May be called again."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """End it with an error of this side."""
        if not self.ended:
            self._end(error)

    def feed(self, frame: Frame, reference: str | None = None) -> None:
        """Take one frame from the log; `reference` is where its value lies if that is in the store."""
        if self.ended:
            return
        if self._fold.begins_again(frame) and not self._begin_again():
            return
        step = self._fold.take(frame)
        if step is Step.GAP:
            self._end(self._interrupted("chunks of it are missing"))
            return
        if step is Step.DROP:
            return
        match frame:
            case Chunk(value=value):
                self._add(value, reference)
            case Done(value=value):
                self._value = reference or value
                self._answer(None)
            case Failed(error=detail):
                self._answer(from_detail(detail, modules=self._modules))
            case Cancelled():
                self._answer(CallCancelledError("the request was cancelled"))
            case _:  # Fold drops the others
                pass

    # --- for those derived from it

    def _fetch(self, reference: str) -> Awaitable[msgspec.Raw]:
        """Fetch a result or a chunk that was too large for its record. Raises StoreError."""
        raise NotImplementedError

    def _at_once(self) -> tuple[int, int]:
        """Give how many chunks, and how many bytes, of a stream its reader is given at once."""
        raise NotImplementedError

    def _credit(self) -> None:
        """Tell the worker, if it is time to, how much its reader has taken."""
        raise NotImplementedError

    def _over(self) -> None:
        """The callee has ended it."""

    def _take(self, limits: tuple[int, int]) -> list[msgspec.Raw]:
        """Take chunks from the head, one at least, until there are so many, or so many bytes."""
        most, size = limits
        taken: list[msgspec.Raw] = []
        before = self._taken_size
        for chunk in self._chunks:
            if isinstance(chunk, str) or len(taken) >= most or (taken and self._taken_size - before >= size):
                break
            taken.append(chunk)
            self._taken_size += len(memoryview(chunk))
        self._taken += len(taken)
        del self._chunks[: len(taken)]
        return taken

    def _add(self, value: msgspec.Raw, reference: str | None) -> None:
        if self._fold.chunks <= self.had:
            self._taken += 1
            self._taken_size += len(memoryview(value))
        else:
            self._chunks.append(reference or value)
            self._wake()

    def _answer(self, error: Exception | None) -> None:
        self.answered = True
        self._end(error)

    def _begin_again(self) -> bool:
        """Another worker runs a stream from its beginning: False if something of it was shown, and must not change."""
        if self._taken:
            self._end(self._interrupted("its worker was lost"))
            return False
        self._chunks.clear()
        return True

    def _interrupted(self, reason: str) -> StreamInterruptedError:
        received = self._fold.chunks
        return StreamInterruptedError(f"the stream broke off after {received} chunks: {reason}", chunks=received)

    def _end(self, error: Exception | None) -> None:
        self.ended = True
        self._error = error
        if self.answered:
            self._over()
        self._wake()
