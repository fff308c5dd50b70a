"""How text is to be generated, as inputs of a model: only those that it has, by the name that it has for them.

The names are those of TensorRT-LLM's `ensemble` and `tensorrt_llm_bls`, now and formerly, and of its `llmapi` model. A
wish that the model has no input for is refused, unless it asks for what happens anyway.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

import chains_stream as chains
from chainlets.triton_check import Model
from chainlets.triton_tensors import Tensor
from chains_stream import openai

NAMES: Mapping[str, tuple[str, ...]] = {
    "text": ("text_input",),
    "max_tokens": ("max_tokens", "sampling_param_max_tokens"),
    "temperature": ("temperature", "sampling_param_temperature"),
    "top_p": ("top_p", "sampling_param_top_p"),
    "top_k": ("top_k", "sampling_param_top_k"),
    "min_p": ("min_p", "sampling_param_min_p"),
    "min_tokens": ("min_tokens", "min_length", "sampling_param_min_tokens"),
    "seed": ("seed", "random_seed", "sampling_param_seed"),
    "stop": ("stop_words", "sampling_param_stop"),
    "bad_words": ("bad_words",),
    "frequency_penalty": ("frequency_penalty", "sampling_param_frequency_penalty"),
    "presence_penalty": ("presence_penalty", "sampling_param_presence_penalty"),
    "repetition_penalty": ("repetition_penalty", "sampling_param_repetition_penalty"),
    "length_penalty": ("length_penalty", "sampling_param_length_penalty"),
    "end_id": ("end_id",),
    "pad_id": ("pad_id",),
    "stream": ("stream", "streaming"),
    "exclude_prompt": ("exclude_input_in_output", "sampling_param_exclude_input_from_output"),
    "guide_type": ("guided_decoding_guide_type",),
    "guide": ("guided_decoding_guide",),
    "count_prompt": ("return_num_input_tokens",),
    "count_answer": ("return_num_output_tokens",),
    "say_reason": ("return_finish_reason",),
}
NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
}
WISHES = (
    "max_tokens", "top_p", "min_p", "min_tokens", "seed", "bad_words",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "length_penalty",
)  # fmt: skip
NEVER = -1  # for `end_id`: no token ends the answer


class Guide(msgspec.Struct, frozen=True):
    """What an answer has to fit: `type` is ``json``, ``json_schema``, ``regex`` or ``ebnf_grammar``."""

    type: str
    guide: str = ""


class Sampling(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """How text is to be generated; None leaves it to the model.

    Attributes:
        max_tokens: of the answer, at most.
        temperature: 0 takes the likeliest token each time.
        stop: texts that end the answer, and are not part of it unless `include_stop`.
        ignore_eos: go on to `max_tokens`, whatever the model says.
        guide: for models with guided decoding.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stop: list[str] = []
    include_stop: bool = False
    bad_words: list[str] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    ignore_eos: bool = False
    guide: Guide | None = None


class Defaults(msgspec.Struct, frozen=True):
    """What a request that says nothing gets; `end_id` and `pad_id` are the tokenizer's."""

    max_tokens: int
    end_id: int | None = None
    pad_id: int | None = None


def input_of(model: Model, name: str) -> Tensor | None:
    """Find the input that a model has for one of `NAMES`."""
    return next((model.inputs[each] for each in NAMES[name] if each in model.inputs), None)


def inputs_for(model: Model, prompt: str, sampling: Sampling, defaults: Defaults) -> dict[str, Any]:
    """Give the inputs for a prompt, by the model's own names. Raises InvalidArgumentError for what it can't take."""
    found: dict[str, Any] = {}
    for name, value in _wishes(sampling):
        tensor = input_of(model, name)
        if tensor is not None:
            found[tensor.name] = value
        elif value not in NO_EFFECT.get(name, ()):
            message = f"{model.shown} has no input for `{name}`"
            raise chains.InvalidArgumentError(message, path=f"$.{name}")
    for name, value in _habits(model, prompt, sampling, defaults):
        tensor = input_of(model, name)
        if tensor is not None:
            found.setdefault(tensor.name, value)
    return found


def _wishes(sampling: Sampling) -> Iterator[tuple[str, Any]]:
    """Give what the request asks for, which has to be done or refused."""
    for name in WISHES:
        if (value := getattr(sampling, name)) is not None:
            yield name, value
    if sampling.temperature == 0:
        yield "top_k", 1  # the likeliest one; a temperature of 0 is an error in TensorRT-LLM
    elif sampling.temperature is not None:
        yield "temperature", sampling.temperature
    if sampling.temperature != 0 and sampling.top_k is not None and sampling.top_k > 0:
        yield "top_k", sampling.top_k
    if sampling.ignore_eos:
        yield "end_id", NEVER
    if sampling.guide is not None:
        yield "guide_type", sampling.guide.type
        yield "guide", sampling.guide.guide


def _habits(model: Model, prompt: str, sampling: Sampling, defaults: Defaults) -> Iterator[tuple[str, Any]]:
    """Give what the model gets if it has an input for it."""
    yield "text", prompt
    yield "max_tokens", defaults.max_tokens
    yield "stream", model.decoupled
    for name in ("exclude_prompt", "count_prompt", "count_answer", "say_reason"):
        yield name, True
    for name in ("end_id", "pad_id"):
        if (value := getattr(defaults, name)) is not None:
            yield name, value
    for name, words in (("stop", sampling.stop), ("bad_words", [])):
        tensor = input_of(model, name)
        if tensor is None:
            continue
        if words and (not tensor.dims or tensor.dims[-1] in (-1, len(words))):
            yield name, words  # so that it stops by itself; whatever it does, the answer is cut
        elif not tensor.optional:
            yield name, [""]


def missing(model: Model, defaults: Defaults) -> list[str]:
    """Say, a line each, why text can't be generated by a model."""
    faults = []
    filled = {name for name, _ in _habits(model, "", Sampling(), defaults)}
    known = {tensor.name: name for name in NAMES if (tensor := input_of(model, name)) is not None}
    if input_of(model, "text") is None:
        faults.append(f"the model has no input {' or '.join(f'`{each}`' for each in NAMES['text'])} for the prompt")
    for name, tensor in model.inputs.items():
        if not tensor.optional and known.get(name) not in filled:
            hint = f"; set `{name}` in the configuration" if name in ("end_id", "pad_id") else ""
            faults.append(f"the model asks for an input `{name}`, {tensor}, which has no value here{hint}")
    return faults


_REFUSED: Mapping[str, tuple[Any, ...]] = {
    # What Triton's text models can't do, and what of it asks for nothing.
    "n": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "stop_token_ids": (None, []),
    "allowed_token_ids": (None, []),
    "skip_special_tokens": (None, True),
    "return_token_ids": (None, False),
    "audio": (None,),
    "modalities": (None, [], ["text"]),
    "chat_template": (None,),
}


def sampling_of(request: openai.ChatCompletionRequest) -> Sampling:
    """Read what a request of OpenAI's API asks for. Raises InvalidArgumentError for what Triton can't do."""
    for name, harmless in _REFUSED.items():
        if getattr(request, name) not in harmless:
            raise chains.InvalidArgumentError(f"`{name}` is not to be had from a model on Triton", path=f"$.{name}")
    if request.tools and request.tool_choice != "none":
        message = "tools are not to be had from a model on Triton: what it writes is not read as calls"
        raise chains.InvalidArgumentError(message, path="$.tools")
    return Sampling(
        max_tokens=request.token_limit,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        min_tokens=request.min_tokens,
        seed=request.seed,
        stop=request.stops,
        include_stop=bool(request.include_stop_str_in_output),
        bad_words=request.bad_words,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        ignore_eos=bool(request.ignore_eos),
        guide=_guide_of(request),
    )


def _guide_of(request: openai.ChatCompletionRequest) -> Guide | None:
    """Read what the answer has to fit, by OpenAI's field for it or by vLLM's."""
    form = request.response_format
    wanted: Any = request.structured_outputs or {}
    if form is not None and form.type == "json_object":
        wanted = {"json_object": True}
    elif form is not None and form.type == "json_schema":
        wanted = {"json": (form.json_schema.schema if form.json_schema else None) or {}}
    guide: Guide | None = None
    match wanted:
        case {"json_object": True}:
            guide = Guide("json")
        case {"json": schema}:
            guide = Guide("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
        case {"regex": str(pattern)}:
            guide = Guide("regex", pattern)
        case {"choice": [*choices]}:
            guide = Guide("regex", "|".join(re.escape(str(choice)) for choice in choices))
        case {"grammar": str(grammar)}:
            guide = Guide("ebnf_grammar", grammar)
        case _ if wanted:
            message = "a model on Triton can be held to `json`, `json_object`, `regex`, `choice` or `grammar` alone"
            raise chains.InvalidArgumentError(message, path="$.structured_outputs")
        case _ if form is not None and form.type != "text":
            raise chains.InvalidArgumentError(f"there is no form `{form.type}`", path="$.response_format.type")
    return guide
