"""A script that calls a Chain over Kafka: `chains.connect`, and nothing else.

python -m benchmarks.chains.caller benchmarks/chains/echo.py:Echo kafka://HOST:PORT NAMESPACE
"""

import argparse
from typing import Any

import chains_stream as chains
from benchmarks import driving
from benchmarks.rivals import loop
from chains_stream.chain import Chain


async def call(entrypoint: type[Any], url: str, namespace: str, *, submit: bool) -> None:
    chain: Any  # whichever it is
    async with chains.connect(url, entrypoint, namespace=namespace) as chain:

        async def submitted(text: str) -> Any:
            return await (await chain.submit(text)).result()

        await driving.drive(submitted if submit else chain.run_remote, driving.text_payload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", help="FILE:NAME")
    parser.add_argument("url")
    parser.add_argument("namespace")
    parser.add_argument("--submit", action="store_true", help="wait until a request is stored, then for its result")
    given = parser.parse_args()
    loop.run(call(Chain.load(given.chain).entrypoint, given.url, given.namespace, submit=given.submit))


if __name__ == "__main__":
    main()
