"""A worker that is killed loses nothing: what it had begun, and not answered, another one runs."""

import asyncio
import signal

import msgspec
import pytest

from chains_stream.load import Result
from tests.acceptance.command import HERE, Command, Commands
from tests.acceptance.loading import load

FILE = str(HERE / "chains" / "load.py")
REQUESTS = 3_000

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


async def load_and_kill(url: str, victim: Command, after: int) -> Result:
    """Send all requests, and kill a worker when so many are answered."""
    answered = 0

    def expected(body: bytes, answer: bytes) -> bool:
        nonlocal answered
        answered += 1
        if answered == after:
            victim.send(signal.SIGKILL)
        return bool(int(answer) == msgspec.json.decode(body)["number"] + 1)

    bodies = [msgspec.json.encode({"number": number}) for number in range(REQUESTS)]
    return await load(url, bodies, 64, accept="application/json", expected=expected)


@pytest.mark.parametrize("killed", ["Above", "Below"])
def test_every_request_is_answered_when_a_worker_is_killed(
    start: Commands, kafka_url: str, namespace: str, killed: str
) -> None:
    common = ("--broker", kafka_url, "--namespace", namespace)
    victim, *others = [
        start("worker", f"{FILE}:Above", "--chainlet", name, *common) for name in (killed, "Above", "Below")
    ]
    gateway = start("gateway", f"{FILE}:Above", "--port", "0", *common)
    url = [command.ready() for command in (victim, *others, gateway)][-1]
    result = asyncio.run(load_and_kill(url, victim, REQUESTS // 3))
    assert victim.wait() == -signal.SIGKILL
    assert (result.completed, result.failed, result.unfinished) == (REQUESTS, {}, 0)
