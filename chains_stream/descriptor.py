"""What a type means, as plain JSON: the part of a signature's digest that speaks of types.

It holds what decides which bytes are valid and nothing else: names of classes and fields, constraints and defaults, but
no module names, docstrings, titles or order of fields. It is ours, so that no library's new version moves a topic.
"""

import dataclasses
import enum
import inspect
import json
import math
import re
import sys
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from uuid import UUID

import msgspec
import pydantic
import typing_extensions
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from chains_stream import foreign

Json = Any  # what json.dumps takes

_SCALARS: dict[Any, str] = {
    None: "null", type(None): "null", Any: "any", bool: "bool", int: "int", float: "float", str: "str",
    bytes: "bytes", bytearray: "bytearray", memoryview: "memoryview", Decimal: "decimal", UUID: "uuid",
    datetime: "datetime", date: "date", time: "time", timedelta: "timedelta",
}  # fmt: skip
_CONTAINERS: dict[Any, str] = {
    list: "list", abc.Collection: "list", abc.Sequence: "list", abc.MutableSequence: "list",
    set: "set", abc.Set: "set", abc.MutableSet: "set", frozenset: "frozenset",
    dict: "dict", abc.Mapping: "dict", abc.MutableMapping: "dict",
}  # fmt: skip
_CONSTRAINTS = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz")
_VALUE_FACTORIES = (list, dict, set, frozenset, tuple, bytearray, str, int, float, bool, bytes)
_MODEL_CONFIG = (
    "extra", "strict", "str_strip_whitespace", "str_to_lower", "str_to_upper", "str_min_length", "str_max_length",
    "allow_inf_nan", "coerce_numbers_to_str", "val_json_bytes", "ser_json_bytes", "ser_json_timedelta",
)  # fmt: skip
_WRAPPERS = (typing.Final, typing.Required, typing.NotRequired, typing_extensions.ReadOnly)
_UNION_MEND = "; of several pydantic models make one, `pydantic.RootModel[A | B]`, or use msgspec Structs with tags"
_STREAM_NAMES = frozenset({"AsyncIterator", "AsyncGenerator", "AsyncIterable", "Iterator", "Generator", "Iterable"})
_MODULE_PREFIX = re.compile(r"(?<!['\"\w])(?:(?:\w+|<locals>)\.)+(?=[A-Za-z_])")


class UnsupportedTypeError(ValueError):
    """A type can't travel between Chainlets. The message says which, and what to use in its place."""


def describe(annotation: Any) -> dict[str, Json]:
    """Describe one type: ``{"type": …, "classes": {name: …}}``. Raises UnsupportedTypeError."""
    describer = Describer()
    return {"type": describer.describe(annotation), "classes": describer.classes}


def canonical(value: Json) -> str:
    """Write JSON in the one way that digests are made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def describe_value(value: Any) -> Json:
    """Describe a default by its value, and what has no plain value by the name of its class."""
    for kinds, describe_one in _VALUES:
        if isinstance(value, kinds):
            return describe_one(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _described_object(value, [field.name for field in dataclasses.fields(value)])
    if hasattr(type(value), "__attrs_attrs__"):
        return _described_object(value, [field.name for field in type(value).__attrs_attrs__])
    if foreign.is_numpy(value):
        return {"numpy": describe_value(foreign.encode_hook(value))}
    if callable(value):
        return {"callable": getattr(value, "__qualname__", type(value).__qualname__)}
    return {"object": type(value).__name__}


def _described_object(value: Any, names: Iterable[str]) -> Json:
    return {
        "object": type(value).__name__,
        "fields": {name: describe_value(getattr(value, name)) for name in names},
    }


_VALUES: tuple[
    tuple[Any, Callable[[Any], Json]], ...
] = (  # the first that fits: an IntEnum is an int, a datetime a date
    (enum.Enum, lambda v: {"enum": describe_value(v.value)}),
    ((type(None), bool), lambda v: v),
    (int, int),
    (str, str),
    (float, lambda v: float(v) if math.isfinite(v) else {"float": str(float(v))}),
    ((bytes, bytearray, memoryview), lambda v: {"bytes": bytes(v).hex()}),
    ((datetime, date, time), lambda v: {type(v).__name__: v.isoformat()}),
    ((timedelta, Decimal, UUID), lambda v: {type(v).__name__: str(v)}),
    (re.Pattern, lambda v: {"pattern": v.pattern}),
    (abc.Mapping, lambda v: {"dict": _sorted([describe_value(key), describe_value(v[key])] for key in v)}),
    (abc.Set, lambda v: {"set": _sorted(map(describe_value, v))}),
    ((list, tuple), lambda v: [describe_value(item) for item in v]),
    (msgspec.Struct, lambda v: _described_object(v, type(v).__struct_fields__)),
    (pydantic.BaseModel, lambda v: _described_object(v, type(v).model_fields)),
)


class Describer:
    """Describes types that share their classes; `classes` holds each class once, by name."""

    def __init__(self) -> None:
        self.classes: dict[str, Json] = {}
        self._names: dict[Any, str] = {}
        self._in_model = False  # pydantic validates what a model holds, so there any class may stand

    def describe(self, annotation: Any) -> Json:
        """Describe a type; raise UnsupportedTypeError if we or msgspec can't carry it."""
        try:
            described = self._type(annotation)
            msgspec.msgpack.Decoder(annotation, dec_hook=foreign.decode_hook)
        except UnsupportedTypeError:
            raise
        except RecursionError:
            msg = f"{show(annotation)} refers to itself without end; give the recursive part a class, such as a Struct"
            raise UnsupportedTypeError(msg) from None
        except NameError as error:
            msg = f"{show(annotation)} uses `{error.name}`, which is not defined; import it at the top of the file"
            raise UnsupportedTypeError(msg) from None
        except Exception as error:  # noqa: BLE001 - msgspec and a user's class may refuse in any way; the reason is in the text
            raise UnsupportedTypeError(_refusal(annotation, error)) from None
        return described

    def _type(self, annotation: Any) -> Json:
        bare, constraints = self._unwrap(annotation)
        described = self._bare(bare)
        return {"type": described, "where": constraints} if constraints else described

    def _unwrap(self, annotation: Any) -> tuple[Any, dict[str, Json]]:
        """Take off Annotated, NewType, aliases and Final, and give the constraints met on the way."""
        constraints: dict[str, Json] = {}
        while True:
            origin = get_origin(annotation)
            if origin is typing.Annotated:
                for meta in annotation.__metadata__:
                    constraints |= _model_constraint(meta) if self._in_model else _constraint(meta, annotation)
                annotation = annotation.__origin__
            elif origin in _WRAPPERS:
                annotation = get_args(annotation)[0]
            elif type(origin).__name__ == "TypeAliasType":
                annotation = origin.__value__[get_args(annotation)]
            elif type(annotation).__name__ == "TypeAliasType":
                annotation = annotation.__value__
            elif hasattr(annotation, "__supertype__"):
                annotation = annotation.__supertype__
            else:
                return annotation, constraints

    def _bare(self, kind: Any) -> Json:
        if _hashable(kind) and kind in _SCALARS:
            return _SCALARS[kind]
        if isinstance(kind, TypeVar):
            return "any" if kind.__bound__ is None else self._type(kind.__bound__)
        origin, args = get_origin(kind) or kind, get_args(kind)
        if origin in (Union, UnionType):
            return self._union(args)
        if origin is Literal:
            return {"literal": _sorted(map(describe_value, args))}
        if origin is tuple or origin in _CONTAINERS:
            return self._container(kind, origin, args)
        return _array(kind) if foreign.is_array(kind) else self._class(kind, origin, args)

    def _union(self, args: tuple[Any, ...]) -> Json:
        members: dict[str, Json] = {}
        for arg in args:
            if arg is msgspec.UnsetType:
                continue
            described = self._type(arg)
            nested = described["union"] if isinstance(described, dict) and "union" in described else [described]
            members |= {canonical(member): member for member in nested}
        ordered = [members[key] for key in sorted(members)]
        return {"union": ordered} if len(ordered) > 1 else ordered[0]

    def _container(self, kind: Any, origin: Any, args: tuple[Any, ...]) -> Json:
        if origin is not tuple:
            name = _CONTAINERS[origin]
            return {name: [self._type(arg) for arg in args or (Any,) * (2 if name == "dict" else 1)]}
        if kind is tuple or kind is typing.Tuple:  # noqa: UP006 - a user may write it so
            return {"items": "any"}
        if args[1:] == (Ellipsis,):
            return {"items": self._type(args[0])}
        return {"tuple": [self._type(arg) for arg in args]}

    def _class(self, kind: Any, origin: Any, args: tuple[Any, ...]) -> Json:
        """Describe a class by its name, and its body once, so that a class may hold itself."""
        body = self._body_of(origin)
        if body is None:
            raise UnsupportedTypeError(_unknown(kind, origin))
        # Only a model and an enum mean the same inside of a model and outside.
        inside = self._in_model and not (foreign.is_model(origin) or isinstance(origin, enum.EnumMeta))
        known = (kind, inside)
        if known not in self._names:
            name: str = origin.__name__ + " in a model" * inside
            if args:
                name += f"[{','.join(canonical(self._type(arg)) for arg in args)}]"
            count = sum(other.partition("#")[0] == name for other in self.classes)
            self._names[known] = key = f"{name}#{count + 1}" if count else name
            self.classes[key] = None  # taken, while the body is described
            try:
                self.classes[key] = body(kind)
            except Exception:
                del self._names[known], self.classes[key]  # a second use is to fail as the first did
                raise
        return {"class": self._names[known]}

    def _body_of(self, cls: Any) -> Callable[[Any], Json] | None:
        if not isinstance(cls, type):
            return None
        for fits, body in (
            (isinstance(cls, enum.EnumMeta), self._enum),
            (foreign.is_model(cls), self._model),
            (issubclass(cls, msgspec.Struct), self._struct),
            (typing_extensions.is_typeddict(cls), self._typed_dict),
            (issubclass(cls, tuple) and hasattr(cls, "_fields"), self._named_tuple),
            (hasattr(cls, "__attrs_attrs__"), self._attrs),
            (
                dataclasses.is_dataclass(cls) and (self._in_model or not foreign.is_model_dataclass(cls)),
                self._dataclass,
            ),
            (self._in_model, self._of_pydantic),
        ):
            if fits:
                return body
        return None

    def _enum(self, kind: Any) -> Json:
        return {"enum": _sorted(describe_value(member.value) for member in kind)}

    def _of_pydantic(self, kind: Any) -> Json:
        return {"foreign": (get_origin(kind) or kind).__name__}

    def _struct(self, kind: Any) -> Json:
        config = (get_origin(kind) or kind).__struct_config__
        fields = []
        for field in msgspec.structs.fields(kind):
            described = self._field(field.encode_name, field.type)
            if field.default_factory is not msgspec.NODEFAULT:
                described["default"] = _factory(field.default_factory)
            elif field.default is not msgspec.NODEFAULT:
                described["default"] = describe_value(field.default)
            fields.append(described)
        return {
            "struct": fields if config.array_like else _sorted(fields),
            "array_like": config.array_like,
            "tag": None if config.tag is None else [config.tag_field, config.tag],
            "forbid_unknown_fields": config.forbid_unknown_fields,
        }

    def _dataclass(self, kind: Any) -> Json:
        cls, hints = get_origin(kind) or kind, _hints(kind)
        fields = []
        for field in dataclasses.fields(cls):
            described = self._field(field.name, hints[field.name])
            if field.default_factory is not dataclasses.MISSING:
                described["default"] = _factory(field.default_factory)
            elif field.default is not dataclasses.MISSING:
                described["default"] = describe_value(field.default)
            fields.append(described)
        return {"dataclass": _sorted(fields)}

    def _attrs(self, kind: Any) -> Json:
        cls, hints = get_origin(kind) or kind, _hints(kind)
        attrs = sys.modules["attr"]  # a class of its exists, so it is imported
        fields = []
        for field in cls.__attrs_attrs__:
            described = self._field(field.name, hints[field.name])
            if isinstance(field.default, attrs.Factory):
                described["default"] = _factory(field.default.factory)
            elif field.default is not attrs.NOTHING:
                described["default"] = describe_value(field.default)
            fields.append(described)
        return {"dataclass": _sorted(fields)}

    def _typed_dict(self, kind: Any) -> Json:
        cls = get_origin(kind) or kind
        fields = []
        for name, hint in _hints(kind).items():
            # Under `from __future__ import annotations` the class itself does not know what it requires.
            marks = {typing.Required: True, typing.NotRequired: False}
            required = marks.get(get_origin(hint), name in cls.__required_keys__)
            fields.append(self._field(name, hint) | {"required": required})
        return {"typed_dict": _sorted(fields)}

    def _named_tuple(self, kind: Any) -> Json:
        cls, hints = get_origin(kind) or kind, _hints(kind)
        defaults = {name: {"default": describe_value(value)} for name, value in cls._field_defaults.items()}
        return {
            "named_tuple": [self._field(name, hints.get(name, Any)) | defaults.get(name, {}) for name in cls._fields]
        }

    def _field(self, name: str, annotation: Any) -> dict[str, Json]:
        return {"name": name, "type": self._type(annotation)}

    def _model(self, kind: type[pydantic.BaseModel]) -> Json:
        kind.model_rebuild()  # a model may name classes that were defined after it
        for name, info in kind.model_fields.items():
            if info.alias is not None and info.alias != name and info.alias in kind.model_fields:
                msg = f"`{kind.__name__}.{name}` has another field's name, `{info.alias}`, as its alias; rename one"
                raise UnsupportedTypeError(msg)
        config = {key: describe_value(value) for key, value in kind.model_config.items() if key in _MODEL_CONFIG}
        around, self._in_model = self._in_model, True
        try:
            for name, info in kind.model_fields.items():
                if _is_bare_array(info) and not _has_validators(kind):
                    msg = (
                        f"`{kind.__name__}.{name}` is an array, which pydantic can't read; use `NumpyArrayField` for it"
                    )
                    raise UnsupportedTypeError(msg)
            fields = [self._model_field(name, info) for name, info in kind.model_fields.items()]
        finally:
            self._in_model = around
        return {"model": _sorted(fields), "config": config}

    def _model_field(self, name: str, info: FieldInfo) -> Json:
        described: dict[str, Json] = {"name": name, "type": self._type(info.annotation)}
        constraints: dict[str, Json] = {}
        for meta in info.metadata:
            constraints |= _model_constraint(meta)
        if info.discriminator is not None:
            constraints["discriminator"] = describe_value(info.discriminator)
        if constraints:
            described["where"] = constraints
        for key in ("validation_alias", "serialization_alias"):
            if getattr(info, key) not in (None, name):
                described[key] = describe_value(getattr(info, key))
        if info.default_factory is not None:
            described["default"] = _factory(info.default_factory)
        elif info.default is not PydanticUndefined:
            described["default"] = describe_value(info.default)
        return described


def show(annotation: Any) -> str:
    """Write a type as its author would have, in backticks."""
    return f"`{spell(annotation)}`"


def spell(annotation: Any) -> str:
    """Write a type as its author would have, without the modules' names."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return _MODULE_PREFIX.sub("", annotation if isinstance(annotation, str) else str(annotation))


def _sorted(items: Iterable[Json]) -> list[Json]:
    return sorted(items, key=canonical)


def _hashable(kind: Any) -> bool:
    try:
        hash(kind)
    except TypeError:
        return False
    return True


def _factory(factory: Any) -> Json:
    return (
        describe_value(factory()) if factory in _VALUE_FACTORIES else {"factory": getattr(factory, "__qualname__", "")}
    )


def _array(kind: Any) -> Json:
    try:
        spec = foreign.array_spec(kind)
    except ValueError as error:
        raise UnsupportedTypeError(str(error)) from None
    return {"ndarray": spec.dtype_names, "ndim": spec.ndim}


def _constraint(meta: Any, annotation: Any) -> dict[str, Json]:
    if isinstance(meta, msgspec.Meta):
        return {key: describe_value(v) for key in _CONSTRAINTS if (v := getattr(meta, key)) is not None}
    package = type(meta).__module__.partition(".")[0]
    constraints = (
        meta.metadata if isinstance(meta, FieldInfo) else [meta] * (package in ("annotated_types", "pydantic"))
    )
    if constraints:
        listed = ", ".join(f"`{constraint}`" for constraint in constraints)
        msg = f"{show(annotation.__origin__)} has pydantic's {listed}, which only models check; use `msgspec.Meta(…)`"
        raise UnsupportedTypeError(msg)
    return {}


def _is_bare_array(info: FieldInfo) -> bool:
    members = get_args(info.annotation) if get_origin(info.annotation) in (Union, UnionType) else (info.annotation,)
    return not info.metadata and any(map(foreign.is_array, members))


def _has_validators(kind: type[pydantic.BaseModel]) -> bool:
    decorators = kind.__pydantic_decorators__
    return bool(decorators.field_validators or decorators.model_validators or decorators.validators)


def _model_constraint(meta: Any) -> dict[str, Json]:
    """Describe what pydantic keeps beside a type, by meaning; documentation is left out."""
    if isinstance(meta, FieldInfo):
        return {key: value for part in meta.metadata for key, value in _model_constraint(part).items()}
    if type(meta).__module__ == "pydantic.functional_validators":
        return {type(meta).__name__: describe_value(getattr(meta, "func", None))}
    if (
        type(meta).__module__.partition(".")[0] not in ("annotated_types", "pydantic")
        or "JsonSchema" in type(meta).__name__
    ):
        return {}
    if dataclasses.is_dataclass(meta) and not isinstance(meta, type):
        values = {field.name: getattr(meta, field.name) for field in dataclasses.fields(meta)}
    else:
        values = vars(meta)
    return {key: describe_value(value) for key, value in values.items() if value is not None} or {
        type(meta).__name__: True
    }


def _refusal(annotation: Any, error: Exception) -> str:
    reason = re.sub(r" - type `.*` is not supported$", "", str(error), flags=re.DOTALL)
    mend = _UNION_MEND if "custom type" in reason else ""
    return f"{show(annotation)}: {reason[:1].lower()}{reason[1:]}{mend}"


def _unknown(kind: Any, origin: Any) -> str:
    name = getattr(origin, "__name__", str(origin))
    if name in _STREAM_NAMES:
        return f"{show(kind)} is a stream, which only a whole result can be; use a `list`"
    if isinstance(kind, str | typing.ForwardRef):
        return f"{show(kind)} is a name that can't be found; import it at the top of the file"
    if dataclasses.is_dataclass(kind):
        return f"{show(kind)} is a dataclass of pydantic's; use `pydantic.BaseModel` or `dataclasses.dataclass`"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(origin, type) and issubclass(origin, numpy.generic):
        return f"{show(kind)} is a scalar of numpy's; use `int`, `float`, `bool` or an array"
    if kind is object:
        return "`object` says nothing of the value; use `Any`"
    return (
        f"{show(kind)} can't travel between Chainlets; use builtins, a msgspec Struct, a dataclass, a pydantic model, "
        "a TypedDict or a numpy array"
    )


def _hints(kind: Any) -> dict[str, Any]:
    """Give the annotations of a class and its bases, with the type variables of generics filled in."""
    cls = get_origin(kind) or kind
    filled: dict[Any, dict[Any, Any]] = {}
    _fill(kind, {}, filled)
    everywhere = {variable: value for mapping in filled.values() for variable, value in mapping.items()}
    hints: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is object or base.__module__ == "typing":
            continue
        # The mro of a TypedDict is `dict` alone, and it holds its bases' annotations itself.
        mapping = everywhere if typing_extensions.is_typeddict(cls) else filled.get(base, {})
        names = [name for name in inspect.get_annotations(base) if name not in hints]
        if names:
            own = typing_extensions.get_type_hints(base, include_extras=True)
            hints |= {name: _substitute(own[name], mapping) for name in names}
    return hints


def _fill(kind: Any, scope: Mapping[Any, Any], filled: dict[Any, dict[Any, Any]]) -> None:
    cls = get_origin(kind) or kind
    args = [_substitute(arg, scope) for arg in get_args(kind)]
    filled[cls] = dict(zip(getattr(cls, "__parameters__", ()), args, strict=False))
    for base in getattr(cls, "__orig_bases__", ()):
        if isinstance(get_origin(base), type):
            _fill(base, filled[cls], filled)


def _substitute(annotation: Any, mapping: Mapping[Any, Any]) -> Any:
    if isinstance(annotation, TypeVar):
        return mapping.get(annotation, annotation)
    parameters = getattr(annotation, "__parameters__", ())
    if not parameters or isinstance(annotation, type):
        return annotation
    return annotation[tuple(mapping.get(p, p) for p in parameters)]
