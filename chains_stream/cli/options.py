"""What the commands have in common: their options, the settings made of them, and the Chain file."""

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from chains_stream.chain import Chain
    from chains_stream.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

# No types here: `Settings` checks a flag and its variable alike, and says the same of either.
_OPTIONS = {
    "broker": ("URL", "memory:// (embedded, the default) or kafka://host:port[,host:port]."),
    "cluster": ("URL", "The Kafka cluster: kafka://host:port[,host:port]."),
    "namespace": ("NAME", "Prefix of all topics; default chains."),
    "host": ("ADDRESS", "Where to listen; default 127.0.0.1."),
    "port": ("NUMBER", "Where to listen; default 8000, and 0 picks a free one."),
    "workers": ("NUMBER", "Gateway processes on the one port; default 1."),
    "health_port": ("NUMBER", "Serve /healthz, /readyz and /metrics here; 0 picks a free one."),
    "log_format": ("console|json", "How to log, on stderr; default console."),
    "log_level": ("debug|info|warning|error", "How much to log; default info."),
    "quiet_log_level": ("debug|info|warning|error", "How much to log; default error."),
}
_SETTINGS = {
    "cluster": "broker",
    "quiet_log_level": "log_level",
}  # that an option stands for, where it has another name

_PARAMETERS = "chains.parameters"  # where the context of a command keeps what its file is told


def file_argument(command: F) -> F:
    """Add the Chain file to a command, and what it is to be told."""
    return click.argument("file", metavar="FILE")(set_option(command))


def _keep_parameters(context: click.Context, _option: click.Parameter, pairs: tuple[str, ...]) -> None:
    for pair in pairs:
        name, equals, _ = pair.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"should be NAME=VALUE, such as model=small (got {name!r})")
    context.meta[_PARAMETERS] = dict(pair.split("=", 1) for pair in pairs)


set_option = click.option(
    "--set",
    metavar="NAME=VALUE",
    multiple=True,
    expose_value=False,
    callback=_keep_parameters,
    help="Tell the file something that it asks for by chains.parameters; may be repeated.",
)


def parameter_flags() -> list[str]:
    """Give what the file of this command is told, as flags for another command."""
    return [f"--set={name}={value}" for name, value in _parameters().items()]


def not_for_url() -> None:
    """Refuse `--set` for a Chain that runs already. Raises ChainsUsageError."""
    from chains_stream.errors import ChainsUsageError

    if _parameters():
        raise ChainsUsageError("--set is for a file: a Chain that runs behind a URL was told when it was started")


def _parameters() -> dict[str, str]:
    context = click.get_current_context(silent=True)
    found: dict[str, str] = context.meta.get(_PARAMETERS, {}) if context is not None else {}
    return found


class Ordered(click.Group):
    """Lists its commands in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return list(self.commands)


def options(*names: str, quiet: bool = False) -> Callable[[F], F]:
    """Add the named options, and those about logs, to a command."""

    def add(command: F) -> F:
        for option in (*names, "log_format", "quiet_log_level" if quiet else "log_level")[::-1]:
            name = _SETTINGS.get(option, option)
            metavar, text = _OPTIONS[option]
            shown = f"{text} [CHAINS_{name.upper()}]"
            command = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=shown)(command)
        return command

    return add


def read_settings(flags: dict[str, str | None], *, quiet: bool = False) -> "Settings":
    """Make the settings of flags and environment, and log by them; errors alone if `quiet` and no level is given."""
    from chains_stream import telemetry  # late, as in every command: `chains --help` needs none of it
    from chains_stream.log import get_logger
    from chains_stream.settings import from_environment, misspelled

    settings = from_environment(**flags)
    level = "error" if quiet and "log_level" not in settings.model_fields_set else settings.log_level
    telemetry.configure(settings.log_format, level)
    for variable, meant in misspelled(os.environ).items():
        get_logger(__name__).warning("setting.unknown", variable=variable, meant=meant)
    return settings


def read_cluster_settings(flags: dict[str, str | None]) -> "Settings":
    """Make the settings of a command that looks into a cluster, and has nothing to do without one."""
    from chains_stream.errors import ChainsUsageError

    settings = read_settings(flags, quiet=True)
    if settings.embedded:
        reason = "memory:// lives in one process, and no other can look into it"
        raise ChainsUsageError(f"{reason}: name a cluster with --broker kafka://host:port")
    return settings


def load_chain(file: str) -> "Chain":
    """Import a Chain file. Raises ChainsUsageError, InvalidChainError."""
    from chains_stream.chain import Chain
    from chains_stream.errors import ChainsUsageError

    # What the file prints is not what the command prints.
    with redirect_stdout(sys.stderr):
        try:
            return Chain.load(file, _parameters())
        except SystemExit as error:
            reason = "it ends the process when it is imported; put that under `if __name__ == '__main__':`"
            raise ChainsUsageError(f"{file}: {reason}") from error
