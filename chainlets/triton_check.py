"""A Chainlet held against its model: what differs between the two, all of it at once."""

import inspect
import typing
from collections import abc
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

import msgspec

import chains_stream as chains
from chainlets.triton_tensors import Tensor
from chainlets.triton_types import Declared, declared, result_of

_STREAMS = (abc.AsyncIterator, abc.AsyncGenerator)


class Model(msgspec.Struct, frozen=True):
    """What Triton says of a model. Where `batched`, the first dimension of each of its tensors is that of a batch."""

    shown: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    batched: bool
    decoupled: bool


class Declaration(msgspec.Struct, frozen=True):
    """What a Chainlet says of its model.

    `outputs` are by name, or the only one, or None for any; `streaming` is None where that is not said. `arguments` are
    the names of tensors by those of the arguments that they are given as.
    """

    inputs: Mapping[str, Declared]
    outputs: Mapping[str, Declared] | Declared | None
    streaming: bool | None = None
    arguments: Mapping[str, str] = {}


def declaration_of(cls: type[chains.ChainletBase]) -> Declaration:
    """Read a declaration from the arguments and the result of `run_remote`."""
    function: Any = cls.run_remote  # type: ignore[attr-defined] # every Chainlet that runs has one
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    found = {
        one.name: declared(one.name, hints[one.name], required=one.default is not None)
        for one in parameters
        if one.name in hints
    }
    result = hints.get("return", Any)
    streaming = get_origin(result) in _STREAMS
    return Declaration(
        inputs={each.name: each for each in found.values()},
        outputs=result_of(get_args(result)[0] if streaming else result),
        streaming=streaming,
        arguments={argument: each.name for argument, each in found.items()},
    )


def declaration_by(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Declaration:
    """Make a declaration of tensors that were listed."""
    return Declaration(
        {name: _listed(name, tensor) for name, tensor in inputs.items()},
        {name: _listed(name, tensor) for name, tensor in outputs.items()},
    )


def _listed(name: str, tensor: Tensor) -> Declared:
    datatypes = frozenset({tensor.datatype}) if tensor.datatype else None
    rank = None if tensor.dims is None else len(tensor.dims)
    return Declared(
        name, tensor, datatypes, rank, is_array=rank is not None, dims=tensor.dims, required=not tensor.optional
    )


def mismatches(declaration: Declaration, model: Model) -> list[str]:
    """Say, a line each, what of a declaration the model does not fit."""
    return [*_inputs(declaration, model), *_outputs(declaration.outputs, model), *_streaming(declaration, model)]


def _inputs(declaration: Declaration, model: Model) -> Iterator[str]:
    for name, mine in declaration.inputs.items():
        theirs = model.inputs.get(name)
        if theirs is None:
            yield f"the model has no input `{name}`; it has {_names(model.inputs)}"
            continue
        yield from _differences("input", mine, theirs, model)
        if not mine.required and not theirs.optional:
            yield f"the input `{name}` may be left out here, and the model asks for it always"
    for name, theirs in model.inputs.items():
        if name not in declaration.inputs and not theirs.optional:
            yield f"the model asks for an input `{name}`, {theirs}, which is not declared"


def _outputs(outputs: Mapping[str, Declared] | Declared | None, model: Model) -> Iterator[str]:
    if isinstance(outputs, Declared):
        name = outputs.name or next(iter(model.outputs), "")
        if not outputs.name and len(model.outputs) != 1:
            yield (
                f"the result is one value, {outputs.shown}, and the model has {len(model.outputs)} outputs, "
                f"{_names(model.outputs)}: declare a Struct that has those you want as fields"
            )
            return
        outputs = {name: outputs}
    for name, mine in (outputs or {}).items():
        theirs = model.outputs.get(name)
        if theirs is None:
            yield f"the model has no output `{name}`; it has {_names(model.outputs)}"
        else:
            yield from _differences("output", mine, theirs, model)


def _streaming(declaration: Declaration, model: Model) -> Iterator[str]:
    if declaration.streaming is False and model.decoupled:
        yield "the model is decoupled, that is, it streams: make `run_remote` yield, and annotate `AsyncIterator[…]`"
    if declaration.streaming and not model.decoupled:
        yield "`run_remote` streams, and the model is not decoupled: it answers once"


def _differences(what: str, mine: Declared, theirs: Tensor, model: Model) -> Iterator[str]:
    name = theirs.name
    if mine.datatypes is not None and theirs.datatype not in mine.datatypes:
        yield f"the {what} `{name}` is {mine.shown} here, and {theirs.datatype} in the model"
    dims = theirs.dims or ()
    ranks = {len(dims), len(dims) - model.batched}
    if mine.dims is not None:
        if not any(_same(mine.dims, dims[len(dims) - rank :]) for rank in ranks):
            yield f"the {what} `{name}` has the dimensions {list(mine.dims)} here, and {list(dims)} in the model"
    elif mine.is_array and mine.rank is not None and mine.rank not in ranks:
        yield f"the {what} `{name}` has {mine.rank} dimensions here, and {len(dims)} in the model, {list(dims)}"
    elif not mine.is_array and mine.rank is not None:
        filled = dims[model.batched : len(dims) - mine.rank]
        if mine.rank > len(dims) or any(size not in (1, -1) for size in filled):
            yield f"the {what} `{name}` is {mine.shown} here, and has the dimensions {list(dims)} in the model"


def _same(mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    return len(mine) == len(theirs) and all(a == b or -1 in (a, b) for a, b in zip(mine, theirs, strict=True))


def _names(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"`{name}`" for name in tensors) or "none"
