"""Events that are enriched on their way: support tickets from one topic, scored and routed to two others.

    chains worker chainlets/enrich.py --broker kafka://127.0.0.1:9092
    echo '{"id": "t1", "customer": "ada", "text": "The invoice is wrong, and nobody answers. Terrible!"}' |
      kcat -P -b 127.0.0.1:9092 -t tickets -k ada -X topic.partitioner=murmur2_random
    kcat -C -b 127.0.0.1:9092 -t tickets.urgent -e

kcat, as all clients on librdkafka, chooses the partition of a key in another way than Kafka's own clients and we do, if
it is not told. All who write to a topic must do it in one way, or a key has no order.

Tickets of one customer keep their order; those of others are worked on meanwhile. `Score` is a Chainlet of its own, so
that it may run elsewhere, on a GPU say, on as many machines as it takes. Here it is plain Python: it counts the words
of each feeling in a text, as the lexicons of opinion mining do (M. Hu and B. Liu, KDD 2004), with a word before that
turns them round.
"""

import re
import time
from enum import StrEnum
from typing import Literal

import msgspec
import pydantic

import chains_stream as chains

URGENT = 0.5  # of a score, below minus which a ticket is
NEGATIONS = frozenset({"not", "no", "never", "nobody", "nothing", "without", "hardly", "cannot"})
GOOD = frozenset(
    [
        "good",
        "great",
        "excellent",
        "fast",
        "quick",
        "easy",
        "helpful",
        "friendly",
        "happy",
        "perfect",
        "love",
        "loved",
        "likes",
        "thanks",
        "thank",
        "works",
        "working",
        "solved",
        "resolved",
        "smooth",
        "clear",
        "pleased",
        "reliable",
        "answer",
        "answers",
        "answered",
    ]
)
BAD = frozenset(
    [
        "bad",
        "wrong",
        "terrible",
        "awful",
        "slow",
        "broken",
        "breaks",
        "error",
        "errors",
        "fail",
        "fails",
        "failed",
        "failing",
        "crash",
        "crashes",
        "crashed",
        "refund",
        "angry",
        "late",
        "missing",
        "lost",
        "worst",
        "useless",
        "confusing",
        "unhappy",
        "problem",
        "problems",
        "urgent",
        "complaint",
    ]
)


class Options(pydantic.BaseModel):
    """Where tickets come from, and go to."""

    source: str = "tickets"
    sink: str = "tickets.scored"
    urgent: str = "tickets.urgent"
    delivery: Literal["at_least_once", "exactly_once", "at_most_once"] = "at_least_once"


options = chains.parameters(Options)


class Topic(StrEnum):
    """What a ticket is about."""

    BILLING = "billing"
    ACCESS = "access"
    DELIVERY = "delivery"
    OTHER = "other"


WORDS = {
    Topic.BILLING: frozenset(["invoice", "bill", "billing", "charge", "charged", "payment", "price", "refund", "card"]),
    Topic.ACCESS: frozenset(["login", "password", "account", "locked", "access", "sign", "register"]),
    Topic.DELIVERY: frozenset(["parcel", "package", "delivery", "delivered", "shipping", "arrived", "courier"]),
}


class Ticket(msgspec.Struct):
    """What a customer wrote."""

    id: str
    customer: str
    text: str


class Feeling(msgspec.Struct):
    """How a text sounds: `score` is from -1, all bad, to 1, all good."""

    score: float
    topic: Topic


class Scored(msgspec.Struct):
    """A ticket, and what is known of it."""

    id: str
    customer: str
    text: str
    score: float
    topic: Topic
    waited_ms: int


class Score(chains.ChainletBase):
    """Tells how texts sound, many at once, as a model would."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))
    batch = chains.Batch(max_size=64, max_wait_ms=2)

    async def run_remote(self, texts: list[str]) -> list[Feeling]:
        return [feeling(text) for text in texts]


@chains.mark_entrypoint
class Enrich(chains.ChainletBase):
    """Has each ticket scored, and sends it on: to a topic of its own what can't wait."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))
    source = chains.Source(options.source, delivery=options.delivery)
    sink = (chains.Sink(options.sink, key="customer"), chains.Sink(options.urgent, key="customer"))

    def __init__(self, score: Score = chains.depends(Score, retries=3, timeout_sec=30)) -> None:
        self._score = score

    async def run_remote(self, event: chains.Event[Ticket]) -> chains.Output[Scored]:
        ticket = event.value
        (found,) = await self._score.run_remote([ticket.text])
        waited = max(0, int(time.time() * 1000) - event.timestamp_ms) if event.timestamp_ms else 0
        scored = Scored(ticket.id, ticket.customer, ticket.text, found.score, found.topic, waited)
        return chains.Output(scored, topic=options.urgent if found.score <= -URGENT else options.sink)


def feeling(text: str) -> Feeling:
    """Score a text: good words count for it, bad ones against it, and a negation before one turns it round."""
    words = re.findall(r"[a-z']+", text.lower())
    good = bad = 0
    for before, word in zip(["", *words], words, strict=False):
        turned = before in NEGATIONS or before.endswith("n't")
        if word in GOOD:
            good, bad = (good, bad + 1) if turned else (good + 1, bad)
        elif word in BAD:
            good, bad = (good + 1, bad) if turned else (good, bad + 1)
    counts = {topic: len(known.intersection(words)) for topic, known in WORDS.items()}
    topic = max(counts, key=counts.__getitem__)
    return Feeling(round((good - bad) / (good + bad or 1), 3), topic if counts[topic] else Topic.OTHER)
