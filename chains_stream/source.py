"""Where a mistake stands in a Chain file: the syntax tree of a class or a function, as its author wrote it.

Code without source (typed at a prompt, or made by `exec`) has no tree; its lines are those that Python knows, or 0.
"""

import ast
import functools
import inspect
import linecache
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import NamedTuple

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class FunctionSource(NamedTuple):
    """A function's file, the line of its ``def``, and its tree."""

    file: str
    line: int
    node: FunctionNode | None

    def argument_line(self, name: str) -> int:
        """The line of an argument, or of the ``def``."""
        found = self._argument(name)
        return found.lineno if found else self.line

    def annotation_line(self, name: str) -> int:
        """The line of an argument's annotation, of the argument, or of the ``def``."""
        found = self._argument(name)
        return found.annotation.lineno if found and found.annotation else self.argument_line(name)

    def default_line(self, name: str) -> int:
        """The line of an argument's default, of the argument, or of the ``def``."""
        if self.node is None:
            return self.line
        arguments = self.node.args
        plain = [*arguments.posonlyargs, *arguments.args]
        defaults = dict(
            zip([a.arg for a in plain][len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True)
        )
        defaults |= {
            a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None
        }
        return defaults[name].lineno if name in defaults else self.argument_line(name)

    def result_line(self) -> int:
        """The line of the result's annotation, or of the ``def``."""
        return self.node.returns.lineno if self.node and self.node.returns else self.line

    def _argument(self, name: str) -> ast.arg | None:
        if self.node is None:
            return None
        arguments = self.node.args
        every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        return next((a for a in every if a is not None and a.arg == name), None)


class ClassSource(NamedTuple):
    """A class's file, the line of its ``class``, and its tree."""

    file: str
    line: int
    node: ast.ClassDef | None

    def attribute_line(self, name: str) -> int:
        """The line in the class's body that sets `name`, or of the ``class``."""
        for statement in self.node.body if self.node else ():
            if isinstance(statement, FunctionNode | ast.ClassDef) and statement.name == name:
                return statement.lineno
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return statement.lineno
        return self.line


def of_function(function: FunctionType) -> FunctionSource:
    """Find a function; decorators that used `functools.wraps` are looked through."""
    code = function.__code__
    first = code.co_firstlineno
    for node in ast.walk(_tree(code.co_filename)):
        if isinstance(node, FunctionNode) and node.name == code.co_name:
            lines = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
            if first in lines:
                return FunctionSource(code.co_filename, node.lineno, node)
    return FunctionSource(code.co_filename, first, None)


def of_class(cls: type) -> ClassSource:
    """Find a class by its qualified name; of several, the one that holds its methods."""
    methods = [f.__code__ for f in map(inspect.unwrap, _functions(cls)) if isinstance(f, FunctionType)]
    own = [code for code in methods if getattr(code, "co_qualname", "").startswith(f"{cls.__qualname__}.")]
    file = own[0].co_filename if own else getattr(sys.modules.get(cls.__module__), "__file__", None) or "<unknown>"
    lines = {code.co_firstlineno for code in own}
    found = [node for name, node in _classes(_tree(file), "") if name == cls.__qualname__]
    for node in found:
        if any(node.lineno <= line <= (node.end_lineno or node.lineno) for line in lines):
            return ClassSource(file, node.lineno, node)
    if found:
        return ClassSource(file, found[-1].lineno, found[-1])
    return ClassSource(file, min(lines, default=0), None)


def _functions(cls: type) -> Iterator[FunctionType]:
    for value in vars(cls).values():
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            yield function


def _classes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Give every class with its qualified name, as Python builds it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield f"{prefix}{node.name}", node
            yield from _classes(node, f"{prefix}{node.name}.")
        elif isinstance(node, FunctionNode):
            yield from _classes(node, f"{prefix}{node.name}.<locals>.")
        else:
            yield from _classes(node, prefix)


def _tree(file: str) -> ast.Module:
    return _parse("".join(linecache.getlines(file)))


@functools.lru_cache(maxsize=32)
def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # the file changed since it was imported, or is no Python
        return ast.Module(body=[], type_ignores=[])
