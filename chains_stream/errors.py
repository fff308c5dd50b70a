"""The error tree, and how an error crosses from one process to another.

Every error of ours descends from `ChainsError`. Each class has a wire code that never changes, an HTTP status, and says
whether repeating the call can help. A user's own exception crosses as a `RemoteErrorDetail` and is raised again as the
same class where the caller has that class loaded, else as `GenericRemoteException`.
"""

import builtins
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import msgspec

# Where frames that are not the user's live: this package, the standard library, installed packages.
_FOREIGN_ROOTS = tuple(
    str(Path(root)) for root in {str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib"))}
)
_TRACE_ATTRIBUTE = "__chains_trace__"


class ChainsError(Exception):
    """Root of all errors of this library. Catch it to catch everything that is not the user's own exception."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ()  # attributes that cross the wire beside the message

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        for name in self.fields:
            setattr(self, name, fields.pop(name, None))
        if fields:
            msg = f"{type(self).__name__} has no field {', '.join(fields)}"
            raise TypeError(msg)

    @property
    def message(self) -> str:
        return str(self.args[0])


class ChainsUsageError(ChainsError):
    """A mistake in a Chain file or in the way the library is called. Mend what the message names."""

    code = "usage"


class Problem(msgspec.Struct, frozen=True, order=True):
    """One mistake in a Chain file: where it is, what is wrong, and how to mend it.

    `where` is ``Class.method`` or a class's name; `kind` is a stable word in capitals.
    """

    file: str
    line: int
    where: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.where}) [{self.kind}]: {self.message}"


class InvalidChainError(ChainsUsageError):
    """A Chain file has mistakes. `problems` holds them all, and the message is one line for each."""

    code = "invalid-chain"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


class MissingDependencyError(ChainsUsageError):
    """A Chainlet was used without the dependency it asks for. Run it through `run_local`, or pass a fake by keyword."""

    code = "missing-dependency"


class ChainsDeploymentError(ChainsError):
    """A Chain could not be rendered or applied to a cluster."""

    code = "deployment"


class ChainsRuntimeError(ChainsError):
    """A call, or the process that serves it, failed while running."""

    code = "runtime"


class BrokerError(ChainsRuntimeError):
    """The broker can't be reached, refused us, or failed. The message names its address and what it said."""

    code = "broker"
    status = 503
    retryable = True


class BrokerAuthorizationError(BrokerError):
    """The broker knows us, or does not, and won't let us. Give the principal the right that the message names."""

    code = "broker-authorization"
    retryable = False


class RecordTooLargeError(BrokerError):
    """A value is larger than the broker takes in one record. Send less, or raise the broker's limit."""

    code = "record-too-large"
    status = 413
    retryable = False


class UnknownTopicError(BrokerError):
    """There is no such topic, or no such partition of it. Check the namespace, and who was to create it."""

    code = "unknown-topic"
    status = 404
    retryable = False


class OffsetExpiredError(BrokerError):
    """The log no longer holds the offset asked for: its retention has passed."""

    code = "offset-expired"
    status = 410
    retryable = False


class FencedError(BrokerError):
    """Another process holds this transactional id now, or the broker gave up a transaction that was open for too long.

    What this process has of the partition is void: drop it, go on with the others, and begin this one anew from what is
    committed if the group still says that it is ours.
    """

    code = "fenced"
    status = 409
    retryable = False


class InvalidArgumentError(ChainsRuntimeError):
    """The arguments don't fit the signature of `run_remote`. `path` names the field, for example ``$.names[1]``."""

    code = "invalid-argument"
    status = 400
    fields = ("path",)
    path: str | None


class InvalidResultError(ChainsRuntimeError):
    """`run_remote` returned, or yielded, a value that is not of its annotated type. Mend the Chainlet."""

    code = "invalid-result"


class DeadlineExceededError(ChainsRuntimeError):
    """The deadline of the whole request passed, all tries included. Ask for less, or allow more time."""

    code = "deadline-exceeded"
    status = 504


class QueueExpiredError(DeadlineExceededError):
    """The request waited in its queue for longer than it was given. Allow more, or run more workers."""

    code = "queue-expired"


class CallTimeoutError(ChainsRuntimeError):
    """One try took longer than the `timeout_sec` of its `depends`."""

    code = "timeout"
    status = 504
    retryable = True


class CallCancelledError(ChainsRuntimeError):
    """Somebody cancelled the request: its caller, an operator, or a Chainlet above it."""

    code = "cancelled"
    status = 499


class OverloadedError(ChainsRuntimeError):
    """A limit on waiting or running requests is reached. `retry_after` is in seconds."""

    code = "overloaded"
    status = 429
    retryable = True
    fields = ("retry_after",)
    retry_after: float | None


class WorkerLostError(ChainsRuntimeError):
    """The worker that ran the request is gone, and so is what it had done."""

    code = "worker-lost"
    status = 503
    retryable = True


class DeadLetteredError(ChainsRuntimeError):
    """The request was put aside, into the dead-letter topic `topic` at `offset`: workers died of it, or can't read it.

    See ``chains dlq``: it can be looked at, and sent again once its cause is mended.
    """

    code = "dead-lettered"
    fields = ("topic", "offset")
    topic: str | None
    offset: int | None


class StoreError(ChainsRuntimeError):
    """The store for large values can't be reached, or refused us. The message names it and what it said."""

    code = "store"
    status = 503
    retryable = True


class StoredValueMissingError(StoreError):
    """A large value is no longer in the store: its retention has passed, or somebody removed it. Send it again."""

    code = "stored-value-missing"
    status = 410
    retryable = False


class SchemaRegistryError(ChainsRuntimeError):
    """The schema registry can't be reached, or failed. The message names its address and what it said."""

    code = "schema-registry"
    status = 503
    retryable = True


class SchemaRegistryAuthorizationError(SchemaRegistryError):
    """The schema registry won't let us in, or not that far. Mend the credentials, or give their owner the right."""

    code = "schema-registry-authorization"
    retryable = False


class UnknownSchemaError(SchemaRegistryError):
    """The registry has no such schema, or one that can't be used. Register it, or look who wrote the record."""

    code = "unknown-schema"
    status = 404
    retryable = False


class IncompatibleSchemaError(SchemaRegistryError):
    """The registry won't take the schema of what we write, for the reason in the message. Change the type as it allows.

    A field that is new mostly needs a default.
    """

    code = "incompatible-schema"
    status = 409
    retryable = False


class StreamInterruptedError(ChainsRuntimeError):
    """A stream broke off after some of its chunks were handed on. `chunks` is how many; repeat the call as a whole."""

    code = "stream-interrupted"
    status = 502
    retryable = True
    fields = ("chunks",)
    chunks: int | None


class WebSocketClosedError(ChainsRuntimeError):
    """The WebSocket is closed: its client has left, or `run_remote` has closed it. There is nobody to talk to any more.

    `close_code` is that of RFC 6455 (1006 if the connection ended with no word), `reason` what the client gave as one.
    Let out of `run_remote`, it is an ordinary end.
    """

    code = "websocket-closed"
    status = 499
    fields = ("close_code", "reason")
    close_code: int
    reason: str


class GatewayError(ChainsRuntimeError):
    """A gateway can't be reached, or refused the request. `status` is the HTTP status; 503 if there was no answer."""

    code = "gateway"
    fields = ("status",)
    status: int = 503  # type: ignore[misc] # an instance's own here, a class's elsewhere

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message, status=status or 503)

    @property
    def retryable(self) -> bool:  # type: ignore[override] # it depends on the status
        return self.status >= 500 or self.status in (408, 429)  # noqa: PLR2004 - HTTP's own numbers


class GenericRemoteException(ChainsRuntimeError):  # noqa: N818 - the name is the one Truss Chains gave it
    """An exception of the remote user's code whose class is not known here. Its message holds the class's name."""

    code = "remote"


class StackFrame(msgspec.Struct, array_like=True, frozen=True):
    """One line of the user's code on the way to an error."""

    filename: str
    lineno: int
    name: str
    line: str = ""


class Hop(msgspec.Struct, array_like=True, frozen=True):
    """One Chainlet that an error came through, outermost first in a list of them."""

    chainlet: str
    frames: list[StackFrame] = []


class RemoteErrorDetail(msgspec.Struct, frozen=True, omit_defaults=True):
    """An exception as it crosses the wire.

    `exception_args` are the exception's own where they are plain values, so that the caller can build it again.
    """

    exception_cls_name: str
    exception_module_name: str | None
    exception_message: str
    user_stack_trace: list[StackFrame] = []
    code: str = "remote"
    status: int = 500
    retryable: bool = True
    exception_args: list[str | int | float | bool | None] | None = None
    fields: dict[str, str | int | float | bool | None] = {}
    hops: list[Hop] = []

    def format(self) -> str:
        """Say what failed and through which Chainlets, as lines for a person."""
        lines = [f"{self.exception_cls_name}: {self.exception_message}"]
        for depth, hop in enumerate(self.hops):
            indent = "   " * depth
            lines.append(f"{indent}{'└─ ' if depth else ''}{hop.chainlet}")
            lines += [f"{indent}     {f.filename}:{f.lineno} in {f.name}: {f.line}" for f in hop.frames]
        return "\n".join(lines)


def is_retryable(error: BaseException) -> bool:
    """Tell whether repeating the call can succeed: see DESIGN.md section 6.

    A user's exception counts as retryable unless it says otherwise by an attribute ``retryable = False``, or carries an
    HTTP status that repeating can't mend (a 4xx other than 408 and 429).
    """
    if not isinstance(error, Exception):
        return False
    marked = getattr(error, "retryable", None)
    if isinstance(marked, bool):
        return marked
    status = http_status(error)
    return status >= 500 or status in (408, 429)  # noqa: PLR2004 - HTTP's own numbers


def http_status(error: BaseException) -> int:
    """Give the HTTP status of an error: its own, or 500."""
    for name in ("status", "status_code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status <= 599:  # noqa: PLR2004 - HTTP's own numbers
            return status
    return 500


def causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error, and what it came of: what it was raised from or while handling, and the members of groups."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        current = left.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        left.append(current.__cause__ or (None if current.__suppress_context__ else current.__context__))
        if isinstance(current, BaseExceptionGroup):
            left += reversed(current.exceptions)


def to_detail(error: BaseException, chainlet: str | None = None) -> RemoteErrorDetail:
    """Describe `error` for the wire, as raised in the Chainlet named `chainlet`."""
    remote = remote_detail(error)
    frames = user_frames(error.__traceback__)
    hops = [] if chainlet is None else [Hop(chainlet, frames)]
    for cause in causes(error):
        below = remote_detail(cause)
        if below is not None:
            hops += below.hops
            break
    kind = type(error)
    return RemoteErrorDetail(
        exception_cls_name=remote.exception_cls_name if remote else kind.__qualname__,
        exception_module_name=remote.exception_module_name if remote else kind.__module__,
        exception_message=remote.exception_message if remote else message_of(error),
        user_stack_trace=frames,
        code=error.code if isinstance(error, ChainsError) and _BY_CODE.get(error.code) is kind else "remote",
        status=http_status(error),
        retryable=is_retryable(error),
        exception_args=remote.exception_args if remote else _plain_args(error),
        fields=_plain_fields(error) if isinstance(error, ChainsError) else {},
        hops=hops,
    )


def fitting(detail: RemoteErrorDetail, size: int) -> RemoteErrorDetail:
    """Give `detail`, or what matters most of it if it takes more than about `size` bytes."""
    if len(msgspec.json.encode(detail)) <= size:
        return detail
    message = detail.exception_message
    keep = size // 16  # characters, of which JSON writes some in six bytes
    short = message if len(message) <= keep else f"{message[:keep]}... ({len(message)} characters)"
    return msgspec.structs.replace(
        detail,
        exception_message=short,
        exception_args=[short] if detail.exception_args == [message] else None,
        user_stack_trace=detail.user_stack_trace[-1:],
        fields={},
        hops=[Hop(hop.chainlet) for hop in detail.hops],
    )


def message_of(error: BaseException) -> str:
    """Give an exception's message as text that can be sent, whatever its class makes of ``str``."""
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001 - code of the user's
        text = f"(its message can't be shown: {type(broken).__name__})"
    return _sendable(text)


def from_detail(detail: RemoteErrorDetail, *, modules: tuple[str, ...] = ()) -> Exception:
    """Build the exception that `detail` describes.

    `modules` are more places to look for the class, by name: a Chain file is ``__main__`` to the script that is run and
    another module to the worker that loads it. Nothing is imported for it, and only exceptions are built.
    """
    error = _ours(detail) or _user_error(detail, modules)
    if error is None:
        error = GenericRemoteException(f"{detail.exception_cls_name}: {detail.exception_message}")
        _set(error, "status", detail.status)
        _set(error, "retryable", detail.retryable)
    _set(error, _TRACE_ATTRIBUTE, detail)
    if detail.hops:
        error.add_note("Raised remotely:\n" + detail.format())
    return error


def remote_detail(error: BaseException) -> RemoteErrorDetail | None:
    """Give the detail that `error` came with, if it crossed the wire."""
    detail = getattr(error, _TRACE_ATTRIBUTE, None)
    return detail if isinstance(detail, RemoteErrorDetail) else None


def user_frames(trace: TracebackType | None) -> list[StackFrame]:
    """Give the frames of `trace` that lie in the user's own files, outermost first."""
    return [
        StackFrame(
            frame.filename, frame.lineno or 0, frame.name, linecache.getline(frame.filename, frame.lineno or 0).strip()
        )
        for frame in traceback.extract_tb(trace)
        if not frame.filename.startswith((*_FOREIGN_ROOTS, "<"))
    ]


def _plain_args(error: BaseException) -> list[str | int | float | bool | None] | None:
    """Give the arguments of an exception if all of them can be sent as they are."""
    args = error.args
    return list(args) if all(map(_is_plain, args)) else None


def _plain_fields(error: ChainsError) -> dict[str, str | int | float | bool | None]:
    values = {name: getattr(error, name, None) for name in error.fields}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    match value:
        case None | bool() | float():
            return True
        case int():
            return -(2**63) <= value < 2**64
        case str():
            return value == _sendable(value)
        case _:
            return False


def _sendable(text: str) -> str:
    """Escape what UTF-8 can't hold: lone surrogates, of file names above all."""
    return text.encode("utf-8", "backslashreplace").decode()


def _ours(detail: RemoteErrorDetail) -> Exception | None:
    """Build one of this library's errors, found by its wire code and not by its module, which may move."""
    kind = _BY_CODE.get(detail.code)
    if kind in (None, GenericRemoteException, InvalidChainError):
        return None
    assert kind is not None
    known = {name: value for name, value in detail.fields.items() if name in kind.fields}
    return kind(detail.exception_message, **known)


def _user_error(detail: RemoteErrorDetail, modules: tuple[str, ...]) -> Exception | None:
    if detail.exception_args is None or detail.code != "remote":
        return None
    for name in (detail.exception_module_name, *modules):
        found: Any = sys.modules.get(name) if name else builtins
        for part in detail.exception_cls_name.split("."):
            # Looked up, never asked for: a module's own `__getattr__` may import.
            found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
        if isinstance(found, type) and issubclass(found, Exception):
            try:
                return _marked(found(*detail.exception_args), detail)
            except Exception:  # noqa: BLE001 - a constructor of the user's: whatever it wants, it is not these arguments
                return None
    return None


def _marked(error: Exception, detail: RemoteErrorDetail) -> Exception:
    """Keep what the exception says of itself where its class, built again, does not."""
    if isinstance(error, ChainsError):
        for name, value in (("status", detail.status), ("retryable", detail.retryable), *detail.fields.items()):
            _set(error, name, value)
    return error


def _set(error: Exception, name: str, value: object) -> None:
    """Set an attribute, over a property of its class too."""
    error.__dict__[name] = value


def _subclasses(kind: type[ChainsError]) -> Iterator[type[ChainsError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _subclasses(child)


_BY_CODE: dict[str, type[ChainsError]] = {kind.code: kind for kind in reversed(list(_subclasses(ChainsError)))}
