"""How soon does work stop when its client has gone? Client, gateway, Kafka, worker: each a process of its own.

    python benchmarks/disconnect.py --times 40

A client closes its connection while its request runs, or in the middle of a stream; what is measured is the time from
there until `run_remote` sees its cancellation. Both are read from the clock of this machine.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import chains_stream as chains

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))  # it is loaded as a Chain file too

from benchmarks import processes  # noqa: E402 - only now it is found

WIDE = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))


def tell(folder: str, name: str, what: str) -> None:
    Path(folder, f"{name} {what}").write_text(str(time.time()), encoding="ascii")


async def wait(name: str, folder: str) -> None:
    """Tell by a file that it began, and when it was cancelled."""
    tell(folder, name, "began")
    try:
        await asyncio.Event().wait()
    finally:
        tell(folder, name, "ended")


@chains.mark_entrypoint
class Unary(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, name: str, folder: str) -> str:
        await wait(name, folder)
        return name


@chains.mark_entrypoint
class Stream(chains.ChainletBase):
    remote_config = WIDE

    async def run_remote(self, name: str, folder: str) -> AsyncIterator[str]:
        yield name
        await wait(name, folder)


def content(path: Path) -> str | None:
    return path.read_text(encoding="ascii") if path.exists() else None


async def until(path: Path, least: int = 0) -> str:
    """Wait until a file is there, with so many characters, and give them: its writer is another process."""
    async with asyncio.timeout(30):
        while (found := content(path)) is None or len(found) < least:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    return found


async def once(url: str, name: str, folder: str) -> float:
    """Send a request, leave while it runs, and give the ms until it was cancelled."""
    parts = urlsplit(url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps({"name": name, "folder": folder})
    head = f"POST /run_remote HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(f"{head}\r\n\r\n{body}".encode())
    await until(Path(folder, f"{name} began"))
    left = time.time()
    writer.transport.abort()
    return (float(await until(Path(folder, f"{name} ended"), least=1)) - left) * 1000


async def measure(url: str, folder: str, times: int) -> list[float]:
    await once(url, "warm", folder)
    return sorted([await once(url, f"n{number}", folder) for number in range(times)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", help="kafka://host:port; one of our own is started if none is named")
    parser.add_argument("--times", type=int, default=40)
    given = parser.parse_args(arguments)
    print(processes.machine())
    with processes.kafka(given.broker) as url:
        for kind in ("Unary", "Stream"):
            common = (f"{HERE}:{kind}", "--broker", url, "--namespace", f"disconnect-{uuid4().hex[:8]}")
            with ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                stack.enter_context(processes.chains("worker", *common))
                gateway = stack.enter_context(processes.chains("gateway", *common, "--port", "0"))
                found = asyncio.run(measure(gateway.url, folder, given.times))
            median, most = statistics.median(found), found[-1]
            print(
                f"{kind}: cancelled {median:.1f} ms after the client left (median of {len(found)}, most {most:.1f} ms)"
            )


if __name__ == "__main__":
    main()
