"""The first Chain: greets everybody at once.

    chains call chainlets/hello.py '{"names": ["Ada", "Grace"]}'

calls it in one process; `chains run chainlets/hello.py` serves it over HTTP.
"""

import asyncio

import chains_stream as chains


class SayHello(chains.ChainletBase):
    """Takes one name, gives back one greeting."""

    async def run_remote(self, name: str) -> str:
        return f"Hello, {name}!"


@chains.mark_entrypoint
class HelloAll(chains.ChainletBase):
    """Takes a list of names, gives back their greetings, one a line and in the same order."""

    def __init__(self, say_hello: SayHello = chains.depends(SayHello, retries=3)) -> None:
        # A marker, not an instance: whoever runs the Chain passes the object in, here or on another machine.
        self._say_hello = say_hello

    async def run_remote(self, names: list[str]) -> str:
        # All calls are under way at once, on as many workers as serve SayHello.
        greetings = await asyncio.gather(*(self._say_hello.run_remote(name) for name in names))
        return "\n".join(greetings)


if __name__ == "__main__":
    # The same classes without a broker: plain objects in this process.
    with chains.run_local():
        print(asyncio.run(HelloAll().run_remote(["Ada", "Grace"])))  # noqa: T201 - a program that prints
