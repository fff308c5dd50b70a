"""Typed values to bytes and back, with encoders and decoders built once for each signature.

Values are encoded as they are and validated where they arrive, against the annotations. A check before sending would
be a second decoding, which for 10,000 floats takes eight times as long as encoding them, and the receiver could not
rely on it. A value of a wrong type thus comes back as an InvalidArgumentError of the Chainlet that it was sent to, with
the path of the field.
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
import pydantic

from chains_stream import foreign, schema
from chains_stream.errors import ChainsUsageError, InvalidArgumentError, InvalidResultError
from chains_stream.signature import MISSING, Parameter, Signature

Buffer = bytes | bytearray | memoryview | msgspec.Raw

_to_msgpack = msgspec.msgpack.Encoder(enc_hook=foreign.encode_hook)
_to_json = msgspec.json.Encoder(enc_hook=foreign.encode_json_hook)

_PATH = re.compile(r" - at (?:`key` in )?`(\$.*)`$", re.DOTALL)
_FIELD = re.compile(r"^Object (?:missing required|contains unknown) field `(.*)`", re.DOTALL)
# JSON has no NaN and no infinity. In msgpack they are a float's marker and an exponent of ones; a false alarm costs a
# walk through the value, and nothing else.
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]|\xca[\x7f\xff][\x80-\xff]", re.DOTALL)
_FAULTS: tuple[tuple[type[Exception], str], ...] = (
    (UnicodeDecodeError, "the data holds text that is not UTF-8"),
    (UnicodeEncodeError, "text with a lone surrogate can't be sent"),
    (OverflowError, "an integer of more than 64 bits can't be sent"),
    (RecursionError, "the value is nested too deeply, or holds itself"),
)
_NO_FLOATS = (bytes, bytearray, memoryview, datetime, date, time, timedelta, Decimal, UUID)
_IMMUTABLE = (type(None), bool, int, float, str, bytes, Enum, date, time, timedelta, Decimal, UUID)


def codec_of(signature: Signature) -> "Codec":
    """Give the codec of a signature, made once and kept as long as the signature."""
    codec = vars(signature).get("_codec")
    if not isinstance(codec, Codec):
        codec = vars(signature)["_codec"] = Codec(signature)
    return codec


class Codec:
    """Encodes and decodes what one Chainlet takes and gives.

    Arguments travel as a map of their names, and a default by not being there. The ``json`` methods turn the JSON of
    HTTP into msgpack and back, validating on the way. Wherever a value does not fit they raise InvalidArgumentError
    (for arguments; `path` names the field) or InvalidResultError (for results and chunks), with a message of one line.
    Data is any buffer.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._name = f"{signature.chainlet}.run_remote"
        self._arguments = _arguments_struct(signature)
        self._argument_decoder = msgspec.msgpack.Decoder(self._arguments, dec_hook=foreign.decode_hook)
        self._result_decoder = msgspec.msgpack.Decoder(signature.result, dec_hook=foreign.decode_hook)

    @property
    def arguments(self) -> Any:
        """The Struct of a call's arguments."""
        return self._arguments

    def encode_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """Bind the arguments of a call as Python would, and encode them. Their types are checked by the receiver."""
        try:
            return _to_msgpack.encode(self._arguments(*args, **kwargs))
        except Exception as error:
            raise self._bad_call(args, kwargs) or self._bad_argument(error) from error

    def decode_arguments(self, data: Buffer) -> dict[str, Any]:
        """Decode and validate the keyword arguments for ``run_remote``; ones that were not sent have their defaults."""
        try:
            return msgspec.structs.asdict(self._argument_decoder.decode(data))
        except Exception as error:
            raise self._bad_argument(error) from error

    def encode_result(self, value: Any) -> bytes:
        """Encode a result, or one chunk of a stream. Its type is checked by the receiver."""
        try:
            return _to_msgpack.encode(value)
        except Exception as error:
            raise self._bad_result(error) from error

    def decode_result(self, data: Buffer) -> Any:
        """Decode and validate a result, or one chunk of a stream."""
        try:
            return self._result_decoder.decode(data)
        except Exception as error:
            raise self._bad_result(error) from error

    def arguments_from_json(self, data: Buffer) -> bytes:
        """Validate arguments that came as a JSON object, and give them as msgpack."""
        decoder = self._json_argument_decoder
        try:
            return _to_msgpack.encode(decoder.decode(data))
        except Exception as error:
            raise self._bad_argument(error) from error

    def arguments_to_json(self, data: Buffer) -> bytes:
        """Validate arguments that are msgpack, and give them as a JSON object."""
        try:
            return _json(self._argument_decoder.decode(data), data)
        except Exception as error:
            raise self._bad_argument(error) from error

    def result_from_json(self, data: Buffer) -> bytes:
        """Validate a result, or a chunk, that came as JSON, and give it as msgpack."""
        decoder = self._json_result_decoder
        try:
            return _to_msgpack.encode(decoder.decode(data))
        except Exception as error:
            raise self._bad_result(error) from error

    def result_to_json(self, data: Buffer) -> bytes:
        """Validate a result, or a chunk, that is msgpack, and give it as JSON."""
        try:
            return _json(self._result_decoder.decode(data), data)
        except Exception as error:
            raise self._bad_result(error) from error

    def schema(self) -> dict[str, Any]:
        """Give the JSON Schema of ``arguments`` and ``result`` (or chunk), and under ``$defs`` the classes they share.

        References are those of an OpenAPI 3.1 document that has ``$defs`` as its ``components/schemas``. Raises
        ChainsUsageError for a type without a form in JSON.
        """
        try:
            found = schema.of(self._arguments, self.signature.result)
            for parameter in self.signature.parameters:
                if parameter.default is not MISSING and not isinstance(parameter.default, _IMMUTABLE):
                    # msgspec shows only those defaults that it need not copy.
                    shown = msgspec.to_builtins(parameter.default, str_keys=True, enc_hook=foreign.encode_json_hook)
                    found["arguments"]["properties"][parameter.name]["default"] = shown
        except (TypeError, ValueError) as error:
            raise self._no_json(error) from error
        return found

    @functools.cached_property
    def _json_argument_decoder(self) -> msgspec.json.Decoder[Any]:
        return self._json_decoder(self._arguments)

    @functools.cached_property
    def _json_result_decoder(self) -> msgspec.json.Decoder[Any]:
        return self._json_decoder(self.signature.result)

    def _json_decoder(self, kind: Any) -> msgspec.json.Decoder[Any]:
        try:
            return msgspec.json.Decoder(kind, dec_hook=foreign.decode_json_hook)
        except TypeError as error:
            raise self._no_json(error) from error

    def _no_json(self, error: Exception) -> ChainsUsageError:
        return ChainsUsageError(f"{self._name} has a type that JSON can't hold: {_one_line(str(error))}")

    def _bad_argument(self, error: Exception, path: str | None = None) -> InvalidArgumentError:
        faults = list(_faults(error, path))
        text = "; ".join(f"{message} - at `{_one_line(where)}`" if where else message for message, where in faults)
        return InvalidArgumentError(f"{self._name}: {text}", path=_field_path(*faults[0]))

    def _bad_result(self, error: Exception) -> InvalidResultError:
        what = "chunk" if self.signature.streaming else "result"
        text = "; ".join(
            f"{message} - at `{_one_line(where)}`" if where else message for message, where in _faults(error)
        )
        return InvalidResultError(f"{self._name}: invalid {what}: {text}")

    def _bad_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InvalidArgumentError | None:
        """Say which argument is to blame; None if each by itself is fine."""
        try:
            bound = self._arguments(*args, **kwargs)
        except TypeError:
            faults = list(_binding_faults(self.signature.parameters, args, kwargs))
            path = next((f"$.{name}" for _, name in faults if name is not None), None)
            return InvalidArgumentError(f"{self._name}: {'; '.join(text for text, _ in faults)}", path=path)
        for name in type(bound).__struct_fields__:
            try:
                _to_msgpack.encode(getattr(bound, name))
            except Exception as error:  # noqa: BLE001 - a hook may run code of the user's
                return self._bad_argument(error, f"$.{name}")
        return None


def to_msgpack(value: Any) -> bytes:
    """Encode a value as msgpack. What it raises is for `explain`."""
    return _to_msgpack.encode(value)


def to_json(value: Any) -> bytes:
    """Encode a value as JSON, unless a float in it has no form there. What it raises is for `explain`."""
    data = _to_json.encode(value)
    # msgspec writes such a float as null, as it does None.
    if b"null" in data and _NOT_FINITE.search(_to_msgpack.encode(value)):
        plain = msgspec.to_builtins(value, builtin_types=_NO_FLOATS, enc_hook=foreign.encode_json_hook)
        _refuse_not_finite(plain, "$")
    return data


def explain(error: Exception) -> tuple[str, str | None]:
    """Say in one line what is wrong with a value that does not decode, and give the path of the field at fault."""
    faults = list(_faults(error))
    text = "; ".join(f"{message} - at `{_one_line(where)}`" if where else message for message, where in faults)
    return text, _field_path(*faults[0])


def _arguments_struct(signature: Signature) -> Callable[..., Any]:
    """Make the Struct whose fields are the arguments: it binds a call, and validates what is decoded."""
    name = re.sub(r"\W", "_", f"{signature.chainlet}Arguments")
    bases: tuple[type[msgspec.Struct], ...] = ()
    for kw_only in (False, True):
        fields = [_field(parameter) for parameter in signature.parameters if parameter.kw_only is kw_only]
        struct = msgspec.defstruct(
            name, fields, bases=bases, kw_only=kw_only, omit_defaults=True, forbid_unknown_fields=True, module=__name__
        )
        bases = (struct,)
    return struct


def _field(parameter: Parameter) -> tuple[str, Any] | tuple[str, Any, Any]:
    if parameter.default is MISSING:
        return parameter.name, parameter.annotation
    if isinstance(parameter.default, _IMMUTABLE):
        return parameter.name, parameter.annotation, parameter.default
    copied = functools.partial(copy.deepcopy, parameter.default)
    return parameter.name, parameter.annotation, msgspec.field(default_factory=copied)


def _binding_faults(
    parameters: tuple[Parameter, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """Say all that keeps a call from binding, each with the argument's name."""
    positional = [parameter.name for parameter in parameters if not parameter.kw_only]
    names = [parameter.name for parameter in parameters]
    given = positional[: len(args)]
    if len(args) > len(positional):
        yield f"takes {len(positional)} arguments by position, got {len(args)}", None
    for name in kwargs:
        if name in given:
            yield f"got the argument `{name}` by name and by position", name
        elif name not in names:
            known = ", ".join(f"`{known}`" for known in names) or "none"
            yield f"got an unexpected argument `{name}`; its arguments are: {known}", name
    for parameter in parameters:
        if parameter.default is MISSING and parameter.name not in given and parameter.name not in kwargs:
            yield f"misses the argument `{parameter.name}`", parameter.name


def _faults(error: Exception, path: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Say what is wrong with a value, and where, for each fault that an encoder's or decoder's error tells of."""
    match error:
        case msgspec.ValidationError():
            text = str(error)
            found = _PATH.search(text)
            where = found[1] if found else path
            if isinstance(error.__cause__, pydantic.ValidationError):
                yield from _model_faults(error.__cause__, where or "$")
            else:
                yield _one_line(text[: found.start()] if found else text), where
        case pydantic.ValidationError():
            yield from _model_faults(error, path or "$")
        case msgspec.DecodeError():
            yield f"the data is malformed: {_one_line(str(error))}", path
        case _NotFiniteError():
            yield str(error), error.path
        case _:
            known = next((text for kind, text in _FAULTS if isinstance(error, kind)), None)
            plain = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
            yield known or _one_line(plain), path


def _model_faults(error: pydantic.ValidationError, path: str) -> Iterator[tuple[str, str]]:
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"])
        yield _one_line(fault["msg"]), path + "".join(steps)


def _field_path(message: str, where: str | None) -> str | None:
    """Give the path of the field at fault; a field that is missing, or is too many, has one as well."""
    found = _FIELD.match(message)
    return f"{where or '$'}.{found[1]}" if found else where


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _NotFiniteError(ValueError):
    """A float has no form in JSON."""

    def __init__(self, value: float, path: str) -> None:
        super().__init__(f"JSON has no `{value}`")
        self.path = path


def _json(value: Any, data: Buffer) -> bytes:
    """Encode `value`, which was decoded from `data`, as JSON."""
    if _NOT_FINITE.search(data):
        plain = msgspec.to_builtins(value, builtin_types=_NO_FLOATS, enc_hook=foreign.encode_json_hook)
        _refuse_not_finite(plain, "$")
    return _to_json.encode(value)


def _refuse_not_finite(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotFiniteError(value, path)
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_not_finite(key, path)
            _refuse_not_finite(item, f"{path}.{key}")
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            _refuse_not_finite(item, f"{path}[{index}]")
