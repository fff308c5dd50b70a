"""`chains dlq`: look at the requests that were put aside, send them again, throw them away."""

import signal
import sys

import click

from chains_stream.cli.options import Ordered, file_argument, load_chain, options, read_cluster_settings
from chains_stream.cli.report import FAILED, StoppedError, say

_chainlets = click.option(
    "--chainlet", "names", metavar="NAME", multiple=True, help="Of this one; may be repeated. Default: all."
)


@click.group(
    cls=Ordered,
    short_help="Look at dead letters, send them again, delete them.",
    epilog="""\b
Examples:
  chains dlq list chain.py --broker kafka://127.0.0.1:9092
  chains dlq replay chain.py SayHello/0 --broker kafka://127.0.0.1:9092""",
)
def dlq() -> None:
    """Dead letters are requests that were put aside, since workers died of them or could not read them.

    A letter is named CHAINLET/NUMBER, after the Chainlet that it was for. FILE says which Chainlets there are. Letters
    of an earlier signature of run_remote lie under its topic: use the FILE of that time.
    """


@dlq.command(
    "list",
    short_help="List dead letters.",
    epilog="""\b
Example:
  chains dlq list chain.py --chainlet SayHello --broker kafka://127.0.0.1:9092""",
)
@file_argument
@_chainlets
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each, for scripts.")
@options("cluster", "namespace", quiet=True)
def list_(file: str, names: tuple[str, ...], *, as_json: bool, **flags: str | None) -> None:
    """List dead letters, the oldest of each Chainlet first.

    A line has the letter's id, when it was put aside, the id of the request, where that lay (partition@offset), and
    the reason.
    """
    settings = read_cluster_settings(flags)
    chain = load_chain(file)
    from chains_stream.cli import dead_letters

    dead_letters.list_all(dead_letters.boxes(chain, names, settings), settings, as_json=as_json)


@dlq.command(
    short_help="Show a dead letter.",
    epilog="""\b
Example:
  chains dlq show chain.py SayHello/0 --broker kafka://127.0.0.1:9092""",
)
@file_argument
@click.argument("letter", metavar="ID")
@options("cluster", "namespace", quiet=True)
def show(file: str, letter: str, **flags: str | None) -> None:
    """Show a dead letter: what went wrong, with its stack trace, and the request, with its headers and arguments."""
    settings = read_cluster_settings(flags)
    chain = load_chain(file)
    from chains_stream.cli import dead_letters

    dead_letters.show(dead_letters.place(chain, letter, settings), settings)


@dlq.command(
    short_help="Send dead letters again.",
    epilog="""\b
Examples:
  chains dlq replay chain.py SayHello/0 SayHello/3 --broker kafka://127.0.0.1:9092
  chains dlq replay chain.py --all --broker kafka://127.0.0.1:9092""",
)
@file_argument
@click.argument("letters", metavar="[ID...]", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that there are.")
@_chainlets
@options("cluster", "namespace", quiet=True)
def replay(file: str, letters: tuple[str, ...], names: tuple[str, ...], *, every: bool, **flags: str | None) -> None:
    """Send the requests of dead letters again, each to the partition that it came from, with the default deadline.

    They run for their effect: the callers have had an error. The letters stay, until they are purged.
    """
    if every == bool(letters):
        raise click.UsageError("name the letters to send again, or say --all.")
    if names and not every:
        raise click.UsageError("--chainlet goes with --all.")
    settings = read_cluster_settings(flags)
    chain = load_chain(file)
    from chains_stream.cli import dead_letters

    if every:
        dead_letters.replay_all(dead_letters.boxes(chain, names, settings), settings)
    else:
        dead_letters.replay([dead_letters.place(chain, letter, settings) for letter in letters], settings)


@dlq.command(
    short_help="Delete dead letters.",
    epilog="""\b
Examples:
  chains dlq purge chain.py --before SayHello/3 --broker kafka://127.0.0.1:9092
  chains dlq purge chain.py --all --yes --broker kafka://127.0.0.1:9092""",
)
@file_argument
@click.argument("letters", metavar="", nargs=-1)  # taken only to say what to do instead
@click.option("--all", "every", is_flag=True, help="All that there are.")
@click.option("--before", metavar="ID", help="Those of its Chainlet that are older than this one.")
@_chainlets
@click.option("--yes", is_flag=True, help="Don't ask.")
@options("cluster", "namespace", quiet=True)
def purge(
    file: str,
    letters: tuple[str, ...],
    before: str | None,
    names: tuple[str, ...],
    *,
    every: bool,
    yes: bool,
    **flags: str | None,
) -> None:
    """Delete dead letters for good: all, or those before one. Kafka deletes a log from its front only."""
    if not letters and every == (before is not None):
        raise click.UsageError("say --all, or --before a letter.")
    if names and before is not None:
        raise click.UsageError("--chainlet goes with --all.")
    settings = read_cluster_settings(flags)
    chain = load_chain(file)
    from chains_stream.cli import dead_letters

    for letter in letters:
        dead_letters.refuse_to_delete(dead_letters.place(chain, letter, settings))
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked, as standard input is no terminal: say --yes.")
    if before is not None:
        doomed = dead_letters.before(dead_letters.place(chain, before, settings), settings)
    else:
        doomed = dead_letters.everything(dead_letters.boxes(chain, names, settings), settings)
    if not doomed:
        return
    if not yes and not _confirmed(f"Delete {dead_letters.counted(doomed)}?"):
        say("Nothing was deleted.")
        raise click.exceptions.Exit(FAILED)
    dead_letters.delete(doomed, settings)


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # Ctrl-C, or the end of the input
        raise StoppedError(signal.SIGINT) from None
