"""`chains bench`: load a Chain, and print what it did."""

from pathlib import Path
from typing import Any

import click

from chains_stream.cli.options import not_for_url, options, read_settings, set_option

LEVELS = (1, 16, 64)  # in flight, if nothing else is asked for
SECONDS = 10.0
URLS = ("http://", "https://")


class _Numbers(click.ParamType["tuple[float, ...]"]):
    """One number or several, with commas between them."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            what = "whole numbers above 0" if self._kind is int else "numbers above 0"
            self.fail(f"{value!r} is not {what}, with commas between them", param, ctx)
        return numbers


@click.command(
    short_help="Load a Chain, and print what it did.",
    epilog="""\b
Examples:
  chains bench chain.py
  chains bench chain.py --body '{"names": ["Ada"]}' --in-flight 1,64,256
  chains bench http://127.0.0.1:8000 --rate 100,200 --seconds 30
  chains bench chain.py --broker kafka://127.0.0.1:9092 --sweep --out results""",
)
@click.argument("target", metavar="FILE|URL")
@set_option
@click.option("--body", metavar="JSON", help="The arguments of run_remote; small ones are made up if none are given.")
@click.option(
    "--body-file",
    metavar="PATH",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Arguments as lines of JSON, taken in turn.",
)
@click.option(
    "--in-flight",
    metavar="N[,N…]",
    type=_Numbers(int),
    help="Closed loop: keep so many requests in flight. Default 1,16,64, unless there is a rate.",
)
@click.option("--rate", metavar="R[,R…]", type=_Numbers(float), help="Open loop: so many requests a second are due.")
@click.option("--sweep", is_flag=True, help="Raise the rate step by step until the Chain can't keep up.")
@click.option(
    "--seconds",
    metavar="NUMBER",
    type=click.FloatRange(min=0, min_open=True),
    help=f"How long each load is measured; default {SECONDS:g}.",
)
@click.option(
    "--warm-up",
    metavar="NUMBER",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Seconds of load before each that are not measured.",
)
@click.option(
    "--requests", metavar="NUMBER", type=click.IntRange(min=1), help="Send so many in each closed loop, however long."
)
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option(
    "--out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="Write table, JSON, plots."
)
@click.option("--allow-failures", is_flag=True, help="End with status 0 even if requests failed.")
@options("broker", "namespace", quiet=True)
def bench(target: str, body: str | None, body_file: Path | None, **given: Any) -> None:
    """Load a Chain over HTTP, and print how many requests it answers, and how soon.

    URL is a running gateway. FILE is served for the time of the command: gateway and Chainlets in one process, on the
    embedded broker or on --broker kafka://…, in the namespace `bench` if none is named.

    A closed loop keeps so many requests in flight, and sends one when one before it has been answered: it shows the
    most that the Chain does. An open loop sends at random moments whatever the Chain does, and measures from when a
    request was due: it shows what users see, stalls too. Streams are measured by their tokens.
    """
    loads = {name: given.pop(name) for name in ("in_flight", "rate", "sweep", "seconds", "warm_up", "requests")}
    shown = {name: given.pop(name) for name in ("style", "out", "allow_failures")}
    settings = read_settings(given, quiet=True)
    from chains_stream.cli import loading
    from chains_stream.errors import ChainsUsageError

    if body is not None and body_file is not None:
        raise ChainsUsageError("--body and --body-file: name one of them")
    if loads["requests"] and (loads["seconds"] or loads["rate"] or loads["sweep"]):
        raise ChainsUsageError("--requests bounds a closed loop: leave out --seconds, --rate and --sweep")
    if target.startswith(URLS) and (given["broker"] or given["namespace"]):
        raise ChainsUsageError("--broker and --namespace are for a FILE; a running gateway has its own")
    if target.startswith(URLS):
        not_for_url()
    if not loads["in_flight"] and not loads["rate"]:
        loads["in_flight"] = LEVELS
    loads["seconds"] = loads["seconds"] or SECONDS
    bodies = loading.bodies(body, body_file)
    loading.bench(target, settings, bodies, loading.Plan(**loads), loading.Wanted(**shown))
