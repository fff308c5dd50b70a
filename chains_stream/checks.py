"""What can be wrong with a Chain before it runs: all mistakes at once, each with its line and how to mend it."""

import ast
import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

from chains_stream import source
from chains_stream.chainlet import (
    CONTEXT_ARGUMENT,
    METHOD,
    ChainletBase,
    ContextDependency,
    Dependency,
    chainlet_name,
    dependencies,
    entrypoint_name,
    init_parameters,
)
from chains_stream.descriptor import show
from chains_stream.errors import ChainsUsageError, Problem
from chains_stream.options import Batch, DeploymentContext, RemoteConfig
from chains_stream.signature import name_fault, read, resolve, takes_websocket, topic_part

_HEALTH = "is_healthy"
_DEATH = "failed"
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def check_chain_file(classes: Sequence[type[ChainletBase]]) -> list[Problem]:
    """Check the Chainlets of a file, and those that they depend on, each by itself and all together."""
    every = _with_dependencies(classes)
    problems = [problem for cls in every for problem in check_chainlet(cls)]
    problems += _same_names(every)
    problems += _entrypoints(classes)
    return sorted(set(problems))


def check_chainlet(cls: type[ChainletBase]) -> list[Problem]:
    """Check one Chainlet: its method, constructor, optional methods, options, body and feed. Empty if all is well."""
    problems = [
        *_remote_config(cls),
        *_name(cls),
        *_models(cls),
        *_method(cls),
        *_constructor(cls),
        *_health_check(cls),
        *_batch(cls),
        *_life(cls),
        *_death_watch(cls),
        *_instantiations(cls),
    ]
    # What is wrong with a method would be told again.
    return sorted(set(problems)) or [*_feed(cls)]


def advice(cls: type[ChainletBase]) -> list[Problem]:
    """Give what works and could be better: a Chainlet whose method is not asynchronous."""
    function = getattr(cls, METHOD, None)
    if not isinstance(function, FunctionType):
        return []
    inner = inspect.unwrap(function)
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        return []
    message = f"`{METHOD}` is a plain `def` and runs in a thread, which nothing can cancel; better, write `async def`"
    found = source.of_function(inner)
    return [Problem(found.file, found.line, f"{cls.__name__}.{METHOD}", "SYNC", message)]


def _method(cls: type[ChainletBase]) -> Iterator[Problem]:
    found = inspect.getattr_static(cls, METHOD, None)
    if found is None:
        if not inspect.isabstract(cls):
            message = f"the Chainlet has no `{METHOD}`; add `async def {METHOD}(self, …) -> …`"
            yield _at_class(cls, None, "MISSING_METHOD", message)
        return
    if not isinstance(found, FunctionType | staticmethod | classmethod):
        message = f"`{METHOD}` is a `{type(found).__name__}` and not a method; write `async def {METHOD}(self, …) -> …`"
        yield _at_class(cls, METHOD, "NOT_A_METHOD", message)
        return
    yield from read(found, cls.__name__)[1]


def _constructor(cls: type[ChainletBase]) -> Iterator[Problem]:
    function = inspect.unwrap(cls.__init__)
    if not isinstance(function, FunctionType):  # object's own
        return
    arguments = init_parameters(cls)
    place = source.of_function(function)
    where = f"{cls.__name__}.__init__"

    def problem(kind: str, message: str, line: int) -> Problem:
        return Problem(place.file, line, where, kind, message)

    seen: dict[int, str] = {}
    for index, (name, argument) in enumerate(arguments.items()):
        line = place.argument_line(name)
        match argument.default:
            case _ if argument.kind in _VARIADIC:
                message = f"`{name}` can't be filled in; write each dependency as an argument of its own, by `depends`"
                yield problem("ARGUMENT", message, line)
            case Dependency() as dependency:
                yield from (problem(*fault) for fault in _dependency(function, argument, dependency, seen))
                seen.setdefault(id(dependency.chainlet), name)  # by identity: it may be anything
            case ContextDependency():
                for message in _context(function, argument, last=index == len(arguments) - 1):
                    yield problem("CONTEXT", message, line)
            case _ if name == CONTEXT_ARGUMENT:
                message = "the context is given by a default; write `context: DeploymentContext = depends_context()`"
                yield problem("CONTEXT", message, line)
            case _:
                message = (
                    f"`{name}` is not a dependency; give it the default `depends(SomeChainlet)`, or set it in the "
                    "constructor's body"
                )
                yield problem("ARGUMENT", message, line)


def _dependency(
    function: FunctionType, argument: inspect.Parameter, dependency: Dependency, seen: dict[int, str]
) -> Iterator[tuple[str, str, int]]:
    """Check one ``name: Type = depends(Chainlet)``: the kind, message and line of each fault.

    `seen` are the Chainlets of earlier arguments.
    """
    wanted: Any = dependency.chainlet
    name = argument.name
    place = source.of_function(function)
    line = place.argument_line(name)
    if not _is_chainlet(wanted):
        shown = wanted.__name__ if isinstance(wanted, type) else repr(wanted)
        message = f"`{name}` depends on `{shown}`, which is not a Chainlet; pass a subclass of `ChainletBase`"
        yield "DEPENDENCY", message, line
        return
    if id(wanted) in seen:
        message = f"`{name}` depends on `{wanted.__name__}`, as `{seen[id(wanted)]}` does; take one away"
        yield "DEPENDENCY", message, line
    if takes_websocket(getattr(wanted, METHOD, None)):
        message = (
            f"`{name}` depends on `{wanted.__name__}`, whose `{METHOD}` takes a WebSocket; only the entrypoint can, as "
            "it alone has clients: pass values, or stream them"
        )
        yield "WEBSOCKET", message, line
    if argument.annotation is inspect.Parameter.empty:
        yield "MISSING_ANNOTATION", f"`{name}` is not annotated; write `{name}: {wanted.__name__} = depends(…)`", line
        return
    try:
        annotation = resolve(function, argument.annotation)
    except Exception as error:  # noqa: BLE001 - the annotation is the user's code; the reason is in the text
        yield "DEPENDENCY", f"the annotation of `{name}` can't be evaluated: {error}", place.annotation_line(name)
        return
    if not _accepts(annotation, wanted):
        message = (
            f"`{name}` is annotated {show(annotation)}, neither a superclass nor a Protocol of `{wanted.__name__}`"
        )
        yield "DEPENDENCY", f"{message}; annotate `{wanted.__name__}`", place.annotation_line(name)


def _accepts(annotation: Any, wanted: type) -> bool:
    """Tell whether `wanted` is a subclass of the annotation, or has all that its Protocol asks for."""
    kind = typing.get_origin(annotation) or annotation
    if not isinstance(kind, type) or kind is object:
        return False
    if getattr(kind, "_is_protocol", False):
        members = {name for base in kind.__mro__ if getattr(base, "_is_protocol", False) for name in _members(base)}
        return all(hasattr(wanted, name) for name in members)
    return issubclass(wanted, kind)


def _members(protocol: type) -> Iterator[str]:
    for name in {*vars(protocol), *inspect.get_annotations(protocol)}:
        if not name.startswith("_") and name != "Protocol":
            yield name


def _context(function: FunctionType, argument: inspect.Parameter, *, last: bool) -> Iterator[str]:
    if argument.name != CONTEXT_ARGUMENT:
        yield f"the context is named `{argument.name}`; name it `{CONTEXT_ARGUMENT}`"
    if not last:
        yield "the context is not last; move it behind the dependencies"
    if argument.annotation is inspect.Parameter.empty:
        yield "the context has no type; annotate `DeploymentContext`"
        return
    try:
        annotation = resolve(function, argument.annotation)
    except Exception as error:  # noqa: BLE001 - the annotation is the user's code; the reason is in the text
        yield f"the context's type can't be evaluated: {error}"
        return
    kind = typing.get_origin(annotation) or annotation
    if not (isinstance(kind, type) and issubclass(DeploymentContext, kind)):
        yield f"the context is annotated {show(annotation)}; annotate `DeploymentContext`"


def _health_check(cls: type[ChainletBase]) -> Iterator[Problem]:
    found = inspect.getattr_static(cls, _HEALTH, None)
    if found is None:
        return
    mend = f"; write `async def {_HEALTH}(self) -> bool`"
    if not isinstance(found, FunctionType):
        yield _at_class(cls, _HEALTH, "HEALTH_CHECK", f"`{_HEALTH}` is not a method{mend}")
        return
    inner = inspect.unwrap(found)
    place = source.of_function(inner)
    names = list(inspect.signature(inner).parameters)
    faults = []
    if names[:1] != ["self"]:
        faults.append(f"`{_HEALTH}` has no `self`")
    elif len(names) > 1:
        faults.append(f"`{_HEALTH}` takes no arguments, and has `{'`, `'.join(names[1:])}`")
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        faults.append(f"`{_HEALTH}` yields")
    if inner.__annotations__.get("return") not in (bool, "bool"):
        faults.append(f"`{_HEALTH}` is not annotated to return bool")
    for fault in faults:
        yield Problem(place.file, place.line, f"{cls.__name__}.{_HEALTH}", "HEALTH_CHECK", f"{fault}{mend}")


def _batch(cls: type[ChainletBase]) -> Iterator[Problem]:
    """Check that a Chainlet whose calls are joined takes one list, and gives one."""
    given: Any = cls.batch
    if given is None:
        return
    if not isinstance(given, Batch):
        message = f"`batch` is a `{type(given).__name__}`; write `batch = Batch(max_size=…, max_wait_ms=…)`"
        yield _at_class(cls, "batch", "BATCH", message)
        return
    method = getattr(cls, METHOD, None)
    if not isinstance(method, FunctionType):
        return  # which is told already
    found, faults = read(method, cls.__name__)
    if faults or found is None:
        return
    lists = [parameter.annotation for parameter in found.parameters] + [found.result]
    if found.streaming or len(found.parameters) != 1 or any(typing.get_origin(kind) is not list for kind in lists):
        message = f"with a `batch`, `{METHOD}` takes one `list[…]` and returns a `list[…]` that is as long"
        yield _at_class(cls, METHOD, "BATCH", message)


def _feed(cls: type[ChainletBase]) -> Iterator[Problem]:
    """Check what a Chainlet is fed from, and writes to."""
    if getattr(cls, "source", None) is None:
        return
    from chains_stream.events import feed_of  # few Chains need it, and it takes a while

    try:
        feed_of(cls)
    except ChainsUsageError as error:
        yield _at_class(cls, "source", "EVENTS", str(error))


def _life(cls: type[ChainletBase]) -> Iterator[Problem]:
    begin, end = "__aenter__", "__aexit__"
    for name, other in ((begin, end), (end, begin)):
        if hasattr(cls, name) and not hasattr(cls, other):
            message = f"`{name}` is not called without `{other}`; write `async def {other}` too"
            yield _at_class(cls, name, "LIFE", message)


def _death_watch(cls: type[ChainletBase]) -> Iterator[Problem]:
    found = inspect.getattr_static(cls, _DEATH, None)
    if found is None:
        return
    mend = f"; write `async def {_DEATH}(self) -> None`, which waits until the Chainlet can't serve, and raises why"
    if not isinstance(found, FunctionType):
        yield _at_class(cls, _DEATH, "FAILED", f"`{_DEATH}` is not a method{mend}")
        return
    inner = inspect.unwrap(found)
    place = source.of_function(inner)
    names = list(inspect.signature(inner).parameters)
    faults = []
    if names != ["self"]:
        faults.append(f"`{_DEATH}` takes `self` alone, and has ({', '.join(names)})")
    if not inspect.iscoroutinefunction(inner):
        faults.append(f"`{_DEATH}` is not a coroutine")
    for fault in faults:
        yield Problem(place.file, place.line, f"{cls.__name__}.{_DEATH}", "FAILED", f"{fault}{mend}")


def _remote_config(cls: type[ChainletBase]) -> Iterator[Problem]:
    if not _is_configured(cls):
        shown = type(cls.remote_config).__name__
        message = f"`remote_config` is a `{shown}`; write `remote_config = RemoteConfig(…)`"
        yield _at_class(cls, "remote_config", "CONFIG", message)


def _models(cls: type[ChainletBase]) -> Iterator[Problem]:
    if isinstance(cls.openai_models, str):
        message = f"`openai_models` is a string; write `openai_models = ({cls.openai_models!r},)`"
        yield _at_class(cls, "openai_models", "MODELS", message)


def _name(cls: type[ChainletBase]) -> Iterator[Problem]:
    if not _is_configured(cls):
        return
    name = chainlet_name(cls)
    fault = name_fault(name)
    if fault:
        message = f"the Chainlet's name `{name}` {fault}; give one with `RemoteConfig(name=…)`"
        yield _at_class(cls, "remote_config", "NAME", message)


def _instantiations(cls: type[ChainletBase]) -> Iterator[Problem]:
    found = source.of_class(cls)
    if found.node is None:
        return
    names = _names_in_reach(cls)
    for function, call in _calls(found.node, cls.__name__):
        made = _resolve_name(call.func, names)
        if _is_chainlet(made):
            message = (
                f"`{made.__name__}(…)` makes a Chainlet by hand; declare it as an argument of `__init__` with "
                f"`depends({made.__name__})`"
            )
            yield Problem(found.file, call.lineno, function, "INSTANTIATION", message)


def _calls(node: ast.AST, where: str) -> Iterator[tuple[str, ast.Call]]:
    """Give every call below `node` with the ``Class.method`` that it stands in."""
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, source.FunctionNode) and "." not in where:
            inside = f"{where}.{child.name}"
        if isinstance(child, ast.Call):
            yield where, child
        yield from _calls(child, inside)


def _names_in_reach(cls: type) -> dict[str, Any]:
    """Give the names that the methods of a class see: of its module, and of functions around it."""
    names = dict(vars(sys.modules[cls.__module__])) if cls.__module__ in sys.modules else {}
    for function in vars(cls).values():
        inner = inspect.unwrap(function) if isinstance(function, FunctionType) else None
        if isinstance(inner, FunctionType):
            names = inner.__globals__ | names
            for name, cell in zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True):
                try:
                    names[name] = cell.cell_contents
                except ValueError:  # named below, and not there yet
                    continue
    return names


def _resolve_name(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Name():
            return names.get(node.id)
        case ast.Attribute():
            owner = _resolve_name(node.value, names)
            return inspect.getattr_static(owner, node.attr, None) if owner is not None else None
        case _:
            return None


def _same_names(classes: Sequence[type[ChainletBase]]) -> Iterator[Problem]:
    first: dict[str, type[ChainletBase]] = {}
    for cls in classes:
        if not _is_configured(cls):
            continue
        name = topic_part(chainlet_name(cls))
        other = first.setdefault(name, cls)
        if other is not cls:
            there = source.of_class(other)
            message = (
                f"the name `{name}` is taken by `{other.__name__}` at {there.file}:{there.line}; rename one, or give "
                "it a name with `RemoteConfig(name=…)`"
            )
            yield _at_class(cls, None, "NAME", message)


def _entrypoints(classes: Sequence[type[ChainletBase]]) -> Iterator[Problem]:
    for cls in classes:
        name = entrypoint_name(cls)
        fault = name_fault(name) if name is not None else None
        if fault:
            yield _at_class(cls, None, "NAME", f"the Chain's name `{name}` {fault}; mend it in `mark_entrypoint`")


def _with_dependencies(classes: Sequence[type[ChainletBase]]) -> list[type[ChainletBase]]:
    found = dict.fromkeys(classes)
    waiting = list(classes)
    while waiting:
        for dependency in dependencies(waiting.pop()).values():
            if _is_chainlet(dependency.chainlet) and dependency.chainlet not in found:
                found[dependency.chainlet] = None
                waiting.append(dependency.chainlet)
    return list(found)


def _is_configured(cls: type[ChainletBase]) -> bool:
    config: object = cls.remote_config  # whatever the user put there
    return isinstance(config, RemoteConfig)


def _is_chainlet(value: Any) -> typing.TypeGuard[type[ChainletBase]]:
    return isinstance(value, type) and issubclass(value, ChainletBase)


def _at_class(cls: type, attribute: str | None, kind: str, message: str) -> Problem:
    found = source.of_class(cls)
    line = found.line if attribute is None else found.attribute_line(attribute)
    where = cls.__name__ if attribute in (None, "remote_config") else f"{cls.__name__}.{attribute}"
    return Problem(found.file, line, where, kind, message)
