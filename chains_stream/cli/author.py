"""What an author of a Chain uses: `init`, `check`, `graph`, `topics`."""

import shlex
from pathlib import Path
from textwrap import dedent

import click

from chains_stream.cli.options import file_argument, load_chain, options, read_settings
from chains_stream.cli.report import nearest, say

TEMPLATE = dedent(
    '''
    """A Chain: typed steps that call one another. This one greets everybody at once.

        chains check {file}
        chains call {file} '{arguments}'
        chains run {file}

    `check` finds mistakes, `call` runs the Chain once in one process, `run` serves it over HTTP.
    """

    import asyncio

    import chains_stream as chains


    class SayHello(chains.ChainletBase):
        """A Chainlet: a class with one public method, `run_remote`, whose arguments and result have types."""

        # How many requests one worker process runs at once. A Chainlet may also ask for a GPU, memory, secrets, ...
        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

        async def run_remote(self, name: str, greeting: str = "Hello") -> str:
            return f"{{greeting}}, {{name}}!"


    @chains.mark_entrypoint  # requests from outside come here
    class HelloAll(chains.ChainletBase):
        """Calls another Chainlet, which may run in another process, on another machine."""

        remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

        # Retries: a call that fails, or whose worker dies, is made again, three times in all.
        def __init__(self, say_hello: SayHello = chains.depends(SayHello, retries=3)) -> None:
            self._say_hello = say_hello

        # To stream, annotate `AsyncIterator[str]` (of collections.abc), and `yield` instead of `return`.
        async def run_remote(self, names: list[str]) -> list[str]:
            return await asyncio.gather(*(self._say_hello.run_remote(name) for name in names))
    '''
).lstrip()
_ARGUMENTS = '{"names": ["Ada", "Grace"]}'


@click.command(short_help="Write a small Chain file to begin with.")
@click.argument("path", default="chain.py", metavar="[PATH]", type=click.Path(path_type=Path))
def init(path: Path) -> None:
    """Write a small Chain file to begin with, chain.py unless PATH names another; existing files are left alone."""
    from chains_stream.errors import ChainsUsageError

    path = path / "chain.py" if path.is_dir() else path
    if path.suffix != ".py":
        raise ChainsUsageError(f"{path}: a Chain file ends in .py")
    file = shlex.quote(str(path))
    try:
        with path.open("x", encoding="utf-8") as new:
            new.write(TEMPLATE.format(file=file, arguments=_ARGUMENTS))
    except FileExistsError:
        raise ChainsUsageError(f"{path} exists, and is left as it is; name another file") from None
    except FileNotFoundError:
        raise ChainsUsageError(f"{path.parent}: no such folder") from None
    click.echo(f"Wrote {path}. Try it:\n  chains call {file} '{_ARGUMENTS}'\n  chains run {file}")


@click.command(short_help="Find the mistakes in a Chain file.")
@file_argument
@options()
def check(file: str, **flags: str | None) -> None:
    """Find all mistakes in a Chain file, each with its line and how to mend it; status 2 if there are any."""
    read_settings(flags)
    chain = load_chain(file)
    from chains_stream.checks import advice

    for cls in chain.chainlets:
        for hint in advice(cls):
            say(f"hint: {str(hint).replace(hint.file, nearest(hint.file), 1)}")
    count = len(chain.chainlets)
    click.echo(f"OK: {count} Chainlet{'s' if count > 1 else ''}")


@click.command(short_help="Draw a Chain.")
@file_argument
@click.option("--format", "style", type=click.Choice(["tree", "mermaid"]), default="tree", show_default=True)
@options("namespace")
def graph(file: str, style: str, **flags: str | None) -> None:
    """Draw which Chainlet calls which: as a tree, with their topics, or as a Mermaid flowchart."""
    settings = read_settings(flags)
    chain = load_chain(file)
    click.echo(chain.mermaid() if style == "mermaid" else chain.drawing(settings.namespace))


@click.command(short_help="List the topics of a Chain.")
@file_argument
@options("namespace")
def topics(file: str, **flags: str | None) -> None:
    """List the topics that a Chain uses, one a line.

    First come those of its Chainlets' requests, then those of events that they are fed from and write to, with those of
    dead letters, and at last those that Chains share.

    A topic of requests is named after the signature of run_remote; after a change of it, old and new versions run side
    by side.
    """
    settings = read_settings(flags)
    chain = load_chain(file)
    from chains_stream.events import feed_of
    from chains_stream.letters import dead_letter_topic

    chainlets = chain.chainlets[::-1]
    for cls in chainlets:
        click.echo(chain.topic(cls, settings.namespace))
    feeds = [feed for cls in chainlets if (feed := feed_of(cls)) is not None]
    fed = [(f.source.topic, *(sink.topic for sink in f.sinks), dead_letter_topic(f.source.topic)) for f in feeds]
    for topic in dict.fromkeys(topic for of_one in fed for topic in of_one):
        click.echo(topic)
    for shared in ("replies", "control"):
        click.echo(f"{settings.namespace}.{shared}")


@click.command("openapi", short_help="Print the OpenAPI document of a Chain's gateway.")
@file_argument
def openapi_document(file: str) -> None:
    """Print the OpenAPI 3.1 document that the gateway of a Chain serves at /openapi.json."""
    settings = read_settings({}, quiet=True)
    import msgspec

    from chains_stream.chainlet import signature
    from chains_stream.codec import codec_of
    from chains_stream.gateway import openapi

    chain = load_chain(file)
    described = openapi.document(chain, codec_of(signature(chain.entrypoint)), settings)
    click.echo(msgspec.json.format(msgspec.json.encode(described), indent=2))


@click.command("asyncapi", short_help="Print the AsyncAPI document of a Chain's topics.")
@file_argument
@options("broker", "namespace", quiet=True)
def asyncapi_document(file: str, **flags: str | None) -> None:
    """Print the AsyncAPI 3 document of a Chain: the topics that it takes from and writes to, and what lies on them.

    With --broker kafka://… it names the server too.
    """
    settings = read_settings(flags, quiet=True)
    import msgspec

    from chains_stream import asyncapi

    described = asyncapi.document(load_chain(file), settings)
    click.echo(msgspec.json.format(msgspec.json.encode(described), indent=2))
