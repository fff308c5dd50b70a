"""Load whose every answer is looked at."""

from collections.abc import Callable, Sequence

from chains_stream.load import FailedError, Result, calls, closed_loop
from chains_stream.load_http import Client


async def load(
    url: str, bodies: Sequence[bytes], in_flight: int, *, accept: str, expected: Callable[[bytes, bytes], bool]
) -> Result:
    """Send all bodies, `in_flight` at once; an answer that is not what is expected of its request is a failure."""
    waiting = iter(bodies)
    async with Client(url, accept=accept) as client:

        async def send() -> None:
            body = next(waiting)
            answer = await client.post(body)
            answer.check()
            if not expected(body, answer.content):
                raise FailedError(f"wrong answer {answer.content[:100]!r}")

        return await closed_loop(calls(send), in_flight=in_flight, count=len(bodies))


def shown(result: Result) -> str:
    """Write the figures for who runs a test with -s."""
    assert result.latency is not None, "something was answered"
    times = ", ".join(f"{name} {getattr(result.latency, name) * 1000:.1f} ms" for name in ("p50", "p99", "max"))
    return f"{result.completed} answered, {result.rate_per_s:,.0f}/s, {times}"
