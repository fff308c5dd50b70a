"""`chains call`: one request to a Chain, in this process, over its broker, or through its gateway."""

import sys

import click

from chains_stream.cli.options import load_chain, not_for_url, options, read_settings, set_option
from chains_stream.cli.output import Output


@click.command(
    short_help="Call a Chain once, and print its answer.",
    epilog="""\b
Examples:
  chains call chain.py '{"names": ["Ada", "Grace"]}'
  chains call http://127.0.0.1:8000 '{"names": ["Ada"]}'
  chains call chain.py --broker kafka://127.0.0.1:9092 < arguments.json""",
)
@click.argument("target", metavar="FILE|URL")
@click.argument("arguments", metavar="[JSON]", required=False)
@set_option
@click.option("--raw", is_flag=True, help="Print text as it is, not as JSON.")
@options("broker", "namespace", quiet=True)
def call(target: str, arguments: str | None, *, raw: bool, **flags: str | None) -> None:
    """Call a Chain once: print its result as JSON, or the chunks of a stream as they come, each a line of JSON.

    FILE alone runs the Chain in this process; with --broker kafka://… its running workers are called. URL is that of
    its gateway. JSON is an object with the arguments of run_remote; - reads it from standard input, and so does
    leaving it out where standard input is no terminal. On a terminal a stream of text is printed as text.
    """
    settings = read_settings(flags, quiet=True)
    from chains_stream.cli import request

    output = Output(raw=raw)
    if target.startswith(("http://", "https://")):
        not_for_url()
        request.call_gateway(target, settings, _arguments(arguments), output)
    else:
        request.call_chain(load_chain(target), settings, _arguments(arguments), output)


def _arguments(given: str | None) -> bytes:
    """Give the JSON of the arguments; nothing stands for an empty object, which a Chainlet with defaults takes."""
    if given is None and sys.stdin.isatty():
        return b"{}"
    json = sys.stdin.buffer.read() if given is None or given == "-" else given.encode()
    return json if json.strip() else b"{}"
