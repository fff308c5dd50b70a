"""A script that calls a Chain over Kafka: `chains.connect`, and nothing else.

python -m benchmarks.chains.caller benchmarks/chains/echo.py:Echo kafka://HOST:PORT NAMESPACE
"""

import argparse
from typing import Any

import chains_stream as chains
from benchmarks import driving
from benchmarks.rivals import loop
from chains_stream.chain import Chain


async def call(entrypoint: type[Any], url: str, namespace: str) -> None:
    async with chains.connect(url, entrypoint, namespace=namespace) as chain:
        await driving.drive(chain.run_remote, driving.text_payload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", help="FILE:NAME")
    parser.add_argument("url")
    parser.add_argument("namespace")
    given = parser.parse_args()
    loop.run(call(Chain.load(given.chain).entrypoint, given.url, given.namespace))


if __name__ == "__main__":
    main()
