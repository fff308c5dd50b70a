"""Scores tickets: the function that both the bare loop and our worker run, and the Chainlet that runs it."""

from typing import Literal

import msgspec
import pydantic

import chains_stream as chains


class Options(pydantic.BaseModel):
    source: str = "tickets"
    sink: str = "tickets.scored"
    group: str | None = None
    delivery: Literal["at_least_once", "exactly_once", "at_most_once"] = "at_least_once"


class Ticket(msgspec.Struct):
    """An event: some 300 bytes of JSON."""

    number: int
    customer: str
    subject: str
    text: str
    tags: list[str]
    created: float


class Scored(msgspec.Struct):
    number: int
    customer: str
    subject: str
    words: int
    urgent: bool
    tags: list[str]


async def score(ticket: Ticket) -> Scored:
    """Give a ticket's score; it waits for nothing, so that what is measured is what is around it."""
    words = ticket.text.count(" ") + 1
    urgent = "urgent" in ticket.text or "outage" in ticket.tags
    return Scored(ticket.number, ticket.customer, ticket.subject, words, urgent, ticket.tags)


options = chains.parameters(Options)


@chains.mark_entrypoint
class Score(chains.ChainletBase):
    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))
    source = chains.Source(options.source, delivery=options.delivery, group=options.group)
    sink = chains.Sink(options.sink)

    async def run_remote(self, ticket: Ticket) -> Scored:
        return await score(ticket)
