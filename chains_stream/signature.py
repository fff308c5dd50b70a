"""What a Chainlet's `run_remote` takes and gives, read from its source: the contract that its topic is named after."""

import dataclasses
import hashlib
import inspect
import re
import sys
import typing
from collections import abc
from types import FunctionType
from typing import Any, Final, get_args, get_origin

import msgspec

from chains_stream import foreign, source
from chains_stream.descriptor import Describer, Json, UnsupportedTypeError, canonical, describe_value, show, spell
from chains_stream.errors import ChainsUsageError, InvalidChainError, Problem
from chains_stream.websocket import FromWorker, Handshake, WebSocketProtocol

MISSING: Final = inspect.Parameter.empty
"""The default of a parameter that has none."""

_METHOD = "run_remote"
_TOPIC_LIMIT = 249  # Kafka's: a topic is a folder, and its files' names have 255 characters
BACKGROUND = ".background"  # ends the topic of requests that may wait
_LONGEST_SUFFIX = f"{BACKGROUND}.dlq"
_STREAMS = (abc.AsyncIterator, abc.AsyncGenerator)
_SYNC_ITERATORS = (abc.Iterator, abc.Generator, abc.Iterable)
_BY_POSITION = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """An argument of ``run_remote``; `default` is MISSING where there is none."""

    name: str
    annotation: Any
    default: Any = MISSING
    kw_only: bool = False


# Compared by identity: annotations and defaults need not be hashable. Two that speak the same bytes have one `digest`.
@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What one Chainlet takes and gives.

    `result` is the type of the result, or of each chunk where `streaming`; NoneType for none. `is_async` is False for a
    ``def``. `digest` is 8 hex digits of a SHA-256 over all that decides which bytes are valid. Of one that takes a
    `websocket`, argument and chunks are those of the wire: see the module `websocket`.
    """

    chainlet: str
    parameters: tuple[Parameter, ...]
    result: Any
    streaming: bool
    is_async: bool
    digest: str
    websocket: bool = False

    @classmethod
    def of(cls, function: object, chainlet: str) -> "Signature":
        """Read the method of the Chainlet named `chainlet`; raise InvalidChainError with all that is wrong with it."""
        signature, problems = read(function, chainlet)
        if signature is None:
            raise InvalidChainError(problems)
        return signature

    def topic(self, namespace: str, chain: str) -> str:
        """Name the request topic. Raises ChainsUsageError if Kafka would refuse the name."""
        parts = [topic_part(namespace), topic_part(chain), topic_part(self.chainlet)]
        for what, part in zip(("namespace", "Chain", "Chainlet"), parts, strict=True):
            fault = name_fault(part)
            if fault:
                msg = f"the {what}'s name `{part}` {fault}"
                raise ChainsUsageError(msg)
        topic = ".".join([*parts, _METHOD, self.digest])
        if len(topic) + len(_LONGEST_SUFFIX) > _TOPIC_LIMIT:
            over = len(topic) + len(_LONGEST_SUFFIX) - _TOPIC_LIMIT
            msg = f"the topic `{topic}` is {over} characters longer than Kafka allows; shorten a name"
            raise ChainsUsageError(msg)
        return topic


def background_topic(request_topic: str) -> str:
    """Name the topic of the requests that are taken only while there are no others."""
    return request_topic + BACKGROUND


def topic_part(name: str) -> str:
    """Write a name as a part of a topic's: Kafka allows no spaces."""
    return re.sub(r"\s+", "-", name.strip())


def name_fault(name: str) -> str | None:
    """Say what keeps a name out of a topic's, or None."""
    part = topic_part(name)
    if not part:
        return "is empty"
    wrong = sorted(set(re.sub(r"[A-Za-z0-9._-]", "", part)))
    return f"has {', '.join(map(repr, wrong))}; Kafka allows letters, digits, `.`, `_` and `-`" if wrong else None


def read(function: object, chainlet: str) -> tuple[Signature | None, list[Problem]]:
    """Read a method's signature: the signature, or None and every problem that is in the way of one."""
    inner = getattr(function, "__func__", function)
    inner = inspect.unwrap(inner) if callable(inner) else inner
    if not isinstance(inner, FunctionType):
        message = f"`{_METHOD}` must be a method; write `async def {_METHOD}(self, …) -> …`"
        return None, [Problem("<unknown>", 0, f"{chainlet}.{_METHOD}", "NOT_A_METHOD", message)]
    reader = _Reader(inner, bound=not isinstance(function, staticmethod))
    if isinstance(function, staticmethod | classmethod):
        reader.report(
            "NOT_A_METHOD", f"`@{type(function).__name__}` is not allowed here; make it a plain method with `self`"
        )
    return reader.read(chainlet)


def takes_websocket(function: object) -> bool:
    """Tell whether a method takes a WebSocket, whatever else may be wrong with it."""
    inner = getattr(function, "__func__", function)
    inner = inspect.unwrap(inner) if callable(inner) else inner
    return isinstance(inner, FunctionType) and any(
        _is_websocket(inner, parameter) for parameter in _signature(inner).parameters.values()
    )


class _Reader:
    """Reads one function, collecting problems and the description of its types."""

    def __init__(self, function: FunctionType, *, bound: bool) -> None:
        self.function = function
        self.bound = bound
        self.source = source.of_function(function)
        self.problems: list[Problem] = []
        self.describer = Describer()
        self.where = ".".join(function.__qualname__.replace("<locals>.", "").split(".")[-2:])

    def report(self, kind: str, message: str, line: int | None = None) -> None:
        place = self.source.line if line is None else line
        self.problems.append(Problem(self.source.file, place, self.where, kind, message))

    def read(self, chainlet: str) -> tuple[Signature | None, list[Problem]]:
        own = self._own_parameters()
        if any(_is_websocket(self.function, parameter) for parameter in own):
            return self._websocket(own, chainlet)
        arguments: dict[str, Json] = {}
        parameters = [found for parameter in own if (found := self._parameter(parameter, arguments)) is not None]
        result, streaming = self._result()
        described = self._describe(result, "the result", self.source.result_line()) if result is not MISSING else None
        if self.problems:
            return None, self.problems
        contract = {
            "arguments": arguments,
            "result": described,
            "streaming": streaming,
            "classes": self.describer.classes,
        }
        return Signature(
            chainlet=chainlet,
            parameters=tuple(parameters),
            result=result,
            streaming=streaming,
            is_async=inspect.iscoroutinefunction(self.function) or inspect.isasyncgenfunction(self.function),
            digest=hashlib.sha256(canonical(contract).encode()).hexdigest()[:8],
        ), []

    def _websocket(self, own: list[inspect.Parameter], chainlet: str) -> tuple[Signature | None, list[Problem]]:
        """Read a method that takes a WebSocket: it is the only argument, and all that is given goes through it."""
        mend = f"write `async def {_METHOD}(self, websocket: WebSocketProtocol) -> None`"
        first = next(parameter for parameter in own if _is_websocket(self.function, parameter))
        for parameter in own:
            if parameter is first and parameter.kind not in _BY_POSITION:
                message = f"a WebSocket is one argument, which is passed by name; {mend}"
            elif parameter is first and parameter.default is not MISSING:
                message = f"a WebSocket has no default, as there always is one; {mend}"
            elif parameter is not first:
                message = f"`{parameter.name}` can't be beside a WebSocket, which carries all that is sent; {mend}"
            else:
                continue
            self.report("WEBSOCKET", message, self.source.argument_line(parameter.name))
        if inspect.isasyncgenfunction(self.function) or not inspect.iscoroutinefunction(self.function):
            self.report("WEBSOCKET", f"a method that takes a WebSocket is asynchronous and does not yield; {mend}")
        result = _signature(self.function).return_annotation
        if result not in (None, "None"):
            message = f"what a method that takes a WebSocket gives is sent through it, so its result is None; {mend}"
            self.report("WEBSOCKET", message, self.source.result_line())
        if self.problems:
            return None, self.problems
        contract = {"arguments": {first.name: "websocket"}, "result": "websocket", "streaming": True}
        return Signature(
            chainlet=chainlet,
            parameters=(Parameter(first.name, Handshake),),
            result=FromWorker,
            streaming=True,
            is_async=True,
            digest=hashlib.sha256(canonical(contract).encode()).hexdigest()[:8],
            websocket=True,
        ), []

    def _own_parameters(self) -> list[inspect.Parameter]:
        parameters = list(_signature(self.function).parameters.values())
        if not self.bound or (parameters and parameters[0].name == "cls"):
            return parameters[self.bound :]  # reported already, as what the decorator made of it
        if not parameters or parameters[0].name != "self":
            self.report("NOT_A_METHOD", f"`{self.function.__name__}` has no `self`; make `self` its first argument")
            return parameters
        return parameters[1:]

    def _parameter(self, parameter: inspect.Parameter, arguments: dict[str, Json]) -> Parameter | None:
        """Read one argument and describe it in `arguments`."""
        name = parameter.name
        if parameter.kind not in _BY_POSITION:
            shown = (
                str(parameter.replace(annotation=MISSING)) if parameter.kind.name.startswith("VAR") else f"{name}, /"
            )
            message = f"`{shown}` is not allowed; arguments travel by name, so write out each one with its type"
            self.report("ARGUMENT", message, self.source.argument_line(name))
            return None
        if parameter.annotation is MISSING:
            message = f"the argument `{name}` has no type; annotate it, for example `{name}: str`"
            self.report("MISSING_ANNOTATION", message, self.source.argument_line(name))
            return None
        line = self.source.annotation_line(name)
        annotation = self._resolve(parameter.annotation, f"the argument `{name}`", line)
        if annotation is MISSING:
            return None
        described = self._describe(annotation, f"the argument `{name}`", line)
        arguments[name] = {"type": described}
        if parameter.default is not MISSING:
            arguments[name]["default"] = describe_value(parameter.default)
            if described is not None:
                self._check_default(parameter, annotation)
        return Parameter(name, annotation, parameter.default, parameter.kind is inspect.Parameter.KEYWORD_ONLY)

    def _check_default(self, parameter: inspect.Parameter, annotation: Any) -> None:
        """Send the default through bytes, as an argument would go: it must come out."""
        try:
            data = msgspec.msgpack.encode(parameter.default, enc_hook=foreign.encode_hook)
            msgspec.msgpack.decode(data, type=annotation, dec_hook=foreign.decode_hook)
        except Exception as error:  # noqa: BLE001 - validation may run code of the user's; the reason is in the text
            reason = " ".join(str(error).split())
            shown = f"`{parameter.name}: {spell(annotation)} = {parameter.default!r}`"
            message = f"the default in {shown} does not fit its type: {reason}"
            self.report("DEFAULT", message, self.source.default_line(parameter.name))

    def _result(self) -> tuple[Any, bool]:
        """Give the type of the result or of a chunk, and whether it streams; MISSING where that can't be told."""
        line = self.source.result_line()
        annotation = _signature(self.function).return_annotation
        if annotation is MISSING:
            hint = "`-> AsyncIterator[T]` for a stream" if self._yields else "`-> None` for none"
            self.report("MISSING_ANNOTATION", f"the result has no type; annotate it, with {hint}")
        else:
            annotation = self._resolve(annotation, "the result", line)
        fault = self._stream_fault(annotation)
        if fault:
            self.report("STREAM", fault, line)
        if fault or annotation is MISSING:
            return MISSING, False
        if _origin(annotation) in _STREAMS:
            return self._chunk(annotation, line), True
        return annotation, False

    @property
    def _yields(self) -> bool:
        return inspect.isasyncgenfunction(self.function)

    def _stream_fault(self, annotation: Any) -> str | None:
        """Say why the result is neither a value nor a stream as we know it, or None."""
        if inspect.isgeneratorfunction(self.function):
            return "a stream must be asynchronous; write `async def`, and `AsyncIterator[T]` for its result"
        if annotation is MISSING:
            return None
        origin = _origin(annotation)
        if origin is abc.AsyncIterable:
            return "a stream is annotated `AsyncIterator[T]`, not `AsyncIterable`"
        if origin in _SYNC_ITERATORS:
            return f"{show(annotation)} is not asynchronous; for a stream, `yield` and annotate `AsyncIterator[T]`"
        if self._yields and origin not in _STREAMS:
            return f"the method yields, so its result is a stream; annotate `AsyncIterator[{spell(annotation)}]`"
        return None

    def _chunk(self, annotation: Any, line: int) -> Any:
        args = get_args(annotation)
        if not self._yields and not getattr(self.function, "__isabstractmethod__", False):
            self.report(
                "STREAM", f"{show(annotation)} is a stream, but the method has no `yield`; yield each chunk", line
            )
        if not args:
            self.report("STREAM", "the stream does not say of what; annotate, for example, `AsyncIterator[str]`", line)
            return MISSING
        if any(arg not in (None, type(None)) for arg in args[1:]):
            self.report("STREAM", "nothing can be sent into a stream; annotate `AsyncIterator[T]`", line)
        return args[0]

    def _describe(self, annotation: Any, what: str, line: int) -> Json:
        try:
            return self.describer.describe(annotation)
        except UnsupportedTypeError as error:
            self.report("UNSUPPORTED_TYPE", f"the type of {what} is not supported: {error}", line)
            return None

    def _resolve(self, annotation: Any, what: str, line: int) -> Any:
        """Evaluate an annotation that may be text, or hold text; MISSING where that fails."""
        try:
            return resolve(self.function, annotation)
        except NameError as error:
            message = (
                f"{what} names `{error.name}`, which the module does not have; import it (not under `TYPE_CHECKING`)"
            )
            self.report("UNSUPPORTED_TYPE", message, line)
            return MISSING
        except Exception as error:  # noqa: BLE001 - the annotation is the user's code; the reason is in the text
            self.report("UNSUPPORTED_TYPE", f"the type of {what} can't be evaluated: {error}", line)
            return MISSING


def resolve(function: FunctionType, annotation: Any) -> Any:
    """Evaluate an annotation of a method, which may be text or hold text. Raises what its evaluation raises."""

    def holder() -> None: ...

    holder.__annotations__ = {"it": annotation}
    return typing.get_type_hints(holder, function.__globals__, _class_names(function), include_extras=True)["it"]


def _is_websocket(function: FunctionType, parameter: inspect.Parameter) -> bool:
    try:
        return parameter.annotation is not MISSING and resolve(function, parameter.annotation) is WebSocketProtocol
    except Exception:  # noqa: BLE001 - code of the user's; whoever reads the argument says what is wrong with it
        return False


def _class_names(function: FunctionType) -> dict[str, Any]:
    """Give the names in the class around a method: annotations that are not text see them."""
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split(".")[:-1]:
        found = getattr(found, part, None)
    return dict(vars(found)) if isinstance(found, type) else {}


def _origin(annotation: Any) -> Any:
    return get_origin(annotation) or annotation


def _signature(function: FunctionType) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Since 3.14 annotations are evaluated when asked for; `_resolve` reports the names that don't exist.
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)
