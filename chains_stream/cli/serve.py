"""`chains run`, `gateway` and `worker`: the processes that serve a Chain."""

import click

from chains_stream.cli.options import file_argument, load_chain, options, read_settings


@click.command(
    short_help="Serve a Chain over HTTP, in one process.",
    epilog="""\b
Examples:
  chains run chain.py
  chains run chain.py --port 0 --broker kafka://127.0.0.1:9092
  chains run chain.py --source events.jsonl > results.jsonl""",
)
@file_argument
@click.option("--source", metavar="FILE|-", help="Serve nothing: run a Chainlet on each line of JSON in this file.")
@click.option(
    "--chainlet", metavar="NAME", help="Run this one on them; default: the entrypoint, or that with a source."
)
@click.option("--output", metavar="FILE|-", help="Write what it gives there, as lines of JSON; default: -, stdout.")
@options("broker", "namespace", "host", "port")
def run(file: str, *, source: str | None, chainlet: str | None, output: str | None, **flags: str | None) -> None:
    """Serve a Chain over HTTP: the gateway and every Chainlet, in one process.

    Prints its URL and a request to try once it is ready. SIGTERM or Ctrl-C ends it in order, a second one at once.

    With --source it serves nothing, and needs no Kafka: it runs one Chainlet on events from a file, or stdin, writes
    what that gives in the order in which it is done, and ends with the file. A line that fails is told on stderr, and
    the status is 1 at the end.
    """
    if source is None and (chainlet or output):
        raise click.UsageError("--chainlet and --output are of events: name a file of them with --source.")
    if source is not None:
        given = [f"--{name}" for name in ("broker", "host", "port") if flags[name] is not None]
        if given:
            raise click.UsageError(f"{given[0]} does not go with --source, which serves nothing and needs no broker.")
        settings = read_settings(flags | {"broker": "memory://"}, quiet=True)
        from chains_stream.cli import replaying

        replaying.run_lines(load_chain(file), source, chainlet, output, settings)
        return
    settings = read_settings(flags)
    from chains_stream.cli import hosting

    hosting.run_all(load_chain(file), settings)


@click.command(
    short_help="Serve a Chain's entrypoint over HTTP.",
    epilog="""\b
Examples:
  chains gateway chain.py --broker kafka://127.0.0.1:9092
  CHAINS_API_KEYS=@keys.txt chains gateway chain.py --broker kafka://127.0.0.1:9092 --host 0.0.0.0 --workers 4""",
)
@file_argument
@click.option("--link", hidden=True)  # of a child: the descriptors of its socket and of the channel to its parent
@options("cluster", "namespace", "host", "port", "workers")
def gateway(file: str, link: str | None, **flags: str | None) -> None:
    """Serve a Chain's entrypoint over HTTP. The Chainlets run in workers; any number of gateways may run.

    SIGTERM or Ctrl-C ends it once the requests under way are answered, a second one at once. With --workers, SIGHUP
    starts the processes anew, one after another; else it has certificates and API keys read again.
    """
    settings = read_settings(flags)
    from chains_stream.cli import hosting, workers

    if settings.workers > 1:
        workers.supervise(file, flags, settings)
    else:
        chain = load_chain(file)
        linked = None if link is None else workers.Link(*map(int, link.split(",")))
        hosting.run_gateway(chain, settings, linked)


@click.command(
    short_help="Run Chainlets of a Chain.",
    epilog="""\b
Examples:
  chains worker chain.py --broker kafka://127.0.0.1:9092
  chains worker chain.py --broker kafka://127.0.0.1:9092 --chainlet SayHello""",
)
@file_argument
@click.option("--chainlet", "names", metavar="NAME", multiple=True, help="Run this one; may be repeated. Default: all.")
@click.option(
    "--source", metavar="TOPIC", help="Feed the Chainlet, which is the entrypoint unless one is named, from it."
)
@click.option("--sink", "sinks", metavar="TOPIC", multiple=True, help="Write what it gives there; may be repeated.")
@click.option("--format", "style", metavar="NAME", help="Of the values in these topics; default json.")
@click.option("--delivery", metavar="at_least_once|exactly_once|at_most_once", help="Of their events.")
@options("cluster", "namespace", "host", "health_port")
def worker(
    file: str,
    *,
    names: tuple[str, ...],
    source: str | None,
    sinks: tuple[str, ...],
    style: str | None,
    delivery: str | None,
    **flags: str | None,
) -> None:
    """Run Chainlets of a Chain, taking their requests from the broker. Any number of workers may run.

    With --source a Chainlet is fed from that topic, as if its class said so; what is not told stays as its class says.

    SIGTERM or Ctrl-C ends it once the requests under way are answered, a second one at once.
    """
    settings = read_settings(flags)
    chain = load_chain(file)
    from chains_stream.cli import feeding, hosting

    served = [chain.find(name) for name in names] or chain.chainlets
    feeding.declare(chain, names, feeding.Declared(source, sinks, style, delivery))
    hosting.run_worker(chain, tuple(dict.fromkeys(served)), settings)
