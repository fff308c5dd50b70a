"""The synthetic engine alone, read in its own process: nothing can be faster.

python -m benchmarks.rivals.engine
"""

import time
from collections.abc import AsyncIterator

from benchmarks import pacing
from benchmarks.rivals import loop


async def read(engine: pacing.Engine) -> AsyncIterator[tuple[float, list[str]]]:
    async for text in pacing.generate(engine):
        yield time.monotonic(), [text]


def main() -> None:
    loop.run(pacing.drive(read))


if __name__ == "__main__":
    main()
