"""Requests that go on after their client has left, because it asked for that: ``Prefer: resume=<seconds>``."""

import asyncio

from chains_stream.calls import Call, FellBehindError
from chains_stream.control import Message, Reading
from chains_stream.errors import ChainsError, remote_detail


class Kept:
    """Takes what comes of such requests, so that their workers go on, and cancels those that nobody comes back to.

    Who reads one again may do so through any gateway: the control topic tells of them. What a gateway keeps when it
    ends runs on to its deadline.
    """

    def __init__(self, most: int) -> None:
        """Keep so many requests, `most`: of more, those whose client leaves are cancelled at once."""
        self._most = most
        self._waits: dict[bytes, _Wait] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, call: Call) -> None:
        """Count the readers of a call that may have to be kept: they may come before its client leaves."""
        self._waits[call.id] = _Wait()

    def forget(self, call: Call) -> None:
        """Do so no more."""
        self._waits.pop(call.id, None)

    def keep(self, call: Call, seconds: float) -> bool:
        """Let a call that is watched run on, for as long as it is read, and at most `seconds` after nobody did.

        False if there are too many.
        """
        if len(self._tasks) >= self._most:
            return False
        task = asyncio.create_task(self._keep(call, self._waits[call.id], seconds), name="keep")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def handle(self, message: Message) -> None:
        """Hear of readers."""
        if isinstance(message, Reading) and (wait := self._waits.get(message.correlation_id)) is not None:
            wait.readers = max(0, wait.readers + (1 if message.here else -1))
            wait.changed.set()

    async def close(self) -> None:
        """Let go of all. They are not cancelled."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _keep(self, call: Call, wait: "_Wait", seconds: float) -> None:
        draining = asyncio.create_task(_drain(call), name="drain")
        try:
            while not draining.done():
                changed = asyncio.create_task(wait.changed.wait())
                limit = None if wait.readers else seconds
                try:
                    done, _ = await asyncio.wait(
                        {draining, changed}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:  # also where the gateway ends meanwhile
                    changed.cancel()
                    await asyncio.wait([changed])
                wait.changed.clear()
                if not done:
                    break
            call.close()  # which cancels it unless it has ended
        finally:
            self.forget(call)
            draining.cancel()
            await asyncio.wait([draining])


class _Wait:
    """For readers of one request."""

    def __init__(self) -> None:
        self.readers = 0
        self.changed = asyncio.Event()


async def _drain(call: Call) -> None:
    """Take the chunks of a stream until its end."""
    try:
        async with asyncio.timeout(max(0.0, call.scope.remaining)):
            while await call.next() is not None:
                pass
    except FellBehindError:  # whoever reads it from the log has it go on
        await asyncio.sleep(max(0.0, call.scope.remaining))
    except TimeoutError:
        pass  # its deadline: whoever reads it from the log is told so by its worker
    except Exception as error:
        if not (isinstance(error, ChainsError) or remote_detail(error) is not None):
            raise
