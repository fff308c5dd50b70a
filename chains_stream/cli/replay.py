"""`chains replay`: run a range of a topic's log again."""

import click

from chains_stream.cli.options import file_argument, load_chain, options, read_cluster_settings


@click.command(
    short_help="Run a range of a topic's events again.",
    epilog="""\b
Examples:
  chains replay chain.py --from earliest --broker kafka://127.0.0.1:9092 > again.jsonl
  chains replay chain.py --from 2026-05-01T12:00Z --to 2026-05-01T13:00Z --sink tickets.again
  chains replay chain.py --topic tickets --partition 0 --from 1200 --to 1300 --output again.jsonl""",
)
@file_argument
@click.option("--chainlet", metavar="NAME", help="Run this one; default: the entrypoint, or the one with a source.")
@click.option("--topic", metavar="TOPIC", help="Of the events; default: that of the Chainlet's source.")
@click.option("--from", "begin", metavar="POINT", required=True, help="Where to begin.")
@click.option(
    "--to", "end", metavar="POINT", default="end", help="Where to end, before it; default: the end, as it is."
)
@click.option(
    "--partition",
    "partitions",
    metavar="NUMBER",
    multiple=True,
    type=click.IntRange(min=0),
    help="Of this one; may be repeated. Default: all.",
)
@click.option(
    "--sink",
    "sinks",
    metavar="TOPIC",
    multiple=True,
    help="Write there what it gives: one topic for all, or one for each of its sinks, in their order.",
)
@click.option("--output", metavar="FILE|-", help="Write it there as lines of JSON; default: -, which is stdout.")
@click.option("--append", is_flag=True, help="Keep what the file of --output has.")
@click.option("--format", "style", metavar="NAME", help="Of the values in the topics; default: as declared, or json.")
@click.option("--dead-letters", is_flag=True, help="Put what fails into the topic's dead letters too.")
@options("cluster", "namespace", quiet=True)
def replay(
    file: str,
    *,
    chainlet: str | None,
    topic: str | None,
    begin: str,
    end: str,
    partitions: tuple[int, ...],
    sinks: tuple[str, ...],
    output: str | None,
    append: bool,
    style: str | None,
    dead_letters: bool,
    **flags: str | None,
) -> None:
    """Run a range of a topic's events again, through the Chain in this process.

    A POINT is an offset, a time (ISO 8601; UTC if it names no zone), `earliest`, `end`, or offsets by partition, as in
    0:120,1:80. The range is fixed at the start, and the consumer group of the Chainlet's workers is left alone.

    An event is run at least once, whatever the delivery that is declared. What fails after its retries is told on
    stderr, and the status is 1 at the end. Ctrl-C ends it once what runs is done, and says how to go on.
    """
    settings = read_cluster_settings(flags)
    from chains_stream.cli import replaying
    from chains_stream.cli.supplying import Wanted
    from chains_stream.log_range import parse_point

    wanted = Wanted(chainlet, topic, sinks, style, lines=not sinks)
    results = replaying.Results(sinks, output, append)
    points = parse_point("--from", begin), parse_point("--to", end)
    told = replaying.Replay(wanted, *points, partitions, results, dead_letters)
    replaying.replay(load_chain(file), told, settings)
