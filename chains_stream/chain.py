"""The graph of Chainlets that an entrypoint reaches: their order, their topics, and how it looks."""

import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from chains_stream.chain_parameters import UnknownParameterError, parameter_values
from chains_stream.chainlet import (
    ChainletBase,
    chainlet_name,
    dependencies,
    entrypoint_name,
    is_chainlet,
    recording,
    signature,
)
from chains_stream.checks import check_chain_file
from chains_stream.errors import ChainsUsageError, InvalidChainError


@dataclass(frozen=True)
class Chain:
    """A Chain: its name, its entrypoint, and all its Chainlets, each after those that it depends on."""

    name: str
    entrypoint: type[ChainletBase]
    chainlets: tuple[type[ChainletBase], ...]

    @classmethod
    def of(cls, entrypoint: type[ChainletBase]) -> "Chain":
        """Build the Chain that `entrypoint` reaches. Raises InvalidChainError with all mistakes in it."""
        if not is_chainlet(entrypoint):
            raise ChainsUsageError(f"{entrypoint!r} is not a Chainlet: derive a class from chains.ChainletBase")
        chainlets = tuple(dict.fromkeys(_bottom_up(entrypoint)))
        if problems := check_chain_file(chainlets):
            raise InvalidChainError(problems)
        return cls(entrypoint_name(entrypoint) or chainlet_name(entrypoint), entrypoint, chainlets)

    @classmethod
    def load(cls, target: str, values: Mapping[str, Any] | None = None) -> "Chain":
        """Import a Chain file, given as ``path/to/chain.py`` or ``path/to/chain.py:Entrypoint``.

        `values` are for the `parameters` of the file, by name.

        Raises ChainsUsageError, or InvalidChainError with all the mistakes in the file.
        """
        path, _, wanted = target.rpartition(":") if re.search(r"\.py:\w*$", target) else (target, "", "")
        try:
            with parameter_values(**values) if values else nullcontext():  # else they are those of the caller's
                module, defined = _import(Path(path))
        except UnknownParameterError as error:
            raise ChainsUsageError(f"{path}: {error}") from None
        if problems := check_chain_file(defined):
            raise InvalidChainError(problems)
        return cls.of(_choose_entrypoint(path, wanted, module, defined))

    def names(self) -> list[str]:
        return [chainlet_name(cls) for cls in self.chainlets]

    def find(self, name: str) -> type[ChainletBase]:
        """Give a Chainlet by its name. Raises ChainsUsageError that lists the names there are."""
        for cls in self.chainlets:
            if chainlet_name(cls) == name:
                return cls
        near = get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ChainsUsageError(
            f"the Chain {self.name} has no Chainlet named {name}; it has {', '.join(self.names())}.{hint}"
        )

    def topic(self, cls: type[ChainletBase], namespace: str) -> str:
        """Give the request topic of a Chainlet of this Chain."""
        return signature(cls).topic(namespace, self.name)

    def mermaid(self) -> str:
        """Draw the graph as a Mermaid flowchart; a dotted arrow is a stream."""
        ids = {cls: f"c{number}" for number, cls in enumerate(reversed(self.chainlets))}
        lines = ["flowchart LR", f"  client([client]) --> {ids[self.entrypoint]}"]
        lines += [f'  {ids[cls]}["{_label(cls)}"]' for cls in reversed(self.chainlets)]
        for cls in reversed(self.chainlets):
            for dependency in dependencies(cls).values():
                arrow = "-.->" if signature(dependency.chainlet).streaming else "-->"
                lines.append(f"  {ids[cls]} {arrow} {ids[dependency.chainlet]}")
        return "\n".join(lines)

    def drawing(self, namespace: str) -> str:
        """Draw the graph as a tree for a terminal, with each Chainlet's signature and topic."""
        lines = [self.name, *_branch(self.entrypoint, "", last=True, seen=set()), ""]
        lines += [f"{chainlet_name(cls)}: {self.topic(cls, namespace)}" for cls in reversed(self.chainlets)]
        return "\n".join(lines)


def _bottom_up(cls: type[ChainletBase]) -> Iterator[type[ChainletBase]]:
    for dependency in dependencies(cls).values():
        if is_chainlet(dependency.chainlet):  # else the checks say so, with file and line
            yield from _bottom_up(dependency.chainlet)
    yield cls


def _label(cls: type[ChainletBase]) -> str:
    found = signature(cls)
    return f"{chainlet_name(cls)}{' (stream)' if found.streaming else ''}"


def _branch(cls: type[ChainletBase], indent: str, *, last: bool, seen: set[type[ChainletBase]]) -> Iterator[str]:
    again = cls in seen
    below = [dependency.chainlet for dependency in dependencies(cls).values()]
    yield f"{indent}{'└─ ' if last else '├─ '}{_label(cls)}{' …' if again and below else ''}"
    seen.add(cls)
    if not again:
        for number, dependency in enumerate(below, 1):
            yield from _branch(dependency, indent + ("   " if last else "│  "), last=number == len(below), seen=seen)


def _import(path: Path) -> tuple[types.ModuleType, list[type[ChainletBase]]]:
    """Run a Chain file as a module, as `python file.py` would find its imports, and collect its Chainlets."""
    if not path.is_file():
        raise ChainsUsageError(f"{path}: no such file")
    if path.suffix != ".py":
        raise ChainsUsageError(f"{path}: not a Python file; a Chain file ends in .py")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"chain_file_{abs(hash(folder))}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with recording() as defined:
        try:
            spec.loader.exec_module(module)
        except ChainsUsageError as error:
            raise ChainsUsageError(f"{_place(error, path)}: {error}") from None
        except Exception as error:
            kind = type(error).__name__
            raise ChainsUsageError(f"{_place(error, path)}: {kind} while importing the file: {error}") from error
    return module, [cls for cls in defined if cls.__module__ == name]


def _place(error: BaseException, path: Path) -> str:
    """Give ``file:line`` of the line of the Chain file that an import failed at."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _choose_entrypoint(
    path: str, wanted: str, module: types.ModuleType, defined: Sequence[type[ChainletBase]]
) -> type[ChainletBase]:
    if wanted:
        found = getattr(module, wanted, None)
        if is_chainlet(found):
            return found
        names = ", ".join(cls.__name__ for cls in defined) or "none"
        raise ChainsUsageError(f"{path}: no Chainlet class named {wanted}; the file defines {names}")
    marked = [cls for cls in defined if entrypoint_name(cls)]
    if len(marked) == 1:
        return marked[0]
    if not defined:
        raise ChainsUsageError(f"{path}: no Chainlet in it; derive a class from chains.ChainletBase")
    if not marked:
        names = ", ".join(cls.__name__ for cls in defined)
        raise ChainsUsageError(
            f"{path}: no entrypoint; put @chains.mark_entrypoint on one of {names}, "
            f"or name one as {path}:{defined[-1].__name__}"
        )
    names = ", ".join(cls.__name__ for cls in marked)
    raise ChainsUsageError(f"{path}: several entrypoints, {names}; name one as {path}:{marked[0].__name__}")
