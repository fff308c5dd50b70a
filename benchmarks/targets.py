"""What is to be reached, row by row: ratios within one run, but for the few that are numbers of their own."""

import math

from benchmarks.measurement import Parameters, Pick, Row

KB = 1_000
BYTES = KB  # of a unary call's text, unless a workload says otherwise
READERS = 64  # of streams as fast as they go
PACED: Parameters = {"readers": 256, "tokens_per_s": 50}
PACE = "256 streams of 50 tokens/s"
ALONE: Parameters = {"in_flight": 1}


def _unary(system: str, in_flight: int) -> Pick:
    return Pick("unary", system, {"bytes": BYTES, "in_flight": in_flight})


def _first_token(share: str) -> Row:
    engine = Pick("paced", "engine", PACED)
    return Row(
        name=f"paced TTFT {share}",
        compared=f"{share} of the time to first token, less the engine's own, over that of a bare relay; {PACE}",
        figure=f"ttft_{share}_s",
        measured=Pick("paced", "chains", PACED),
        over=Pick("paced", "relay", PACED),
        less=(engine, engine),
        target=3.0,
        direction="at_most",
    )


def _inter_token(share: str) -> Row:
    return Row(
        name=f"paced inter-token {share}",
        compared=f"{share} of how far a gap between tokens is from the engine's, over that of a bare relay; {PACE}",
        figure=f"added_itl_{share}_s",
        measured=Pick("paced", "chains", PACED),
        over=Pick("paced", "relay", PACED),
        target=3.0,
        direction="at_most",
    )


ROWS = (
    Row(
        name="unary p50 at 1",
        compared="p50 of a 1 KB call through Kafka, 1 in flight, over the bare ping-pong's",
        figure="p50_s",
        measured=_unary("chains", 1),
        over=_unary("floor", 1),
        target=1.25,
        direction="at_most",
        quick=True,
    ),
    Row(
        name="unary rate at 256",
        compared="1 KB calls/s through Kafka, 256 in flight, over the bare ping-pong's",
        figure="rate_per_s",
        measured=_unary("chains", 256),
        over=_unary("floor", 256),
        target=0.7,
        direction="at_least",
        quick=True,
    ),
    Row(
        name="unary rate, Ray Serve",
        compared="1 KB calls/s through Kafka, 256 in flight, over Ray Serve's handle calls",
        figure="rate_per_s",
        measured=_unary("chains", 256),
        over=_unary("ray", 256),
        target=5.0,
        direction="at_least",
    ),
    Row(
        name="two hops, FastAPI",
        compared="client to gateway to A to B, requests/s at 256 in flight, over client to FastAPI A to B",
        figure="rate_per_s",
        measured=Pick("two_hops_http", "chains", {"in_flight": 256}),
        over=Pick("two_hops_http", "fastapi", {"in_flight": 256}),
        target=1.5,
        direction="at_least",
    ),
    Row(
        name="streams",
        compared=f"tokens/s through gateway, Kafka and worker, {READERS} readers, over those of a bare ASGI server",
        figure="tokens_per_s",
        measured=Pick("streams", "chains", {"readers": READERS}),
        over=Pick("streams", "asgi", {"readers": READERS}),
        target=0.5,
        direction="at_least",
        quick=True,
    ),
    _first_token("p50"),
    _first_token("p99"),
    _inter_token("p50"),
    _inter_token("p99"),
    Row(
        name="embedded CPU",
        compared="CPU that a unary call over the embedded broker adds to calling the coroutine",
        figure="cpu_s_per_call",
        measured=Pick("embedded", "chains", ALONE),
        less=(Pick("embedded", "floor", ALONE),),
        target=60e-6,
        direction="at_most",
        unit="µs",
        quick=True,
    ),
    Row(
        name="fused hops",
        compared="CPU that three fused hops add to calling the coroutines, over what one embedded call adds",
        figure="cpu_s_per_call",
        measured=Pick("fused", "chains", ALONE),
        over=Pick("embedded", "chains", ALONE),
        less=(Pick("fused", "floor", ALONE), Pick("embedded", "floor", ALONE)),
        target=3.0,
        direction="at_most",
        quick=True,
    ),
    Row(
        name="gateway at rest",
        compared="RSS of a gateway process at rest",
        figure="rss_bytes",
        measured=Pick("memory", "chains", {"process": "gateway"}),
        target=90e6,
        direction="at_most",
        unit="MB",
        quick=True,
    ),
    Row(
        name="worker at rest",
        compared="RSS of a worker process at rest, of a Chain that imports nothing of its own",
        figure="rss_bytes",
        measured=Pick("memory", "chains", {"process": "worker"}),
        target=70e6,
        direction="at_most",
        unit="MB",
        quick=True,
    ),
    *(
        Row(
            name=f"idle stream, {process}",
            compared=f"RSS that a stream adds to the {process} while it waits",
            figure=f"{process}_bytes_per_stream",
            measured=Pick("memory", "chains", {"process": "stream"}),
            target=10e3,
            direction="at_most",
            unit="KB",
            quick=True,
        )
        for process in ("gateway", "worker")
    ),
)

# Without a target, but watched: processor time is far less noisy than a rate on a machine that does other work too.
WATCHED = (
    Row(
        name="unary CPU at 256",
        compared="CPU of a 1 KB call through Kafka, 256 in flight, over the bare ping-pong's",
        figure="cpu_s_per_call",
        measured=_unary("chains", 256),
        over=_unary("floor", 256),
        target=math.inf,
        direction="at_most",
        quick=True,
    ),
    Row(
        name="streams CPU",
        compared=f"CPU of a token through gateway, Kafka and worker, {READERS} readers, over a bare ASGI server's",
        figure="cpu_s_per_token",
        measured=Pick("streams", "chains", {"readers": READERS}),
        over=Pick("streams", "asgi", {"readers": READERS}),
        target=math.inf,
        direction="at_most",
        quick=True,
    ),
)

UNITS = {"": 1.0, "µs": 1e-6, "MB": 1e6, "KB": 1e3}  # how a figure in SI units is written
