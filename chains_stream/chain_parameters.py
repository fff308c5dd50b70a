"""What a Chain file is told when it is loaded: ``chains run FILE --set model=/models/llama --set max_num_seqs=64``.

A file says what it takes as a pydantic model, and gets an instance of it while it is imported, so that its graph, its
concurrency and its hardware may depend on it. Whoever loads one file for several processes gives all of them the same.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

import pydantic

from chains_stream.errors import ChainsUsageError

ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)


class UnknownParameterError(ChainsUsageError):
    """A value was given that the file does not ask for. Take it away, or mend its name."""


class Given:
    """The values for one file, by name, and the names that it has asked for so far."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.known: set[str] = set()

    def check(self) -> None:
        """Raise UnknownParameterError for a value that nobody has asked for."""
        for name in self.values:
            if name not in self.known:
                raise UnknownParameterError(f"it takes no parameter `{name}`{_hint(name, self.known)}")


_given: ContextVar[Given | None] = ContextVar("_given", default=None)


def parameters(kind: type[ModelT]) -> ModelT:
    """Give what this Chain file was told, as a pydantic model; its defaults where nothing was said.

    For the top level of a Chain file. Text is taken for numbers, truth values and enums as pydantic does, and as JSON
    where a list or a mapping is due. A file may ask for several models: each takes the fields that it has.

    Raises:
        ChainsUsageError: for a value that does not fit, and for a field without a default that nobody gave.

    Example::

        class Options(pydantic.BaseModel):
            model: str
            temperature: float = 0.7

        options = chains.parameters(Options)  # chains run FILE --set model=small
    """
    given = _given.get() or Given({})
    given.known.update(kind.model_fields)
    values = {name: value for name, value in given.values.items() if name in kind.model_fields}
    try:
        return kind.model_validate(values, by_name=True)
    except pydantic.ValidationError as error:
        wrong = {_field_of(kind, problem["loc"][0]) for problem in error.errors() if problem["loc"]}
    # What is no text may have been written as JSON.
    values |= {name: _from_json(values[name]) for name in wrong if isinstance(name, str) and name in values}
    try:
        return kind.model_validate(values, by_name=True)
    except pydantic.ValidationError as error:
        raise ChainsUsageError("; ".join(_explain(problem, kind) for problem in error.errors())) from None


@contextmanager
def parameter_values(**values: Any) -> Iterator[None]:
    """Give values to the `parameters` of the files that are imported in the block: for tests and programs.

    Raises UnknownParameterError at the end of the block for a name that no file has asked for.
    """
    given = Given(values)
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)
    given.check()


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _explain(problem: Any, kind: type[pydantic.BaseModel]) -> str:
    field = _field_of(kind, problem["loc"][0]) if problem["loc"] else ""
    name = ".".join(map(str, (field, *problem["loc"][1:])))
    if problem["type"] == "missing":
        mend = f": give it with --set {name}=…" if len(problem["loc"]) == 1 else ""  # else it is within one
        return f"parameter `{name}` is missing{mend}"
    said = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]
    if not problem["loc"]:  # what several of them are together: all would be shown, secrets too
        return f"the parameters of {kind.__name__}: {said}"
    if _is_secret(kind, field):
        return f"parameter `{name}` {said}"
    return f"parameter `{name}` {said} (got {problem['input']!r})"


def _field_of(kind: type[pydantic.BaseModel], place: Any) -> Any:
    """Give the name of a field, which errors call by its alias."""
    fields = kind.model_fields.items()
    return next((name for name, field in fields if place in (name, field.alias, field.validation_alias)), place)


def _is_secret(kind: type[pydantic.BaseModel], name: Any) -> bool:
    """Tell whether a value must not be shown: its field says so, or its model does of all."""
    field = kind.model_fields.get(name)
    return bool(kind.model_config.get("hide_input_in_errors")) or (
        field is not None and _holds_secret(field.annotation)
    )


def _holds_secret(annotation: Any) -> bool:
    kinds = (pydantic.SecretStr, pydantic.SecretBytes, pydantic.Secret)
    return annotation in kinds or get_origin(annotation) in kinds or any(map(_holds_secret, get_args(annotation)))


def _hint(name: str, known: set[str]) -> str:
    if not known:
        return "; it takes none at all"
    near = get_close_matches(name, known, n=1)
    return f": did you mean `{near[0]}`?" if near else f"; it takes {', '.join(sorted(known))}"
