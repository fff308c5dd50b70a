"""The Avro schema of a Python type, and what a value needs besides msgspec's plain form to be written with it."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from functools import partial
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import msgspec
import pydantic
from msgspec import inspect

from chains_stream import foreign

Change = Callable[[Any], Any]

# What stays as it is when a value is made plain: fastavro writes these by their logical types.
KEPT = (bytes, bytearray, memoryview, datetime, date, time, Decimal)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EMPTY = (list, dict, set, frozenset, tuple)  # factories of defaults that are the same each time


class AvroSchema(NamedTuple):
    """The schema of a type.

    `change` mends a plain value for fastavro, in place where it can; `tags` gives, by the name of a record, the field
    and the value that tell a tagged Struct from others.
    """

    schema: Any
    change: Change | None
    tags: Mapping[str, tuple[str, Any]]


class _Node(NamedTuple):
    schema: Any
    change: Change | None = None
    fits: tuple[type, ...] = ()  # what a plain value is that `change` is for
    branches: tuple["_Node", ...] = ()  # of a union


class _Field(NamedTuple):
    name: str
    node: _Node
    default: Any = msgspec.NODEFAULT


def avro_schema(kind: Any, *, namespace: str | None = None, decimal: tuple[int, int] | None = None) -> AvroSchema:
    """Derive the schema of a type. `decimal` is the precision and scale of a Decimal that does not say its own.

    Raises TypeError, in one line, for a type with no form in Avro.
    """
    builder = _Builder(f"{namespace}." if namespace else "", decimal)
    node = builder.of(inspect.type_info(kind))
    return AvroSchema(node.schema, node.change, builder.tags)


class _Builder:
    """Walks one type; a class that comes again is referred to by its name."""

    def __init__(self, prefix: str, decimal: tuple[int, int] | None) -> None:
        self.tags: dict[str, tuple[str, Any]] = {}
        self._prefix = prefix
        self._decimal = decimal
        self._named: dict[str, tuple[Any, list[Change]]] = {}
        self._symbols: dict[str, list[str]] = {}  # of enums

    def of(self, info: inspect.Type, extra: Mapping[str, Any] | None = None) -> _Node:
        """Describe a type; `extra` is what `Meta` says of it."""
        simple = _SIMPLE.get(type(info))
        if simple is not None:
            return simple
        match info:
            case inspect.Metadata():
                return self.of(info.type, info.extra)
            case inspect.DateTimeType():
                return _LOCAL if info.tz is False else _ZONED
            case inspect.DecimalType():
                return self._decimals(extra)
            case inspect.UnionType():
                return self._united([self.of(each) for each in info.types])
        return self._compound(info)

    def _compound(self, info: inspect.Type) -> _Node:
        match info:
            case inspect.ListType() | inspect.SetType() | inspect.FrozenSetType():
                item = self.of(info.item_type)
                change = partial(_items, item.change) if item.change else None
                return _Node({"type": "array", "items": item.schema}, change, (list,))
            case inspect.VarTupleType() | inspect.TupleType() | inspect.NamedTupleType():
                item = self._united([self.of(each) for each in _item_types(info)])
                # A list, always: a tuple names a branch to fastavro.
                return _Node({"type": "array", "items": item.schema}, partial(_items, item.change), (list, tuple))
            case inspect.LiteralType():
                return self._plain_union(info.values)
            case inspect.DictType():
                value = self.of(info.value_type)
                each = partial(_values, value.change) if value.change else None
                return _Node({"type": "map", "values": value.schema}, each, (dict,))
            case _:
                return self._class_of(info)

    def _class_of(self, info: inspect.Type) -> _Node:
        match info:
            case inspect.EnumType():
                return self._enum(info.cls)
            case inspect.StructType(array_like=True):
                raise TypeError(f"the Struct `{info.cls.__qualname__}` is array_like, and Avro's records are not")
            case inspect.StructType() | inspect.DataclassType() | inspect.TypedDictType():
                return self._class(info)
            case inspect.CustomType():
                return self._custom(info.cls)
            case _:
                name = type(info).__name__.removesuffix("Type")
                raise TypeError(f"Avro has no form for `{name}`: name the type")

    def _custom(self, kind: Any) -> _Node:
        if foreign.is_model(kind):
            return self._model(kind)
        return self._array() if foreign.is_array(kind) else self._foreign(kind)

    def _decimals(self, extra: Mapping[str, Any] | None) -> _Node:
        precision, scale = (extra or {}).get("decimal") or self._decimal or (None, None)
        if precision is None:
            return _Node("string", str, (Decimal,))
        return _Node({"type": "bytes", "logicalType": "decimal", "precision": precision, "scale": scale})

    def _enum(self, kind: type[Enum]) -> _Node:
        symbols = [member.value for member in kind]
        if not all(isinstance(symbol, str) and _NAME.fullmatch(symbol) for symbol in symbols):
            return self._plain_union(symbols)
        if kind.__name__ in self._named:
            return self._again(kind)
        self._begin(kind, kind.__name__)
        name = self._prefix + kind.__name__
        self._symbols[name] = symbols
        return _Node({"type": "enum", "name": name, "symbols": symbols})

    def _plain_union(self, values: Iterable[Any]) -> _Node:
        """Describe what is one of some plain values: Avro has no such thing, but their types."""
        return self._united([self.of(inspect.type_info(type(value))) for value in values])

    def _class(self, info: inspect.StructType | inspect.DataclassType | inspect.TypedDictType) -> _Node:
        kind = getattr(info.cls, "__origin__", info.cls)
        arguments = get_args(info.cls)
        name = "_".join([kind.__name__, *(re.sub(r"\W+", "_", _called(each)) for each in arguments)])
        if name in self._named:
            return self._again(info.cls, name)
        changes = self._begin(info.cls, name)
        fields = [
            _Field(field.encode_name, self._member(info.cls, field), self._default_of(field)) for field in info.fields
        ]
        if isinstance(info, inspect.StructType) and info.tag_field is not None:
            self.tags[name] = (info.tag_field, info.tag)
            tag = "string" if isinstance(info.tag, str) else "long"
            fields.insert(0, _Field(info.tag_field, _Node(tag), info.tag))
        return self._record(name, fields, changes)

    def _member(self, kind: Any, field: inspect.Field) -> _Node:
        if isinstance(kind, type) and issubclass(kind, dict) and not field.required:
            raise TypeError(f"`{kind.__qualname__}.{field.name}` may be missing, and in Avro every field is there")
        return self.of(field.type)

    @staticmethod
    def _default_of(field: inspect.Field) -> Any:
        return field.default_factory() if field.default_factory in _EMPTY else field.default

    def _model(self, kind: type[pydantic.BaseModel]) -> _Node:
        name = re.sub(r"\W+", "_", kind.__name__).strip("_")
        if name in self._named:
            return self._again(kind, name)
        changes = self._begin(kind, name)
        fields = []
        for each, field in kind.model_fields.items():
            default = field.default_factory() if field.default_factory in _EMPTY else field.default
            fields.append(
                _Field(
                    each,
                    self._annotated(field.annotation, field.metadata),
                    msgspec.NODEFAULT if default is pydantic.fields.PydanticUndefined else default,  # type: ignore[attr-defined] # pydantic's own, which it shows in `model_fields`
                )
            )
        return self._record(name, fields, changes)

    def _annotated(self, annotation: Any, metadata: Iterable[Any] = ()) -> _Node:
        """Describe a field of a model; msgspec refuses a union of models, which pydantic takes."""
        if get_origin(annotation) in (Union, UnionType):
            return self._united([self._annotated(each) for each in get_args(annotation)])
        extra = None
        for each in metadata:
            digits, places = getattr(each, "max_digits", None), getattr(each, "decimal_places", None)
            if digits is not None and places is not None:
                extra = {"decimal": (digits, places)}
        return self.of(inspect.type_info(annotation), extra)

    def _array(self) -> _Node:
        if "NumpyArray" not in self._named:
            self._named["NumpyArray"] = (None, [])
            shape = {"type": "array", "items": "long"}
            fields = [("dtype", "string"), ("shape", shape), ("data", "bytes")]
            record = {"type": "record", "name": f"{self._prefix}NumpyArray"}
            return _Node({**record, "fields": [_named(*field) for field in fields]}, _packed_array, (dict,))
        return _Node(f"{self._prefix}NumpyArray", _packed_array, (dict,))

    def _foreign(self, kind: Any) -> _Node:
        """Describe a type of pydantic's, such as a URL, by what it is in JSON."""
        try:
            form = pydantic.TypeAdapter(kind).json_schema(mode="serialization").get("type")
        except pydantic.PydanticUserError:
            form = None
        known = {"string": "string", "integer": "long", "number": "double", "boolean": "boolean"}
        if form not in known:
            raise TypeError(f"Avro has no form for `{getattr(kind, '__qualname__', kind)}`")
        return _Node(known[form])

    def _begin(self, kind: Any, name: str) -> list[Change]:
        if not _NAME.fullmatch(name):
            raise TypeError(f"`{name}` is no name in Avro: use letters, digits and _")
        changes: list[Change] = []
        self._named[name] = (kind, changes)
        return changes

    def _again(self, kind: Any, name: str | None = None) -> _Node:
        name = name or kind.__name__
        known, changes = self._named[name]
        if known != kind:
            raise TypeError(f"two classes are called `{name}`, and Avro tells them apart by their names")
        # Empty until the class is read to its end, and for good if its values need no change.
        return _Node(f"{self._prefix}{name}", lambda value: changes[0](value) if changes else value, (dict,))

    def _record(self, name: str, fields: list[_Field], changes: list[Change]) -> _Node:
        shown = []
        for field in fields:
            if not _NAME.fullmatch(field.name):
                raise TypeError(f"the field `{field.name}` of `{name}` is no name in Avro: use letters, digits and _")
            shown.append(_named(field.name, *self._with_default(field)))
        steps = tuple((field.name, field.node.change) for field in fields if field.node.change is not None)
        change = None
        if steps:
            change = partial(_members, steps)
            changes.append(change)
        return _Node({"type": "record", "name": f"{self._prefix}{name}", "fields": shown}, change, (dict,))

    def _with_default(self, field: _Field) -> tuple[Any, Any]:
        """Give a field's schema, and its default as Avro writes it: one of the first branch, if it is a union."""
        schema = field.node.schema
        default, branch = _plain_default(field.default)
        branches = schema if isinstance(schema, list) else [schema]
        for place, each in enumerate(branches):
            form = _form(each)
            symbol = branch == "string" and default in self._symbols.get(form, ())
            same = (form == branch or (form, branch) == ("double", "long")) and not _has_logical(each)
            if symbol or (same and (place == 0 or form in _MOVABLE)):
                ordered = [each, *branches[:place], *branches[place + 1 :]]
                return (ordered if isinstance(schema, list) else schema), default
        # A default that Avro can't hold, or that is made anew each time, is none to others.
        return schema, msgspec.NODEFAULT

    def _united(self, nodes: list[_Node]) -> _Node:
        """Make a union, of one branch for each form: Avro could not tell two of a form apart."""
        flat: dict[str, _Node] = {}
        for node in nodes:
            for branch in node.branches or (node,):
                form = _form(branch.schema)
                if form in flat and _base(flat[form].schema) != _base(branch.schema):
                    raise TypeError(f"Avro can't tell two kinds of `{form}` apart in one union")
                flat.setdefault(form, branch)
        if len(flat) == 1:
            return next(iter(flat.values()))
        ordered = sorted(flat, key=lambda form: _ORDER.index(form) if form in _ORDER else len(_ORDER))
        changes = [(node.fits, node.change) for node in flat.values() if node.change is not None]
        tagged = {form: self.tags[name] for form in flat if (name := form.removeprefix(self._prefix)) in self.tags}
        if len(tagged) > 1:
            field, _ = next(iter(tagged.values()))  # msgspec sees to it that all have one
            branches = {tag: (form, flat[form].change) for form, (_, tag) in tagged.items()}
            changes.insert(0, ((dict,), partial(_tagged, field, branches)))
        fits = tuple(kind for node in flat.values() for kind in node.fits) + ((dict,) if tagged else ())
        change = partial(_branch, tuple(changes)) if changes else None
        return _Node([flat[form].schema for form in ordered], change, fits, tuple(flat.values()))


def _named(name: str, schema: Any, default: Any = msgspec.NODEFAULT) -> dict[str, Any]:
    return {"name": name, "type": schema} | ({} if default is msgspec.NODEFAULT else {"default": default})


def _plain_default(default: Any) -> tuple[Any, str]:
    """Give a default as Avro's JSON writes it, and the form of the branch that it is for; none, if there is none."""
    if isinstance(default, Enum):
        default = default.value
    if isinstance(default, bytes):
        return default.decode("latin-1"), "bytes"
    if isinstance(default, list | set | frozenset | tuple):
        return [], "" if default else "array"
    return default, "" if isinstance(default, dict) and default else _BRANCH.get(type(default), "")


_BRANCH: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "long",
    float: "double",
    str: "string",
    list: "array",
    dict: "map",
}
_MOVABLE = frozenset(_BRANCH.values()) - {"array", "map"}  # others may hold a class that a branch before them describes
# fastavro takes the first branch that fits: an int would do as a double, and a string as nothing else.
_ORDER = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")


def _form(schema: Any) -> str:
    """Give what Avro tells branches of a union apart by: the name of a named type, or the kind of any other."""
    if isinstance(schema, dict):
        return str(schema.get("name") or schema["type"])
    return str(schema)


def _has_logical(schema: Any) -> bool:
    return isinstance(schema, dict) and "logicalType" in schema


def _base(schema: Any) -> Any:
    """Give a schema, or the name of a class that is described elsewhere, so that the two are alike."""
    return schema["name"] if isinstance(schema, dict) and "name" in schema else schema


def _logical(base: str, name: str) -> dict[str, str]:
    return {"type": base, "logicalType": name}


def _called(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


def _zoned(value: Any) -> Any:
    # Avro's timestamp is an instant; fastavro would take the zone of this machine for one that is not.
    if isinstance(value, datetime) and value.tzinfo is None:
        raise ValueError(f"{value} has no time zone: give one, or annotate it with Meta(tz=False) for local times")
    return value


def _local(value: Any) -> Any:
    if isinstance(value, datetime) and value.tzinfo is not None:
        raise ValueError(f"{value} has a time zone, and its field is of local times")
    return value


def _plain_time(value: Any) -> Any:
    if isinstance(value, time) and value.tzinfo is not None:
        raise ValueError(f"{value} has a time zone, which Avro's times have not")
    return value


def _item_types(info: inspect.VarTupleType | inspect.TupleType | inspect.NamedTupleType) -> Iterable[inspect.Type]:
    match info:
        case inspect.VarTupleType():
            return (info.item_type,)
        case inspect.TupleType():
            return info.item_types
        case inspect.NamedTupleType():
            return [field.type for field in info.fields]


def _items(change: Change | None, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return list(value) if change is None else [change(each) for each in value]


def _values(change: Change, value: Any) -> Any:
    return {key: change(each) for key, each in value.items()} if isinstance(value, dict) else value


def _members(steps: tuple[tuple[str, Change], ...], value: Any) -> Any:
    if isinstance(value, dict):
        for name, change in steps:
            if name in value:
                value[name] = change(value[name])
    return value


def _tagged(field: str, branches: Mapping[Any, tuple[str, Change | None]], value: Any) -> Any:
    """Name the branch of a union that a tagged Struct is of, as fastavro takes it."""
    known = branches.get(value.get(field))
    if known is None:
        return value  # a map
    name, change = known
    return name, change(value) if change else value


def _branch(changes: tuple[tuple[tuple[type, ...], Change], ...], value: Any) -> Any:
    for fits, change in changes:
        if isinstance(value, fits):
            return change(value)
    return value


def _packed_array(value: Any) -> Any:
    return {**value, "shape": list(value["shape"])}


_ZONED = _Node(_logical("long", "timestamp-micros"), _zoned, (datetime,))
_LOCAL = _Node(_logical("long", "local-timestamp-micros"), _local, (datetime,))
_SIMPLE: Mapping[type[inspect.Type], _Node] = {
    inspect.NoneType: _Node("null"),
    inspect.BoolType: _Node("boolean"),
    inspect.IntType: _Node("long"),
    inspect.FloatType: _Node("double"),
    inspect.StrType: _Node("string"),
    inspect.TimeDeltaType: _Node("string"),  # ISO 8601: fastavro does not know Avro's duration
    inspect.BytesType: _Node("bytes"),
    inspect.ByteArrayType: _Node("bytes", bytes, (bytearray, memoryview)),
    inspect.MemoryViewType: _Node("bytes", bytes, (bytearray, memoryview)),
    inspect.DateType: _Node(_logical("int", "date")),
    inspect.TimeType: _Node(_logical("long", "time-micros"), _plain_time, (time,)),
    inspect.UUIDType: _Node(_logical("string", "uuid")),
}
