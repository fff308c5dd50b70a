"""How the command line logs: everything to stderr, one event a line, in one of two formats.

Events come from three sides: the package's own loggers (`log`), structlog and `logging` in the user's Chainlets, and
the libraries below. All pass through one handler and one renderer, with the same time stamp, level, and context: the
request and the correlation id that the event belongs to.

Nothing imports this module but the command line. What is logged never holds arguments or results at the level info and
above, and fields named like secrets are masked at every level.
"""

import functools
import logging
import math
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from chains_stream.log import PlainEvent
from chains_stream.policy import current

Format = Literal["console", "json"]

# Libraries that report their daily work at info; at warning they speak of what an operator should know.
_NOISY = ("aiokafka", "kafka", "asyncio", "httpx", "httpcore")
REPEAT_EVERY = 30.0  # seconds
_REMEMBERED = 100  # different lines
_SECRET = re.compile(r"password|passwd|secret|token(?!s)|api_?key|authorization|cookie|credential", re.IGNORECASE)
_WORD = re.compile(r"[\w./-]+", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def configure(log_format: Format, log_level: str, stream: TextIO | None = None) -> None:
    """Log from `log_level` on (``debug``, ``info``, ``warning`` or ``error``), in `log_format`.

    `stream` is stderr unless given. Console lines are coloured on a terminal alone. Tracebacks are a part of JSON
    lines, and follow console lines at debug; else an exception is its class, its message, and the line that raised it.
    Called again, it replaces what it set up before.
    """
    to = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[log_level.upper()]
    handler = logging.StreamHandler(to)
    if level > logging.DEBUG:
        handler.addFilter(_worth_a_line)
        handler.addFilter(_Repeats())
    handler.setFormatter(_formatter(log_format, colors=to.isatty(), debug=level <= logging.DEBUG))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    # For `structlog.get_logger()` in a Chainlet; the package's own loggers are wired by `log`.
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out what aiokafka calls an error and tries again at once: a coordinator that is being elected, say."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    retried = any(getattr(argument, "retriable", False) for argument in arguments)
    return not (retried and record.name.startswith("aiokafka"))


class _Repeats(logging.Filter):
    """Lets a library say the same once in a while: of a broker that is away aiokafka tells a hundred times a second.

    A line that comes again after `REPEAT_EVERY` tells in ``repeated`` how many were left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}  # when last, and how often since

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(_NOISY):
            return True
        key = record.name, record.getMessage()
        last, count = self._said.pop(key, (-math.inf, 0))
        if record.created - last < REPEAT_EVERY:
            self._said[key] = last, count + 1
            return False
        self._said[key] = record.created, 0
        if len(self._said) > _REMEMBERED:
            del self._said[next(iter(self._said))]
        record.repeated = count
        return True


def _formatter(log_format: Format, *, colors: bool, debug: bool) -> logging.Formatter:
    renderers: list[Processor] = [structlog.processors.JSONRenderer()]
    if log_format == "console":
        console = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
        renderers = [_one_line, console]
    plain = _plain_json if log_format == "json" else None if colors else _plain_line
    return _Formatter(
        plain,
        foreign_pre_chain=[structlog.contextvars.merge_contextvars],
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _origin,
            _request,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _mask_secrets,
            _exceptions(log_format, debug=debug),
            *renderers,
        ],
    )


def _request(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Name the request that is being served, where nothing else has: for an event nothing is bound."""
    served = current.get()
    if served is not None:
        event.setdefault("request_id", served.request_id)
    return event


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Writes plain events without the processors, which take ten times as long; the lines are the same."""

    def __init__(self, plain: Callable[[logging.LogRecord, PlainEvent], str | None] | None, **options: Any) -> None:
        super().__init__(**options)
        self._plain = plain

    def format(self, record: logging.LogRecord) -> str:
        event: Any = record.msg
        line = self._plain(record, event) if self._plain is not None and isinstance(event, PlainEvent) else None
        return super().format(record) if line is None else line


def _plain_json(record: logging.LogRecord, event: PlainEvent) -> str:
    line = {"timestamp": _timestamp(record.created), "level": "info", **event, "logger": record.name}
    return msgspec.json.encode(line).decode()


def _plain_line(record: logging.LogRecord, event: PlainEvent) -> str | None:
    """Write a line for the console; None if a value has to be quoted."""
    fields = [(name, str(event[name])) for name in sorted(event) if name != "event"]
    if not all(_WORD.fullmatch(value) for _, value in fields):
        return None
    text = " ".join([f"{name}={value}" for name, value in fields])
    return f"{_timestamp(record.created)} [info     ] {event['event']:<30} [{record.name}] {text}"


def _timestamp(created: float) -> str:
    seconds = int(created)
    return f"{_second(seconds)}.{int((created - seconds) * 1e6):06}Z"


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _origin(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the level and the logger's name, which the record of `logging` has whoever made it."""
    record: logging.LogRecord = event["_record"]
    first = {"timestamp": event.pop("timestamp"), "level": record.levelname.lower(), "event": event.pop("event")}
    repeated = {"repeated": count} if (count := getattr(record, "repeated", 0)) else {}
    return {**first, **event, **repeated, "logger": record.name}


def _mask_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name in event:
        if _SECRET.search(name):
            event[name] = "***"
    return event


def _exceptions(log_format: Format, *, debug: bool) -> Processor:
    """Make the processor that renders exceptions: as a traceback, or in brief."""

    def render(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        error = _exception(event)
        if error is None:
            return event
        if debug or (log_format == "json" and not event["logger"].startswith(_NOISY)):
            event["exception"] = "".join(traceback.format_exception(error)).rstrip()
            return event
        event["raised"] = f"{type(error).__name__}: {error}"
        if error.__traceback__ is not None:
            last = traceback.extract_tb(error.__traceback__)[-1]
            event["at"] = f"{last.filename}:{last.lineno}"
        return event

    return render


def _exception(event: EventDict) -> BaseException | None:
    """Take the exception out of an event, in any of the forms that `logging` and structlog allow."""
    given: object = event.pop("exc_info", None)
    if isinstance(given, tuple):
        given = given[1]
    elif given is True:
        given = sys.exception()
    return given if isinstance(given, BaseException) else None


def _one_line(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Keep what a value holds from breaking the line, or from steering the terminal."""
    for name, value in event.items():
        if isinstance(value, str) and name != "exception":
            event[name] = " ".join(_CONTROL.split(value))
    return event
