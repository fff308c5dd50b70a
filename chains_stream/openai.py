"""The types of OpenAI's API, for Chainlets that its clients call: ``from chains_stream import openai``.

A Chainlet whose one argument is a `ChatCompletionRequest`, a `CompletionRequest` or an `EmbeddingRequest` is served
under ``/v1/``. Fields are those of https://platform.openai.com/docs/api-reference, and some that vLLM takes beside
them; others that a client sends are ignored. Derive a class from a request to take more.

Of an answer a Chainlet fills in what it knows: the gateway gives `id`, `created` and `model` where they are left empty.
The fields ``object``, ``role`` and ``type`` of answers are tags, which are always written.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import msgspec

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
Role = Literal["developer", "system", "user", "assistant", "tool", "function"]

_NO_MIXTURE = [
    {"items": {"type": "string"}},
    {"items": {"type": "integer"}},
    {"items": {"type": "array", "items": {"type": "integer"}}},
]
Texts = (
    str
    | Annotated[
        Sequence[str | int | Sequence[int]], msgspec.Meta(min_length=1, extra_json_schema={"anyOf": _NO_MIXTURE})
    ]
)
"""A text or many of them, each a string or a list of tokens."""

TokenIds = list[int] | msgspec.UnsetType
"""Tokens as the numbers that a model knows them by; clients get those that they ask for (`return_token_ids`)."""

_Name = Annotated[str, msgspec.Meta(max_length=1024)]  # it comes back with every chunk
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Part = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]


class TextPart(msgspec.Struct, tag_field="type", tag="text", omit_defaults=True):
    """Text in a message."""

    text: str


class ImageUrl(msgspec.Struct, omit_defaults=True):
    """Where an image is; a ``data:`` URL holds it."""

    url: str
    detail: str | None = None


class ImagePart(msgspec.Struct, tag_field="type", tag="image_url", omit_defaults=True):
    """An image in a message."""

    image_url: ImageUrl


class InputAudio(msgspec.Struct, omit_defaults=True):
    """Sound, in base64; `format` is ``wav`` or ``mp3``."""

    data: str
    format: str


class AudioPart(msgspec.Struct, tag_field="type", tag="input_audio", omit_defaults=True):
    """Sound in a message."""

    input_audio: InputAudio


class MediaUrl(msgspec.Struct, omit_defaults=True):
    """Where sound or a film is; a ``data:`` URL holds it."""

    url: str


class AudioUrlPart(msgspec.Struct, tag_field="type", tag="audio_url", omit_defaults=True):
    """Sound in a message, as vLLM takes it."""

    audio_url: MediaUrl


class VideoPart(msgspec.Struct, tag_field="type", tag="video_url", omit_defaults=True):
    """A film in a message, as vLLM takes it."""

    video_url: MediaUrl


class File(msgspec.Struct, omit_defaults=True):
    """A file: in base64, or by the id that it was given when it was sent."""

    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(msgspec.Struct, tag_field="type", tag="file", omit_defaults=True):
    """A file in a message."""

    file: File


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal", omit_defaults=True):
    """What the assistant said instead of an answer."""

    refusal: str


ContentPart = TextPart | ImagePart | AudioPart | AudioUrlPart | VideoPart | FilePart | RefusalPart


class FunctionCall(msgspec.Struct):
    """A call of a function; `arguments` is JSON as the model wrote it, which may be none."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call of a tool that the model asks for."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One message of a conversation."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    audio: dict[str, Any] | None = None
    function_call: FunctionCall | None = None

    @property
    def text(self) -> str:
        """The text of the message, that of all its parts."""
        content = self.content
        if isinstance(content, str):
            return content
        return "".join(part.text for part in content or () if isinstance(part, TextPart))


class FunctionDefinition(msgspec.Struct, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON Schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool that the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class JsonSchemaFormat(msgspec.Struct, omit_defaults=True):
    """The JSON Schema that an answer is to fit."""

    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, omit_defaults=True):
    """What an answer is to be: `type` is ``text``, ``json_object`` or ``json_schema``."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(msgspec.Struct, omit_defaults=True):
    """What a stream is to hold."""

    include_usage: bool | None = False


class GenerationRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What requests for text have in common."""

    model: _Name = ""
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: _Positive | None = None
    n: _Choices | None = None
    presence_penalty: _Penalty | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: _Temperature | None = None
    top_p: _Part | None = None
    user: str | None = None
    prompt_cache_key: str | None = None  # requests of one key meet one worker, and so its cache of their prompts
    # vLLM's own
    top_k: int | None = None
    min_p: _Part | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer, however they were given."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """How many tokens the answer may have at most; None for no limit of the client's."""
        return self.max_tokens


class ChatCompletionRequest(GenerationRequest, kw_only=True, omit_defaults=True):
    """A conversation to go on with: the body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    audio: dict[str, Any] | None = None
    logprobs: bool | None = None
    max_completion_tokens: _Positive | None = None
    metadata: dict[str, str] | None = None
    modalities: list[str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[Tool] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    verbosity: str | None = None
    # vLLM's own
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def token_limit(self) -> int | None:
        """How many tokens the answer may have at most, by the new name of that field or the old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest, kw_only=True, omit_defaults=True):
    """Text to go on with: the body of ``POST /v1/completions``. Tokens may stand for a text.

    `prompt` is one text, or many, never a mixture; `prompts` gives them as a list in either case.
    """

    prompt: Texts
    best_of: _Choices | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        _check_texts("prompt", self.prompt)

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        """The texts, each a string or a list of tokens."""
        return _texts(self.prompt)


class EmbeddingRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Texts to embed: the body of ``POST /v1/embeddings``. Tokens may stand for a text.

    `input` is one text, or many, never a mixture; `inputs` gives them as a list in either case. The gateway sees to
    `encoding_format`.
    """

    input: Texts
    model: _Name = ""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: _Positive | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        _check_texts("input", self.input)

    @property
    def inputs(self) -> list[str | Sequence[int]]:
        """The texts, each a string or a list of tokens."""
        return _texts(self.input)


class PromptTokensDetails(msgspec.Struct, omit_defaults=True):
    """What the tokens of a prompt were."""

    audio_tokens: int | None = None
    cached_tokens: int | None = None


class CompletionTokensDetails(msgspec.Struct, omit_defaults=True):
    """What the tokens of an answer were."""

    accepted_prediction_tokens: int | None = None
    audio_tokens: int | None = None
    reasoning_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class Usage(msgspec.Struct):
    """How many tokens a request took. `total_tokens` is their sum if it is not given."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None

    def __post_init__(self) -> None:
        self.total_tokens = self.total_tokens or self.prompt_tokens + self.completion_tokens


class TopLogprob(msgspec.Struct):
    """A token that was likely at a place."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(msgspec.Struct):
    """The token at a place, and those that were likely there."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(msgspec.Struct):
    """How likely the tokens of a choice were."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


class ChatCompletionMessage(msgspec.Struct, kw_only=True, tag_field="role", tag="assistant", omit_defaults=True):
    """The assistant's message; `content` is None where there are tool calls alone."""

    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    annotations: list[dict[str, Any]] | None = None
    audio: dict[str, Any] | None = None
    function_call: FunctionCall | None = None


class ChatCompletionChoice(msgspec.Struct):
    """One of the answers to a conversation."""

    message: ChatCompletionMessage
    index: int = 0
    finish_reason: FinishReason = "stop"
    logprobs: ChoiceLogprobs | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True, tag_field="object", tag="chat.completion", omit_defaults=True):
    """The whole answer to a conversation. See `of` for one of text alone."""

    choices: list[ChatCompletionChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: TokenIds = msgspec.UNSET

    @classmethod
    def of(
        cls,
        content: str | None,
        *,
        tool_calls: list[ToolCall] | None = None,
        finish_reason: FinishReason | None = None,
        usage: Usage | None = None,
    ) -> Self:
        """Give an answer of one choice."""
        message = ChatCompletionMessage(content=content, tool_calls=tool_calls)
        reason: FinishReason = finish_reason or ("tool_calls" if tool_calls else "stop")
        return cls(choices=[ChatCompletionChoice(message, finish_reason=reason)], usage=usage)


class ChoiceDeltaToolCallFunction(msgspec.Struct, omit_defaults=True):
    """What comes to a call of a function: its name once, its arguments piece by piece."""

    name: str | None = None
    arguments: str | None = None


class ChoiceDeltaToolCall(msgspec.Struct, omit_defaults=True):
    """What comes to the tool call number `index` of a choice: `id` and `type` once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: ChoiceDeltaToolCallFunction | None = None


class ChoiceDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What comes to a choice. The gateway gives the first one its `role`."""

    role: Role | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ChoiceDeltaToolCall] | None = None
    reasoning_content: str | None = None
    audio: dict[str, Any] | None = None


class ChatCompletionChunkChoice(msgspec.Struct):
    """What comes to the choice number `index`; `finish_reason` is None until its end."""

    delta: ChoiceDelta
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: ChoiceLogprobs | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatCompletionChunk(
    msgspec.Struct, kw_only=True, tag_field="object", tag="chat.completion.chunk", omit_defaults=True
):
    """A piece of the answer to a conversation. See `of` for one of text alone.

    Put `usage` into any chunk, one without choices say: the last one counts. Clients get it if they ask for it.
    """

    choices: list[ChatCompletionChunkChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: TokenIds = msgspec.UNSET

    @classmethod
    def of(
        cls,
        content: str | None = None,
        *,
        tool_calls: list[ChoiceDeltaToolCall] | None = None,
        finish_reason: FinishReason | None = None,
        index: int = 0,
        usage: Usage | None = None,
    ) -> Self:
        """Give what comes to one choice."""
        delta = ChoiceDelta(content=content, tool_calls=tool_calls)
        return cls(choices=[ChatCompletionChunkChoice(delta, index, finish_reason)], usage=usage)


class CompletionLogprobs(msgspec.Struct):
    """How likely the tokens of a text were."""

    text_offset: list[int] | None = None
    token_logprobs: list[float | None] | None = None
    tokens: list[str] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(msgspec.Struct):
    """One of the texts, or what comes to it; `finish_reason` is None until its end."""

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: TokenIds = msgspec.UNSET
    prompt_token_ids: TokenIds = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True, tag_field="object", tag="text_completion", omit_defaults=True):
    """The answer to a prompt, whole or a piece of it. See `of` for one text."""

    choices: list[CompletionChoice]
    id: str = ""
    created: int = 0
    model: str = ""
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @classmethod
    def of(
        cls, text: str, *, finish_reason: FinishReason | None = None, index: int = 0, usage: Usage | None = None
    ) -> Self:
        """Give one text, or what comes to it."""
        return cls(choices=[CompletionChoice(text, index, finish_reason)], usage=usage)


class Embedding(msgspec.Struct, tag_field="object", tag="embedding"):
    """One vector: floats, or 32-bit ones in base64, little-endian. The gateway writes it as the client asks for it."""

    embedding: list[float] | str
    index: int


class EmbeddingUsage(msgspec.Struct):
    """How many tokens texts had. `total_tokens` is as many if it is not given."""

    prompt_tokens: int = 0
    total_tokens: int = 0

    def __post_init__(self) -> None:
        self.total_tokens = self.total_tokens or self.prompt_tokens


class EmbeddingResponse(msgspec.Struct, kw_only=True, tag_field="object", tag="list"):
    """The vectors of texts, in their order. See `of` for a list of them."""

    data: list[Embedding]
    model: str = ""
    usage: EmbeddingUsage = msgspec.field(default_factory=EmbeddingUsage)

    @classmethod
    def of(cls, vectors: Sequence[Sequence[float]], *, prompt_tokens: int = 0) -> Self:
        """Give one vector for each text."""
        data = [Embedding(list(vector), index) for index, vector in enumerate(vectors)]
        return cls(data=data, usage=EmbeddingUsage(prompt_tokens))


class Model(msgspec.Struct, kw_only=True, tag_field="object", tag="model"):
    """One of the Chainlets that can be asked for."""

    id: str
    created: int
    owned_by: str


class ModelList(msgspec.Struct, kw_only=True, tag_field="object", tag="list"):
    """All that can be asked for."""

    data: list[Model]


class ErrorBody(msgspec.Struct):
    """What went wrong: `type` is its kind, `code` a stable word, `param` the path of the field that is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """The answer to a request that failed."""

    error: ErrorBody


def _check_texts(name: str, given: Texts) -> None:
    """Raise ValueError for a list that is no list of texts, nor tokens, nor a list of lists of tokens."""
    if isinstance(given, str):
        return
    if len({type(item) for item in given}) > 1:
        raise ValueError(f"`{name}` should hold texts, or tokens, or lists of tokens, and not a mixture")


def _texts(given: Texts) -> list[str | Sequence[int]]:
    if isinstance(given, str):
        return [given]
    tokens = [item for item in given if isinstance(item, int)]
    return [tokens] if tokens else [item for item in given if not isinstance(item, int)]
