"""The types of OpenAI's API as a Chain's own types: checked, named after, sent and shown like any other."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

import chains_stream as chains
from chainlets.openai_chat import Answer
from chains_stream import openai as api
from chains_stream.chain import Chain
from chains_stream.chainlet import signature
from chains_stream.codec import codec_of
from chains_stream.gateway.openai_answers import Chat, ChunkForm, Stamp, Text
from chains_stream.gateway.openai_offers import offers
from tests import talking

TOOL = api.Tool(api.FunctionDefinition("weather", parameters={"type": "object"}))
CALL = api.ToolCall("call_a", api.FunctionCall("weather", "{}"))
REQUEST = api.ChatCompletionRequest(
    messages=[
        api.ChatMessage("user", [api.TextPart("a"), api.ImagePart(api.ImageUrl("data:,"))]),
        api.ChatMessage("assistant", tool_calls=[CALL]),
        api.ChatMessage("tool", "{}", tool_call_id="call_a"),
    ],
    tools=[TOOL],
    tool_choice={"type": "function", "function": {"name": "weather"}},
    response_format=api.ResponseFormat("json_schema", api.JsonSchemaFormat("answer", schema={"type": "object"})),
    max_tokens=7,
    temperature=0.5,
    stop=["x"],
)
LOGPROBS = api.ChoiceLogprobs([api.TokenLogprob("a", -0.5, [97], [api.TopLogprob("b", -1.0)])])


@pytest.mark.parametrize(
    "value",
    [
        REQUEST,
        api.ChatCompletion.of(None, tool_calls=[CALL], usage=talking.USAGE),
        api.ChatCompletionChunk(
            choices=[api.ChatCompletionChunkChoice(api.ChoiceDelta(content="a"), 1, None, LOGPROBS)]
        ),
        *talking.tool_chunks(),
        api.CompletionRequest(prompt=[[1, 2], [3]]),
        api.Completion.of("a", finish_reason="length", usage=talking.USAGE),
        api.EmbeddingRequest(input=["a", "b"], encoding_format="base64"),
        api.EmbeddingResponse.of([[0.5, 1.0]], prompt_tokens=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_the_same_on_the_other_side(value: msgspec.Struct) -> None:
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(value), type=type(value)) == value


def test_the_codec_takes_requests_and_gives_chunks() -> None:
    codec = codec_of(signature(talking.Talk))
    assert codec.decode_arguments(codec.encode_arguments((REQUEST,), {})) == {"request": REQUEST}
    body = b'{"request": %b}' % msgspec.json.encode(REQUEST)
    assert codec.decode_arguments(codec.arguments_from_json(body)) == {"request": REQUEST}
    chunk = codec.encode_result(api.ChatCompletionChunk.of("a"))
    assert msgspec.json.decode(codec.result_to_json(chunk)) == {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None, "logprobs": None}],
    }
    assert codec.schema()["$defs"].keys() >= {"ChatCompletionRequest", "ChatMessage", "ChatCompletionChunk"}


def test_fields_that_clients_miss_are_written_and_others_are_not() -> None:
    answer = msgspec.json.decode(msgspec.json.encode(api.ChatCompletion.of(None, tool_calls=[CALL])))
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "id": "call_a", "function": {"name": "weather", "arguments": "{}"}}],
    }
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert "usage" not in answer
    assert msgspec.json.decode(msgspec.json.encode(api.Usage(0))) == {
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def test_ways_to_say_one_thing() -> None:
    def chat(**more: Any) -> api.ChatCompletionRequest:
        return api.ChatCompletionRequest(messages=[api.ChatMessage("user")], **more)

    assert (chat().stops, chat(stop="a").stops, chat(stop=["a", "b"]).stops) == ([], ["a"], ["a", "b"])
    assert (chat().token_limit, chat(max_tokens=3).token_limit) == (None, 3)
    assert chat(max_tokens=3, max_completion_tokens=5).token_limit == 5
    assert REQUEST.messages[0].text == "a"
    assert REQUEST.messages[1].text == ""
    cases: list[tuple[Any, list[Any]]] = [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2]], [[1], [2]]),
    ]
    for given, inputs in cases:
        assert api.EmbeddingRequest(input=given).inputs == inputs
        assert api.CompletionRequest(prompt=given).prompts == inputs


@pytest.mark.parametrize("given", [[], ["a", 1], [[1], 1]])
def test_texts_are_no_mixture(given: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match="input"):
        msgspec.json.decode(msgspec.json.encode({"input": given}), type=api.EmbeddingRequest)


def test_what_is_offered() -> None:
    found = [(offer.name, offer.path) for offer in offers(Chain.of(talking.Several))]
    assert found == [
        ("Several", "/v1/chat/completions"),
        ("Unit Talk", "/v1/chat/completions"),
        ("Complete", "/v1/completions"),
        ("measure-1", "/v1/embeddings"),
    ]


class TwoArguments(chains.ChainletBase):
    async def run_remote(self, request: api.ChatCompletionRequest, times: int = 1) -> str:
        return request.messages[0].text * times


class WrongChunks(chains.ChainletBase):
    async def run_remote(self, request: api.ChatCompletionRequest) -> AsyncIterator[api.Completion]:
        yield api.Completion.of(request.messages[0].text)


class StreamedVectors(chains.ChainletBase):
    async def run_remote(self, request: api.EmbeddingRequest) -> AsyncIterator[api.EmbeddingResponse]:
        yield api.EmbeddingResponse.of([], prompt_tokens=len(request.inputs))


@pytest.mark.parametrize("entrypoint", [TwoArguments, WrongChunks, StreamedVectors, talking.Guard])
def test_what_is_not_offered(entrypoint: type[chains.ChainletBase]) -> None:
    assert offers(Chain.of(entrypoint)) == []


def test_logprobs_and_what_else_comes_in_pieces_are_joined() -> None:
    chat, text = Chat().gatherer(), Text().gatherer()
    for part in ("a", "b"):
        delta = api.ChoiceDelta(refusal=part, reasoning_content=part, audio={"data": part, "id": part})
        chat.add(api.ChatCompletionChunk(choices=[api.ChatCompletionChunkChoice(delta, logprobs=_logprobs(part))]))
        text.add(api.Completion(choices=[api.CompletionChoice(part, logprobs=api.CompletionLogprobs(tokens=[part]))]))
    choice = chat.whole().choices[0]
    assert (choice.message.content, choice.message.refusal, choice.message.reasoning_content) == (None, "ab", "ab")
    assert choice.message.audio == {"data": "ab", "id": "b"}
    assert choice.logprobs == api.ChoiceLogprobs([api.TokenLogprob("a", -0.5), api.TokenLogprob("b", -0.5)])
    assert text.whole().choices[0].logprobs == api.CompletionLogprobs(tokens=["a", "b"])


def _logprobs(token: str) -> api.ChoiceLogprobs:
    return api.ChoiceLogprobs([api.TokenLogprob(token, -0.5)])


def test_text_is_written_the_quick_way_as_the_slow_one() -> None:
    codec = codec_of(signature(talking.TalkText))
    stamp = Stamp("chatcmpl-1", 7, 'an "odd" \u2028 "content":"" name')
    form = ChunkForm(Chat(), codec, stamp)
    events = [form.chunk(number, msgspec.msgpack.encode('"content":"" \u2029')) for number in range(3)]
    chunks = [msgspec.json.decode(event.removeprefix(b"data: "), type=api.ChatCompletionChunk) for event in events]
    assert chunks[0].choices[0].delta.role == "assistant"
    chunks[0].choices[0].delta.role = None
    assert chunks[0] == chunks[1] == chunks[2]
    assert chunks[0].choices[0].delta.content == '"content":"" \u2029'
    assert chunks[0].model == stamp.model
    assert all(len(event.decode().splitlines()) == 2 for event in events)


def test_the_example_runs_without_a_broker() -> None:
    async def ask() -> str:
        request = api.ChatCompletionRequest(
            messages=[api.ChatMessage("system", "Cats purr. Dogs bark."), api.ChatMessage("user", "Who barks?")]
        )
        with chains.run_local():
            chunks = [chunk async for chunk in Answer().run_remote(request)]
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    assert asyncio.run(ask()) == "Dogs bark."


def test_a_whole_answer_in_two_chunks_says_all_that_it_said_of_itself() -> None:
    whole = api.ChatCompletion.of("a", usage=api.Usage(1, 2))
    whole.system_fingerprint, whole.service_tier = "fp", "flex"
    gatherer = Chat().gatherer()
    for chunk in Chat().split(whole):
        assert (chunk.system_fingerprint, chunk.service_tier) == ("fp", "flex")
        gatherer.add(chunk)
    assert gatherer.whole() == whole
