"""Tells of tickets where they lay, through a Chainlet of its own; a bad one fails, and a slow one takes its time."""

import asyncio

import msgspec

import chains_stream as chains


class Ticket(msgspec.Struct):
    id: str
    customer: str = ""
    seconds: float = 0


class Told(msgspec.Struct):
    id: str
    customer: str
    at: str


class Loud(chains.ChainletBase):
    async def run_remote(self, text: str) -> str:
        return text.upper()


@chains.mark_entrypoint
class Retell(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))
    source = chains.Source("tickets", key="customer", delivery="exactly_once", retries=2)
    sink = (chains.Sink("tickets.told", key="customer"), chains.Sink("tickets.quiet"))

    def __init__(self, loud: Loud = chains.depends(Loud)) -> None:
        self._loud = loud

    async def run_remote(self, event: chains.Event[Ticket]) -> chains.Output[Told] | None:
        ticket = event.value
        print("what a Chainlet prints is no result")  # noqa: T201 - that is what it is for
        await asyncio.sleep(ticket.seconds)
        match ticket.id:
            case "bad":
                raise ValueError("a bad\nticket")
            case "none":
                return None
        told = Told(await self._loud.run_remote(ticket.id), ticket.customer, f"{event.partition}@{event.offset}")
        return chains.Output(told, topic="tickets.quiet" if ticket.id == "quiet" else "tickets.told")
