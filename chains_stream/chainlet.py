"""What a user writes: `ChainletBase`, `depends`, `depends_context`, `mark_entrypoint`.

A `depends` is a marker and nothing more. Whoever runs the Chain replaces it: `run_local` by the Chainlet itself, a
worker by a stub that calls it over the broker.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NoReturn, Protocol, Self, TypeVar, cast, overload

from typing_extensions import TypeIs

from chains_stream.errors import ChainsUsageError, MissingDependencyError
from chains_stream.options import Batch, DeploymentContext, RemoteConfig, RPCOptions
from chains_stream.signature import Signature

T = TypeVar("T")
ChainletT = TypeVar("ChainletT", bound="ChainletBase")

METHOD = "run_remote"
CONTEXT_ARGUMENT = "context"

_recorded: ContextVar[list[type["ChainletBase"]] | None] = ContextVar("_recorded", default=None)


class ChainletBase:
    """Base of every Chainlet: a class with one public method, ``run_remote``, whose arguments and result are annotated.

    ``run_remote`` is ``async def``; one that yields, annotated ``AsyncIterator[T]``, is a stream. ``__init__`` runs
    once a worker process, and takes nothing but `depends` and, last, `depends_context`.

    Three things are optional. ``is_healthy``, sync or async, without arguments and returning bool, is asked by the
    worker's health check. A Chainlet that is an asynchronous context manager (``__aenter__``, ``__aexit__``) is entered
    before its first request, and exited after its last: what takes long to load, and needs an end, goes there. And
    ``async def failed(self) -> None`` waits until the Chainlet can't serve any more, and raises why: its process then
    ends in order, and the requests that fail meanwhile are left to other processes. It may be awaited several times at
    once, and be cancelled.
    """

    remote_config: ClassVar[RemoteConfig] = RemoteConfig()
    batch: ClassVar[Batch | None] = None
    """Joins calls: ``run_remote`` takes one list and returns one as long, and is given the lists of several callers as
    one. Each caller gets the results of its own items. If a joined call fails, each caller's items are run by
    themselves, so that nobody fails for others; and a result may be an exception, for the caller of its item."""
    openai_models: ClassVar[Sequence[str]] = ()
    """The models that clients of OpenAI's API may ask it for, and no others; none for whatever they call it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _injected(cls.__init__)  # type: ignore[method-assign] # `run_local` fills in dependencies
        recording = _recorded.get()
        if recording is not None:
            recording.append(cls)

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        instance = super().__new__(cls)
        injector = injecting.get()
        if injector is not None:
            injector.adopt(instance)
        return instance


class Injector(Protocol):
    """Who runs Chainlets in this context, and so decides what their markers become: `run_local`."""

    def adopt(self, instance: ChainletBase) -> None: ...

    def replacement(self, dependency: "Dependency | ContextDependency") -> Any: ...


injecting: ContextVar[Injector | None] = ContextVar("injecting", default=None)


def _injected(init: Callable[..., None]) -> Callable[..., None]:
    parameters = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: ChainletBase, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it takes that method's place
        injector = injecting.get()
        if injector is not None:
            given = parameters.bind_partial(self, *args, **kwargs).arguments
            for name, parameter in parameters.parameters.items():
                if name not in given and isinstance(parameter.default, Dependency | ContextDependency):
                    kwargs[name] = injector.replacement(parameter.default)
        init(self, *args, **kwargs)

    return __init__


class Dependency:
    """The marker that `depends` leaves as a default of ``__init__``: which Chainlet, and how to call it."""

    def __init__(self, chainlet: type[ChainletBase], options: RPCOptions) -> None:
        self.chainlet = chainlet
        self.options = options

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        shown = getattr(self.chainlet, "__name__", repr(self.chainlet))
        msg = (
            f"`{shown}` is only declared by `depends` and not running, so it has no `{name}`. Start the Chain with "
            "`run_local`, `run_chain` or `chains run`, or pass a fake as a keyword argument."
        )
        raise MissingDependencyError(msg)


class ContextDependency:
    """The marker that `depends_context` leaves as a default of ``__init__``."""


def depends(
    chainlet_cls: type[ChainletT],
    retries: int = 1,
    timeout_sec: float = 600.0,
    use_binary: bool = False,  # noqa: FBT001, FBT002
    concurrency_limit: int = 300,
    *,
    colocated: bool = False,
) -> ChainletT:
    """Declare that a Chainlet calls another one; only as a default of an ``__init__`` argument.

    Args:
        chainlet_cls: the Chainlet to call.
        retries: attempts in all, the first included. Asking for more than one says that the Chainlet is safe to repeat.
        timeout_sec: seconds for one try; for a stream, until the first chunk and between two chunks.
        use_binary: accepted for Truss Chains; values always travel in binary here.
        concurrency_limit: calls in flight at once from one process; further ones wait their turn.
        colocated: call it directly, not over the broker, where the same process hosts it.
    """
    try:
        options = RPCOptions(
            retries=retries,
            timeout_sec=timeout_sec,
            use_binary=use_binary,
            concurrency_limit=concurrency_limit,
            colocated=colocated,
        )
    except ValueError as error:
        first = error.errors()[0]  # type: ignore[attr-defined] # pydantic's ValidationError is a ValueError
        msg = f"depends({getattr(chainlet_cls, '__name__', chainlet_cls)!s}, {first['loc'][0]}={first['input']!r}): "
        raise ChainsUsageError(msg + first["msg"]) from None
    return cast("ChainletT", Dependency(chainlet_cls, options))


def depends_context() -> DeploymentContext:
    """Ask for the `DeploymentContext`; only as the default of the last ``__init__`` argument, named ``context``."""
    return cast("DeploymentContext", ContextDependency())


@overload
def mark_entrypoint(chainlet_or_name: type[ChainletT], /) -> type[ChainletT]: ...
@overload
def mark_entrypoint(chainlet_or_name: str, /) -> Callable[[type[ChainletT]], type[ChainletT]]: ...
def mark_entrypoint(
    chainlet_or_name: type[ChainletT] | str, /
) -> type[ChainletT] | Callable[[type[ChainletT]], type[ChainletT]]:
    """Mark the Chainlet that requests from outside go to; bare, or with the Chain's name: ``("My Chain")``."""
    if isinstance(chainlet_or_name, str):
        name = chainlet_or_name

        def mark(cls: type[ChainletT]) -> type[ChainletT]:
            cls.__chain_name__ = name  # type: ignore[attr-defined] # kept off the public class
            return cls

        return mark
    chainlet_or_name.__chain_name__ = chainlet_or_name.__name__  # type: ignore[attr-defined]
    return chainlet_or_name


def is_chainlet(value: object) -> TypeIs[type[ChainletBase]]:
    return isinstance(value, type) and issubclass(value, ChainletBase)


def entrypoint_name(cls: type[ChainletBase]) -> str | None:
    """Give the Chain's name if `cls` itself, and not a base of it, is marked as an entrypoint."""
    name = cls.__dict__.get("__chain_name__")
    return name if isinstance(name, str) else None


def chainlet_name(cls: type[ChainletBase]) -> str:
    """Give the name of a Chainlet in topics and on screens."""
    return cls.remote_config.name or cls.__name__


def dependencies(cls: type[ChainletBase]) -> Mapping[str, Dependency]:
    """Give the dependencies of a Chainlet by the name of the ``__init__`` argument that takes them."""
    return {name: p.default for name, p in init_parameters(cls).items() if isinstance(p.default, Dependency)}


def init_parameters(cls: type[ChainletBase]) -> Mapping[str, inspect.Parameter]:
    """Give the parameters of ``__init__`` but for ``self``."""
    if cls.__init__ is object.__init__:
        return {}
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])


def signature(cls: type[ChainletBase]) -> Signature:
    """Give the signature of a Chainlet's ``run_remote``, read once. Raises InvalidChainError."""
    found = cls.__dict__.get("__chains_signature__")
    if not isinstance(found, Signature):
        found = Signature.of(cls.__dict__.get(METHOD) or getattr(cls, METHOD), chainlet_name(cls))
        cls.__chains_signature__ = found  # type: ignore[attr-defined] # a cache, kept off the public class
    return found


def instantiate(cls: type[ChainletT], replacements: Mapping[str, Any], context: DeploymentContext) -> ChainletT:
    """Build a Chainlet with its markers replaced: dependencies by argument name, the context where it is asked for."""
    given = dict(replacements)
    for name, parameter in init_parameters(cls).items():
        if isinstance(parameter.default, ContextDependency):
            given.setdefault(name, context)
    return cls(**given)


@contextmanager
def recording() -> Iterator[list[type[ChainletBase]]]:
    """Collect the Chainlets that are defined inside the block, in order: those of a Chain file while it is imported."""
    classes: list[type[ChainletBase]] = []
    token = _recorded.set(classes)
    try:
        yield classes
    finally:
        _recorded.reset(token)
