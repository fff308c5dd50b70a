"""`chains cancel`: an operator's way to stop a request."""

import re

import click

from chains_stream.cli.options import options, read_cluster_settings

_ID = re.compile(r"[A-Za-z0-9_-]{22}")  # what `policy.new_request_id` makes


class _Cancel(click.Command):
    """An id may begin with a hyphen, which does not make it an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ids = [text for text in args if text.startswith("-") and _ID.fullmatch(text)]
        rest = [text for text in args if text not in ids]
        return super().parse_args(ctx, [*rest, *(["--"] if ids and "--" not in rest else []), *ids])


def _checked(ctx: click.Context, parameter: click.Parameter, ids: tuple[str, ...]) -> tuple[str, ...]:
    for text in ids:
        if not _ID.fullmatch(text):
            what = "a request id has 22 letters, digits, - and _, as in x-request-id and in the logs."
            raise click.BadParameter(f"{text!r}: {what}", ctx, parameter)
    return tuple(dict.fromkeys(ids))


@click.command(
    cls=_Cancel,
    short_help="Stop a request.",
    epilog="""\b
Example:
  chains cancel 3q2-7wAAsX9vJ0kdYyTgZA --broker kafka://127.0.0.1:9092""",
)
@click.argument("ids", metavar="REQUEST_ID...", nargs=-1, required=True, callback=_checked)
@options("cluster", "namespace", quiet=True)
def cancel(ids: tuple[str, ...], **flags: str | None) -> None:
    """Stop requests: all Chainlets that work for one, and those where it still waits.

    REQUEST_ID is the x-request-id of the gateway's answer, and the request_id of the logs. The caller gets an error
    that says so. A request that has ended, or is none of this namespace, is left as it is.
    """
    settings = read_cluster_settings(flags)
    from chains_stream.cli.process import Signals, connected, patience, run, until_stopped
    from chains_stream.control import CancelRequest, Control
    from chains_stream.errors import UnknownTopicError

    namespace = settings.namespace

    async def ask() -> None:
        async with connected(settings) as broker, patience(broker):
            try:
                await broker.partitions(f"{namespace}.control")  # or else one would be made for a misspelled name
            except UnknownTopicError as error:
                raise UnknownTopicError(f"nothing has run in the namespace {namespace}: {error}") from error
            control = Control(broker, settings)
            await control.start()
            for request_id in ids:
                await control.broadcast(CancelRequest(request_id))
                click.echo(f"Asked the workers of the namespace {namespace} to stop {request_id}.")

    async def work(signals: Signals) -> None:
        await until_stopped(ask(), signals)

    run(work)
