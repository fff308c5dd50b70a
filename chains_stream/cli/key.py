"""`chains key`: a new API key, and the entry by which a gateway knows it."""

import click


@click.command(
    short_help="Make an API key for a gateway.",
    epilog="""\b
Example:
  chains key ada""",
)
@click.argument("name", metavar="NAME")
def key(name: str) -> None:
    """Make an API key for a gateway: the key on the first line, its entry for CHAINS_API_KEYS on the second.

    NAME says whose it is, in limits and in logs. A gateway keeps the entry alone, from which nobody gets the key.
    """
    from chains_stream.gateway.auth import new_key

    made, entry = new_key(name)
    click.echo(f"{made}\n{entry}")
    click.echo("The key is for the client, and is shown this once; the entry is for CHAINS_API_KEYS.", err=True)
