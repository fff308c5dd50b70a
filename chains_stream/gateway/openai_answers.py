"""What a Chainlet gives, as an answer of OpenAI's API: a stream of chunks or a whole, whichever the client asks for.

Both kinds of text, chat completions and completions, are a `Dialect`. A Chainlet's text is a piece of choice 0, its
chunks are completed with what it left out, and either is written by `ChunkForm` or joined by a `Gatherer`.
"""

from typing import Any, Protocol

import msgspec
from msgspec import UNSET

from chains_stream import foreign
from chains_stream import openai as api
from chains_stream.codec import Buffer, Codec
from chains_stream.gateway.exchange import Header
from chains_stream.gateway.streaming import EVENTS, bare, json_writer, one_line, stream_headers

DONE = b"data: [DONE]\n\n"

to_json = msgspec.json.Encoder(enc_hook=foreign.encode_json_hook).encode


class Stamp(msgspec.Struct, frozen=True):
    """What all pieces of one answer have in common, where the Chainlet does not say otherwise."""

    id: str
    created: int
    model: str

    def put_on(self, answer: Any) -> Any:
        """Complete a chunk, or a whole answer."""
        answer.id = answer.id or self.id
        answer.created = answer.created or self.created
        answer.model = answer.model or self.model
        return answer


class Gatherer(Protocol):
    """Joins the chunks of one answer."""

    def add(self, chunk: Any) -> None: ...

    def whole(self) -> Any: ...


class Dialect:
    """One of the kinds of text that the API knows.

    Attributes:
        prefix: of the ids of its answers.
        chunk: the class of what is streamed.
        whole: the class of what is not.
        gap: what a piece's text stands behind in its JSON.
    """

    prefix: str
    chunk: type[Any]
    whole: type[Any]
    gap: bytes

    def piece(self, text: str) -> Any:
        """Give a piece of choice 0."""
        raise NotImplementedError

    def of_text(self, text: str) -> Any:
        """Give a whole answer."""
        raise NotImplementedError

    def ending(self, index: int, reason: api.FinishReason) -> Any:
        """Give the last chunk of a choice."""
        raise NotImplementedError

    def begin(self, choice: Any) -> None:
        """Complete what comes to a choice first."""
        raise NotImplementedError

    def calls_tools(self, choice: Any) -> bool:
        """Tell whether what comes to a choice is of a tool call."""
        raise NotImplementedError

    def split(self, whole: Any) -> tuple[Any, Any]:
        """Give a whole answer as two chunks: what it says, and how it ends."""
        raise NotImplementedError

    def gatherer(self) -> Gatherer:
        """Give what joins the chunks of one answer."""
        raise NotImplementedError


class ChunkForm:
    """Chunks as the API streams them: a `Form` for one answer.

    The role comes with the first piece of a choice, a finish reason with its last, the usage at the end if it was asked
    for, and then ``[DONE]``; a failure is an ``error`` in the place of all that.
    """

    headers: tuple[Header, ...] = stream_headers(EVENTS)
    head = b""
    heartbeat = b":\n\n"

    def __init__(
        self, dialect: Dialect, codec: Codec, stamp: Stamp, *, usage: bool = False, token_ids: bool = False
    ) -> None:
        """Write chunks for a client that asks for the `usage`, or for the `token_ids`."""
        self._dialect = dialect
        self._stamp = stamp
        self._include_usage = usage
        self._token_ids = token_ids
        self._usage: api.Usage | None = None
        self._ended: dict[int, bool] = {}  # by the index of each choice that was met
        self._with_tools: set[int] = set()
        self._decode = codec.decode_result
        self._text: tuple[bytes, bytes] | None = None  # around the text of a chunk, once choice 0 has begun
        self._text_to_json = json_writer(codec) if bare(codec.signature.result) is str else None

    def chunk(self, sequence: int, value: Buffer) -> bytes:  # noqa: ARG002 - Form's
        if self._text is not None and self._text_to_json is not None:
            before, after = self._text
            return b"%b%b%b" % (before, one_line(self._text_to_json(value)), after)
        chunk = self._decode(value)
        if not isinstance(chunk, str):
            return self.write(chunk)
        if self._text_to_json is not None:
            empty, gap = _event(self._stamp.put_on(self._dialect.piece(""))), self._dialect.gap
            before, _, after = empty.partition(gap + b'""')
            self._text = before + gap, after
        return self.write(self._dialect.piece(chunk))

    def write(self, chunk: Any) -> bytes:
        """Write a chunk; nothing, if it holds no more than the usage."""
        if chunk.usage is not None:
            self._usage, chunk.usage = chunk.usage, None
        if not chunk.choices:
            return b""
        if not self._token_ids:
            without_token_ids(chunk)
        for choice in chunk.choices:
            if choice.index not in self._ended:
                self._ended[choice.index] = False
                self._dialect.begin(choice)
            if self._dialect.calls_tools(choice):
                self._with_tools.add(choice.index)
            if choice.finish_reason is not None:
                self._ended[choice.index] = True
        return _event(self._stamp.put_on(chunk))

    def end(self, chunks: int) -> bytes:  # noqa: ARG002 - Form's
        events = [] if self._ended else [self.write(self._dialect.piece(""))]
        for index, ended in sorted(self._ended.items()):
            if not ended:
                reason: api.FinishReason = "tool_calls" if index in self._with_tools else "stop"
                events.append(self.write(self._dialect.ending(index, reason)))
        if self._include_usage and self._usage is not None:
            last = self._dialect.chunk(choices=[], usage=self._usage)
            events.append(_event(self._stamp.put_on(last)))
        return b"".join(events) + DONE

    def failure(self, problem: bytes) -> bytes:
        return b"data: %b\n\n" % one_line(problem)


def without_token_ids(answer: Any) -> None:
    """Take the token ids out of a chunk or a whole answer: engines always give them, for streams that are resumed."""
    for part in (answer, *answer.choices):
        for name in ("token_ids", "prompt_token_ids"):
            if hasattr(part, name):
                setattr(part, name, UNSET)


def _event(chunk: Any) -> bytes:
    return b"data: %b\n\n" % one_line(to_json(chunk))


class Chat(Dialect):
    """Chat completions."""

    prefix = "chatcmpl-"
    chunk = api.ChatCompletionChunk
    whole = api.ChatCompletion
    gap = b'"content":'

    def piece(self, text: str) -> api.ChatCompletionChunk:
        return api.ChatCompletionChunk.of(text)

    def of_text(self, text: str) -> api.ChatCompletion:
        return api.ChatCompletion.of(text)

    def ending(self, index: int, reason: api.FinishReason) -> api.ChatCompletionChunk:
        return api.ChatCompletionChunk.of(finish_reason=reason, index=index)

    def begin(self, choice: api.ChatCompletionChunkChoice) -> None:
        choice.delta.role = choice.delta.role or "assistant"

    def calls_tools(self, choice: api.ChatCompletionChunkChoice) -> bool:
        return bool(choice.delta.tool_calls)

    def split(self, whole: api.ChatCompletion) -> tuple[api.ChatCompletionChunk, api.ChatCompletionChunk]:
        said = [
            api.ChatCompletionChunkChoice(_delta(choice.message), choice.index, None, choice.logprobs, choice.token_ids)
            for choice in whole.choices
        ]
        ends = [
            api.ChatCompletionChunkChoice(api.ChoiceDelta(), choice.index, choice.finish_reason)
            for choice in whole.choices
        ]
        return _like(whole, api.ChatCompletionChunk, said), _like(whole, api.ChatCompletionChunk, ends)

    def gatherer(self) -> "ChatGatherer":
        return ChatGatherer()


class Text(Dialect):
    """Completions, whose chunks and whole answers look alike."""

    prefix = "cmpl-"
    chunk = whole = api.Completion
    gap = b'"text":'

    def piece(self, text: str) -> api.Completion:
        return api.Completion.of(text)

    def of_text(self, text: str) -> api.Completion:
        return api.Completion.of(text, finish_reason="stop")

    def ending(self, index: int, reason: api.FinishReason) -> api.Completion:
        return api.Completion.of("", finish_reason=reason, index=index)

    def begin(self, choice: api.CompletionChoice) -> None:
        """There is nothing to complete."""

    def calls_tools(self, choice: api.CompletionChoice) -> bool:  # noqa: ARG002 - Dialect's
        return False

    def split(self, whole: api.Completion) -> tuple[api.Completion, api.Completion]:
        said = [msgspec.structs.replace(choice, finish_reason=None) for choice in whole.choices]
        ends = [api.CompletionChoice("", choice.index, choice.finish_reason or "stop") for choice in whole.choices]
        return _like(whole, api.Completion, said), _like(whole, api.Completion, ends)

    def gatherer(self) -> "TextGatherer":
        return TextGatherer()


def _delta(message: api.ChatCompletionMessage) -> api.ChoiceDelta:
    calls = [
        api.ChoiceDeltaToolCall(
            index,
            call.id,
            "function",
            api.ChoiceDeltaToolCallFunction(call.function.name, call.function.arguments),
        )
        for index, call in enumerate(message.tool_calls or ())
    ]
    return api.ChoiceDelta(
        content=message.content,
        refusal=message.refusal,
        tool_calls=calls or None,
        reasoning_content=message.reasoning_content,
        audio=message.audio,
    )


def _like(answer: Any, kind: type[Any], choices: list[Any]) -> Any:
    """Give an answer of a kind with what another one says of itself."""
    made = kind(choices=choices, id=answer.id, created=answer.created, model=answer.model, usage=answer.usage)
    for name in ("system_fingerprint", "service_tier", "prompt_token_ids"):  # completions have no tier
        if (value := getattr(answer, name, None)) is not None:
            setattr(made, name, value)
    return made


class _Common:
    """What chunks say of the whole: of who it is from the first that says so, of all else the last."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def add(self, chunk: Any) -> None:
        for name in ("id", "created", "model"):
            self.said[name] = self.said.get(name) or getattr(chunk, name)
        for name in ("usage", "system_fingerprint", "service_tier", "prompt_token_ids"):
            if (value := getattr(chunk, name, None)) not in (None, UNSET):
                self.said[name] = value


class _Call(msgspec.Struct):
    """A tool call as far as its pieces are here."""

    id: str = ""
    name: str = ""
    arguments: list[str] = []


class _Choice(msgspec.Struct):
    """A choice as far as its pieces are here."""

    content: list[str] = []
    refusal: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, _Call] = {}
    audio: dict[str, Any] = {}
    reason: api.FinishReason | None = None
    logprobs: api.ChoiceLogprobs | None = None
    token_ids: api.TokenIds = UNSET

    def add(self, choice: api.ChatCompletionChunkChoice) -> None:
        delta = choice.delta
        for parts, text in (
            (self.content, delta.content),
            (self.refusal, delta.refusal),
            (self.reasoning, delta.reasoning_content),
        ):
            if text is not None:
                parts.append(text)
        for call in delta.tool_calls or ():
            self._add_call(call)
        for name, value in (delta.audio or {}).items():
            joins = name in ("data", "transcript") and isinstance(value, str)
            self.audio[name] = self.audio.get(name, "") + value if joins else value
        self.reason = choice.finish_reason or self.reason
        self.token_ids = _joined_ids(self.token_ids, choice.token_ids)
        if choice.logprobs is not None:
            self.logprobs = _joined_logprobs(self.logprobs, choice.logprobs)

    def _add_call(self, call: api.ChoiceDeltaToolCall) -> None:
        known = self.calls.setdefault(call.index, _Call())
        known.id = known.id or call.id or ""
        if call.function is not None:
            known.name = known.name or call.function.name or ""
            known.arguments.append(call.function.arguments or "")

    def whole(self, index: int) -> api.ChatCompletionChoice:
        calls = [
            api.ToolCall(call.id or f"call_{number}", api.FunctionCall(call.name, "".join(call.arguments)))
            for number, call in sorted(self.calls.items())
        ]
        says_nothing = not self.content and (calls or self.refusal or self.audio)
        message = api.ChatCompletionMessage(
            content=None if says_nothing else "".join(self.content),
            refusal="".join(self.refusal) if self.refusal else None,
            tool_calls=calls or None,
            reasoning_content="".join(self.reasoning) if self.reasoning else None,
            audio=self.audio or None,
        )
        reason = self.reason or ("tool_calls" if calls else "stop")
        return api.ChatCompletionChoice(message, index, reason, self.logprobs, self.token_ids)


class ChatGatherer:
    """Joins chunks of a chat completion, by the indices of their choices and of their tool calls."""

    def __init__(self) -> None:
        self._common = _Common()
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: api.ChatCompletionChunk) -> None:
        self._common.add(chunk)
        for choice in chunk.choices:
            self._choices.setdefault(choice.index, _Choice()).add(choice)

    def whole(self) -> api.ChatCompletion:
        choices = self._choices or {0: _Choice()}
        return api.ChatCompletion(
            choices=[choice.whole(index) for index, choice in sorted(choices.items())], **self._common.said
        )


class TextGatherer:
    """Joins chunks of a completion, by the indices of their choices."""

    def __init__(self) -> None:
        self._common = _Common()
        self._texts: dict[int, list[str]] = {}
        self._choices: dict[int, api.CompletionChoice] = {}

    def add(self, chunk: api.Completion) -> None:
        self._common.add(chunk)
        for choice in chunk.choices:
            known = self._choices.setdefault(choice.index, api.CompletionChoice("", choice.index))
            self._texts.setdefault(choice.index, []).append(choice.text)
            known.finish_reason = choice.finish_reason or known.finish_reason
            known.token_ids = _joined_ids(known.token_ids, choice.token_ids)
            known.prompt_token_ids = _joined_ids(known.prompt_token_ids, choice.prompt_token_ids)
            if choice.logprobs is not None:
                known.logprobs = _joined_text_logprobs(known.logprobs, choice.logprobs)

    def whole(self) -> api.Completion:
        choices = self._choices or {0: api.CompletionChoice("")}
        for index, choice in choices.items():
            choice.text = "".join(self._texts.get(index, ()))
            choice.finish_reason = choice.finish_reason or "stop"
        return api.Completion(choices=[choices[index] for index in sorted(choices)], **self._common.said)


def _joined(first: list[Any] | None, second: list[Any] | None) -> list[Any] | None:
    """Give both lists as one: the first, which grows."""
    if first is None or second is None:
        return second if first is None else first
    first.extend(second)
    return first


def _joined_ids(first: api.TokenIds, second: api.TokenIds) -> api.TokenIds:
    """Give the tokens of both: the first ones, which grow."""
    if not isinstance(first, list) or not isinstance(second, list):
        return first if isinstance(first, list) else second
    first.extend(second)
    return first


def _joined_logprobs(known: api.ChoiceLogprobs | None, more: api.ChoiceLogprobs) -> api.ChoiceLogprobs:
    known = known or api.ChoiceLogprobs()
    known.content = _joined(known.content, more.content)
    known.refusal = _joined(known.refusal, more.refusal)
    return known


def _joined_text_logprobs(known: api.CompletionLogprobs | None, more: api.CompletionLogprobs) -> api.CompletionLogprobs:
    known = known or api.CompletionLogprobs()
    known.text_offset = _joined(known.text_offset, more.text_offset)
    known.token_logprobs = _joined(known.token_logprobs, more.token_logprobs)
    known.tokens = _joined(known.tokens, more.tokens)
    known.top_logprobs = _joined(known.top_logprobs, more.top_logprobs)
    return known
