"""How the command line tells of an error: clear lines on stderr, and a status that a script can use."""

import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from chains_stream.errors import InvalidChainError

FAILED, USAGE, INTERNAL = 1, 2, 70  # 70 is EX_SOFTWARE of sysexits.h
_SIGNALLED = 128  # plus the signal's number, as shells count
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed: a terminal would obey them


class StoppedError(Exception):
    """A signal, by its number, came before a command had done its work; SIGPIPE stands for a pipe that was closed."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


def report(error: Exception) -> int:
    """Tell of `error`, and give the status to exit with. Tracebacks are shown at the log level debug alone."""
    match error:
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return USAGE
        case StoppedError():
            return _SIGNALLED + error.signal
        case click.ClickException():
            usage = isinstance(error, click.UsageError) and error.ctx
            where = f" See: {usage.command_path} --help" if usage else ""
            text, status = f"error: {_one_line(error.format_message())}{where}", error.exit_code
        case _:
            text, status = _described(error)
    say(text)
    if logging.getLogger("chains_stream").isEnabledFor(logging.DEBUG):
        say("".join(traceback.format_exception(error)).rstrip())
    return status


def _described(error: Exception) -> tuple[str, int]:
    from chains_stream.errors import ChainsError, ChainsUsageError, InvalidChainError, remote_detail

    detail = remote_detail(error)
    if detail is not None and detail.hops:  # raised in a Chainlet: with the way that it came
        return f"error: {detail.format()}", FAILED
    match error:
        case InvalidChainError():
            return _problems(error), USAGE
        case ChainsError():
            text = str(error).replace(f"{Path.cwd()}{os.sep}", "")
            return f"error: {_one_line(text)}", USAGE if isinstance(error, ChainsUsageError) else FAILED
        case OSError(strerror=str(reason)):
            return f"error: {f'{error.filename}: ' if error.filename else ''}{reason}", FAILED
        case _:
            what = _one_line(f"internal error: {type(error).__name__}: {error}")
            return f"error: {what} (run with --log-level debug for the traceback)", INTERNAL


def _problems(error: "InvalidChainError") -> str:
    """Give one line for each mistake in a Chain file, and their number."""
    lines = [str(problem).replace(problem.file, nearest(problem.file)) for problem in error.problems]
    count = len(lines)
    return "\n".join([*map(_one_line, lines), f"{count} mistake{'s' if count > 1 else ''}"])


def nearest(path: str) -> str:
    """Write a path as seen from here, where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # on another drive
        return path
    return min(relative, path, key=len)


def say(text: str) -> None:
    """Write lines for a person to stderr; whoever closed it does not want them."""
    try:
        click.echo(printable(text), err=True)
    except BrokenPipeError:
        give_up(sys.stderr)


def printable(text: str) -> str:
    """Take out of a text what a terminal would obey."""
    return _CONTROL.sub("�", text)


def give_up(stream: TextIO) -> None:
    """Point a stream without a reader at nothing, so that the interpreter's own flush at exit can't fail."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())
