"""The command line, `chains`: the only place that reads the environment and wires the parts together.

A command's module imports no more than click at its top, so that `chains --help` is there at once; the parts that it
wires are imported when it runs.
"""

import signal
import sys
from collections.abc import Sequence

import click

from chains_stream import __version__
from chains_stream.cli.author import asyncapi_document, check, graph, init, openapi_document, topics
from chains_stream.cli.bench import bench
from chains_stream.cli.call import call
from chains_stream.cli.cancel import cancel
from chains_stream.cli.dlq import dlq
from chains_stream.cli.key import key
from chains_stream.cli.options import Ordered
from chains_stream.cli.replay import replay
from chains_stream.cli.report import StoppedError, give_up, report
from chains_stream.cli.serve import gateway, run, worker


class _Chains(Ordered):
    def invoke(self, ctx: click.Context) -> object:
        # Here, before click sees them: it would print an empty line for the one, and exit with 1 for the other.
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            raise StoppedError(signal.SIGINT) from None
        except BrokenPipeError:
            give_up(sys.stdout)
            raise StoppedError(signal.SIGPIPE) from None
        return result


@click.group(
    cls=_Chains,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  chains init chain.py
  chains call chain.py '{"names": ["Ada"]}'
  chains run chain.py""",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def chains() -> None:
    """Serve multi-step inference: typed Chainlets over Kafka, or in one process and no service at all.

    FILE is path/to/chain.py, or path/to/chain.py:Entrypoint where the file has several.
    """


for command in (
    init,
    check,
    run,
    call,
    gateway,
    worker,
    key,
    graph,
    topics,
    openapi_document,
    asyncapi_document,
    dlq,
    replay,
    cancel,
    bench,
):
    chains.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and give the status to exit with."""
    try:
        # A command that returns has done its work; click gives the status of one that exits early, as --help does.
        status = chains.main(arguments, prog_name="chains", standalone_mode=False)
    except Exception as error:  # noqa: BLE001 - whatever it is, a person gets a line and not a traceback
        return report(error)
    return status if isinstance(status, int) else 0
