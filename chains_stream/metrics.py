"""What a process counts, in the words of Prometheus. `/metrics` of a gateway and of a worker show it.

`chainlet` is a Chainlet's name; with `.background` it is about the requests that it takes while there are no others.
Counters only grow, and begin at 0 with the process.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from itertools import accumulate
from typing import Protocol

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

OUTCOMES = ("done", "failed", "cancelled", "expired", "dead_lettered")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Timing:
    """How often something took how long: what one child of `Timings` counts."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)  # up to each of `_SECONDS`, and beyond
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.seconds += seconds


class Timings(Collector):
    """A histogram that the event loop alone observes, with every request.

    The library's takes two locks for each of two counters: a twelfth of what a call over the embedded broker takes.
    """

    def __init__(self, name: str, text: str, label: str) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._children: dict[str, Timing] = {}
        REGISTRY.register(self)

    def labels(self, value: str) -> Timing:
        return self._children.setdefault(value, Timing())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        bounds = [*map(floatToGoString, _SECONDS), "+Inf"]
        for value, timing in self._children.items():
            family.add_metric([value], list(zip(bounds, accumulate(timing.counts), strict=True)), timing.seconds)
        yield family


class Count:
    """How often something happened: what one child of `Counts` counts."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value = 0
        self.created = time.time()

    def inc(self) -> None:
        self.value += 1


class Counts(Collector):
    """A counter that the event loop alone increments, with every request: as `Timings`, without locks."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._children: dict[tuple[str, ...], Count] = {}
        REGISTRY.register(self)

    def labels(self, *values: str) -> Count:
        return self._children.setdefault(values, Count())

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in self._children.items():
            family.add_metric(values, count.value, created=count.created)
        yield family


# --- of workers
QUEUE_WAIT = Timings("chains_queue_wait_seconds", "From a request's record to its run.", "chainlet")
RUN_TIME = Timings("chains_run_seconds", "How long run_remote ran.", "chainlet")
FINISHED = Counts(
    "chains_requests",
    "Requests that ended: done, failed, cancelled, expired or dead_lettered.",
    ["chainlet", "outcome"],
)
REDELIVERED = Counter("chains_redelivered", "Requests that another worker may have begun before.", ["chainlet"])
DEAD_LETTERED = Counter("chains_dead_lettered", "Requests put into the dead-letter topic.", ["chainlet", "reason"])
EXPIRED = Counter("chains_expired", "Requests whose deadline passed before they were run.", ["chainlet"])
RETRIED = Counter("chains_retried", "Requests put off after a try that failed, to be tried again.", ["chainlet"])
EVENTS_PAUSED = Gauge("chains_events_paused", "1 while all events of a Chainlet wait, as none succeeds.", ["chainlet"])
CANCELLED = Counter("chains_cancelled", "Requests cancelled: running, or still queued.", ["chainlet", "state"])

# --- of all that serve
PROCESS = Info("chains_process", "The process that answered: of several on one port, each counts for itself.")
PROCESS.info({"pid": str(os.getpid())})
LOOP_LAG = Histogram(
    "chains_loop_lag_seconds", "How late the event loop was, looked at ten times a second.", buckets=_SECONDS
)

# --- of gateways
WEBHOOKS = Counter(
    "chains_webhooks",
    "Tries to deliver a webhook: delivered, failed (it is tried again), or undelivered (it was given up).",
    ["outcome"],
)
SHED = Counter(
    "chains_shed",
    "Requests turned away with 429: too many requests, too many of a key, too many bytes of bodies, a key's rate.",
    ["reason"],
)
HTTP_IN_FLIGHT = Gauge("chains_http_requests_in_flight", "HTTP requests that are being served.")
WEBSOCKETS = Gauge("chains_websockets", "WebSockets that are open.")
HTTP_REQUESTS = Counter("chains_http_requests", "HTTP requests that ended.", ["route", "status"])
HTTP_SECONDS = Timings("chains_http_seconds", "From an HTTP request to the end of its answer.", "route")


class Working(Protocol):
    """A worker, as far as what it has in hand goes."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int: ...

    @property
    def paused(self) -> Collection[int]: ...

    def lag(self) -> Mapping[int, int]: ...


class InHand(Collector):
    """What workers and callers of this process have in hand, asked when somebody looks: it costs a request nothing.

    Attributes:
        workers: that run.
        calls: of each caller, those that wait for an answer.
    """

    def __init__(self) -> None:
        self.workers: set[Working] = set()
        self.calls: dict[int, Sized] = {}

    def beside(self, worker: Working) -> bool:
        """Tell whether there is anything but what a worker has in hand."""
        return any(map(len, self.calls.values())) or any(o.in_flight for o in self.workers if o is not worker)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        chainlet = ["chainlet"]
        running = GaugeMetricFamily("chains_requests_in_flight", "Requests that run now.", labels=chainlet)
        paused = GaugeMetricFamily(
            "chains_paused_partitions", "Partitions that wait for an open record.", labels=chainlet
        )
        lag = GaugeMetricFamily(
            "chains_lag", "Records that wait on a partition of a request topic.", labels=[*chainlet, "partition"]
        )
        for worker in self.workers:
            running.add_metric([worker.name], worker.in_flight)
            paused.add_metric([worker.name], len(worker.paused))
            for partition, records in worker.lag().items():
                lag.add_metric([worker.name, str(partition)], records)
        calls = GaugeMetricFamily(
            "chains_calls_in_flight", "Calls to other Chainlets, or to the entrypoint, that wait for an answer."
        )
        calls.add_metric([], sum(map(len, self.calls.values())))
        yield from (running, paused, lag, calls)


IN_HAND = InHand()
REGISTRY.register(IN_HAND)


class OfWorker:
    """The counters that a worker meets with every request, looked up once."""

    def __init__(self, chainlet: str) -> None:
        self.redelivered = REDELIVERED.labels(chainlet)
        self.finished = {kind: FINISHED.labels(chainlet, kind) for kind in OUTCOMES}
        self.cancelled = {state: CANCELLED.labels(chainlet, state) for state in ("queued", "running")}
