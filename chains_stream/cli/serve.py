"""`chains run`, `gateway` and `worker`: the processes that serve a Chain."""

import click

from chains_stream.cli.options import file_argument, load_chain, options, read_settings


@click.command(
    short_help="Serve a Chain over HTTP, in one process.",
    epilog="""\b
Examples:
  chains run chain.py
  chains run chain.py --port 0 --broker kafka://127.0.0.1:9092""",
)
@file_argument
@options("broker", "namespace", "host", "port")
def run(file: str, **flags: str | None) -> None:
    """Serve a Chain over HTTP: the gateway and every Chainlet, in one process.

    Prints its URL and a request to try once it is ready. SIGTERM or Ctrl-C ends it in order, a second one at once.
    """
    settings = read_settings(flags)
    from chains_stream.cli import hosting

    hosting.run_all(load_chain(file), settings)


@click.command(
    short_help="Serve a Chain's entrypoint over HTTP.",
    epilog="""\b
Example:
  chains gateway chain.py --broker kafka://127.0.0.1:9092 --host 0.0.0.0""",
)
@file_argument
@options("cluster", "namespace", "host", "port")
def gateway(file: str, **flags: str | None) -> None:
    """Serve a Chain's entrypoint over HTTP. The Chainlets run in workers; any number of gateways may run.

    SIGTERM or Ctrl-C ends it once the requests under way are answered, a second one at once.
    """
    settings = read_settings(flags)
    from chains_stream.cli import hosting

    hosting.run_gateway(load_chain(file), settings)


@click.command(
    short_help="Run Chainlets of a Chain.",
    epilog="""\b
Examples:
  chains worker chain.py --broker kafka://127.0.0.1:9092
  chains worker chain.py --broker kafka://127.0.0.1:9092 --chainlet SayHello""",
)
@file_argument
@click.option("--chainlet", "names", metavar="NAME", multiple=True, help="Run this one; may be repeated. Default: all.")
@options("cluster", "namespace", "host", "health_port")
def worker(file: str, names: tuple[str, ...], **flags: str | None) -> None:
    """Run Chainlets of a Chain, taking their requests from the broker. Any number of workers may run.

    SIGTERM or Ctrl-C ends it once the requests under way are answered, a second one at once.
    """
    settings = read_settings(flags)
    chain = load_chain(file)
    from chains_stream.cli import hosting

    served = [chain.find(name) for name in names] or chain.chainlets
    hosting.run_worker(chain, tuple(dict.fromkeys(served)), settings)
