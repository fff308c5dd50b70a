"""OpenAI's API as its own Python client sees it."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from openapi_spec_validator import OpenAPIV31SpecValidator

from chainlets.openai_chat import UNKNOWN, Answer
from chains_stream.gateway import streaming
from chains_stream.gateway.auth import new_key
from tests.sample import Seen
from tests.serving import WAIT, Greet, Served, serving
from tests.talking import (
    Complete,
    CompletePlain,
    CompleteTokens,
    Measure,
    MeasurePlain,
    Several,
    Talk,
    TalkCounting,
    TalkFailing,
    TalkMixed,
    TalkPlain,
    TalkText,
    TalkTokens,
    TalkWhole,
)

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    Seen.reset()
    yield
    Seen.reset()


@asynccontextmanager
async def client_of(served: Served, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    url = f"{served.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=WAIT, http_client=http) as client:
        yield client


@asynccontextmanager
async def talking(entrypoint: type[Any], **settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with serving(entrypoint, **settings) as served, client_of(served) as client:
        yield client


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


async def streamed(client: openai.AsyncOpenAI, text: str, **more: Any) -> list[ChatCompletionChunk]:
    stream = await client.chat.completions.create(model="any", messages=say(text), stream=True, **more)
    return [chunk async for chunk in stream]


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    found = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in found)


# --- chat completions, whatever the Chainlet is


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [(Talk, "hello there "), (TalkText, "hello there "), (TalkWhole, "hello there"), (TalkPlain, "HELLO THERE")],
)
async def test_a_chat_streamed_and_not(entrypoint: type[Any], expected: str) -> None:
    async with talking(entrypoint) as client:
        whole = await client.chat.completions.create(model="gpt-4o", messages=say("hello there"))
        chunks = await streamed(client, "hello there")
    assert whole.object == "chat.completion"
    assert whole.id.startswith("chatcmpl-")
    assert whole.created > 1_700_000_000
    assert whole.model == "gpt-4o"
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "stop")
    assert choice.message.tool_calls is None
    assert text_of(chunks) == expected
    assert {(chunk.id, chunk.object, chunk.created, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk", chunks[0].created, "any")
    }
    roles = [choice.delta.role for chunk in chunks for choice in chunk.choices]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


async def test_what_is_on_the_wire() -> None:
    async with serving(TalkText) as served:
        body = {"messages": say("a\u2028b  c"), "model": "m", "stream": True, "unknown": 1}
        response = await served.http.post(CHAT, json=body)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["x-request-id"]
    *events, done, empty = response.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert choices == [
        {
            "delta": {"role": "assistant", "content": "a "},
            "index": 0,
            "finish_reason": None,
            "logprobs": None,
        },
        {"delta": {"content": "b "}, "index": 0, "finish_reason": None, "logprobs": None},
        {"delta": {"content": "c "}, "index": 0, "finish_reason": None, "logprobs": None},
        {"delta": {}, "index": 0, "finish_reason": "stop", "logprobs": None},
    ]


async def test_odd_text_comes_whole() -> None:
    odd = '"\\"content":""\x85\U0001f30d\u00a0\u2029x'
    async with talking(TalkMixed) as client:
        assert text_of(await streamed(client, odd)) == odd
    async with talking(TalkText) as client:
        expected = "".join(f"{word} " for word in odd.split())
        assert text_of(await streamed(client, odd)) == expected


async def test_an_empty_stream_is_an_empty_answer() -> None:
    async with talking(TalkText) as client:
        chunks = await streamed(client, "")
        whole = await client.chat.completions.create(model="any", messages=say(""))
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("", "stop")


@pytest.mark.parametrize("entrypoint", [Talk, TalkWhole])
async def test_usage(entrypoint: type[Any]) -> None:
    async with talking(entrypoint) as client:
        whole = await client.chat.completions.create(model="any", messages=say("a b"))
        chunks = await streamed(client, "a b", stream_options={"include_usage": True})
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 2, 5)
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 1
    assert chunks[-1].choices == []
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])


async def test_text_with_an_end_of_its_own() -> None:
    async with talking(TalkMixed) as client:
        chunks = await streamed(client, "hello", stream_options={"include_usage": True})
        whole = await client.chat.completions.create(model="any", messages=say("hello"))
    assert text_of(chunks) == whole.choices[0].message.content == "hello"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None, "length"]
    assert chunks[-1].usage is not None
    assert whole.choices[0].finish_reason == "length"


async def test_several_choices() -> None:
    async with talking(Talk) as client:
        whole = await client.chat.completions.create(model="any", messages=say("a b"), n=2)
        chunks = await streamed(client, "a b", n=2)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(0, "a b "), (1, "a b ")]
    assert text_of(chunks, 0) == text_of(chunks, 1) == "a b "
    ends = [(choice.index, choice.finish_reason) for chunk in chunks[-2:] for choice in chunk.choices]
    assert ends == [(0, "stop"), (1, "stop")]


async def test_tools() -> None:
    async with talking(Talk) as client:
        whole = await client.chat.completions.create(model="any", messages=say("/tool"))
        chunks = await streamed(client, "/tool")
        async with client.chat.completions.stream(model="any", messages=say("/tool")) as stream:
            final = await stream.get_final_completion()
    for answer in (whole, final):
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert [
            (call.id, call.type, call.function.name, call.function.arguments)
            for call in choice.message.tool_calls or ()
            if call.type == "function"
        ] == [("call_a", "function", "weather", '{"city": "Oslo"}'), ("call_b", "function", "clock", "{}")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_tools_of_a_whole_answer_are_streamed() -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with talking(TalkWhole) as client:
        chunks = await streamed(client, "x", tools=[tool], tool_choice="auto")
    calls = chunks[0].choices[0].delta.tool_calls
    assert calls is not None
    assert calls[0].function is not None
    assert (calls[0].index, calls[0].id, calls[0].function.name) == (0, "call_a", "weather")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_parts_of_a_message() -> None:
    parts: Any = [
        {"type": "text", "text": "see "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "text", "text": "this"},
    ]
    async with talking(TalkPlain) as client:
        answer = await client.chat.completions.create(
            model="any",
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "user", "content": parts},
            ],
            response_format={"type": "json_object"},
            stop=["x"],
            extra_body={"top_k": 3},
        )
    assert answer.choices[0].message.content == "SEE THIS"


async def test_the_synchronous_client() -> None:
    async with serving(Talk) as served:

        def call() -> tuple[str | None, str]:
            http = openai.DefaultHttpxClient(trust_env=False)
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=http) as client:
                whole = client.chat.completions.create(model="any", messages=say("a b"))
                stream = client.chat.completions.create(model="any", messages=say("a b"), stream=True)
                return whole.choices[0].message.content, text_of(list(stream))

        assert await asyncio.to_thread(call) == ("a b ", "a b ")


# --- completions and embeddings


async def test_completions() -> None:
    async with talking(Complete) as client:
        whole = await client.completions.create(model="any", prompt=["ab", "abc"])
        tokens = await client.completions.create(model="any", prompt=[7, 8, 9, 10])
        stream = await client.completions.create(
            model="any", prompt=["ab", "abc"], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.id.startswith("cmpl-")
    assert whole.object == "text_completion"
    assert [(choice.index, choice.text, choice.finish_reason) for choice in whole.choices] == [
        (0, "2!", "length"),
        (1, "3!", "length"),
    ]
    assert tokens.choices[0].text == "4!"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 5
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "2!3!"
    assert chunks[-1].usage is not None


async def test_completions_of_plain_text() -> None:
    async with talking(CompletePlain) as client:
        whole = await client.completions.create(model="any", prompt="a")
        chunks = [chunk async for chunk in await client.completions.create(model="any", prompt="a", stream=True)]
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("<a>.", "stop")
    assert [chunk.choices[0].text for chunk in chunks] == ["<a>", ".", ""]
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_embeddings() -> None:
    async with talking(Measure) as client, serving(Measure) as served:
        by_default = await client.embeddings.create(model="any", input=["a", "abc"])  # asks for base64
        floats = await client.embeddings.create(model="any", input="ab", encoding_format="float")
        tokens = await client.embeddings.create(model="any", input=[[1, 2], [3]])
        raw = (await served.http.post("/v1/embeddings", json={"input": "ab", "encoding_format": "base64"})).json()
    assert [(item.index, item.embedding) for item in by_default.data] == [(0, [1.0, 0.5]), (1, [3.0, 0.5])]
    assert floats.data[0].embedding == [2.0, 0.5]
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == 1
    assert [item.embedding[0] for item in tokens.data] == [2.0, 1.0]
    assert struct.unpack("<2f", base64.b64decode(raw["data"][0]["embedding"])) == (2.0, 0.5)
    assert (raw["object"], raw["data"][0]["object"], raw["model"]) == ("list", "embedding", "measure-1")


async def test_plain_vectors() -> None:
    async with talking(MeasurePlain) as client:
        answer = await client.embeddings.create(model="any", input=["a"], encoding_format="float")
        assert answer.data[0].embedding == [1.0]
        with pytest.raises(openai.InternalServerError, match="JSON can't hold"):
            await client.embeddings.create(model="any", input=["nan"], encoding_format="float")


# --- models


async def test_models() -> None:
    async with talking(Several) as client:
        listed = [model async for model in client.models.list()]
        one = await client.models.retrieve("Unit Talk")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("meta/llama")
    assert [model.id for model in listed] == ["Several", "Unit Talk", "Complete", "measure-1"]
    assert (one.id, one.object, one.owned_by) == ("Unit Talk", "model", "Several")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


async def test_a_chainlet_may_name_the_models_that_it_is() -> None:
    async with talking(TalkTokens) as client:
        assert [model.id for model in (await client.models.list()).data] == ["base", "lora-a"]
        assert (await client.models.retrieve("lora-a")).id == "lora-a"
        for name in ("base", "lora-a"):
            answer = await client.chat.completions.create(model=name, messages=say("a"))
            assert (answer.model, answer.choices[0].message.content) == (name, f"{name} a ")
        for name in ("TalkTokens", "other"):
            with pytest.raises(openai.NotFoundError, match="there are `base`, `lora-a`"):
                await client.chat.completions.create(model=name, messages=say("a"))


async def test_tokens_are_given_to_those_who_ask_for_them() -> None:
    async with talking(TalkTokens) as client:
        asked = {"return_token_ids": True}
        for extra, expected in ((asked, [98, 97, 115, 101, 97, 98]), ({}, None)):
            stream = await client.chat.completions.create(
                model="base", messages=say("a b"), stream=True, extra_body=extra
            )
            chunks = [chunk.model_dump(exclude_unset=True) async for chunk in stream]
            ids = [each for chunk in chunks for c in chunk["choices"] for each in c.get("token_ids") or ()]
            assert (ids or None) == expected
            assert chunks[0].get("prompt_token_ids") == ([7, 8] if extra else None)
            whole = await client.chat.completions.create(model="base", messages=say("a b"), extra_body=extra)
            said = whole.model_dump(exclude_unset=True)
            assert said["choices"][0].get("token_ids") == expected
            assert said.get("prompt_token_ids") == ([7, 8] if extra else None)
            assert ("token_ids" in said["choices"][0]) == bool(extra), "and there is no null"
    async with talking(CompleteTokens) as client:
        for extra in (asked, {}):
            text = await client.completions.create(model="any", prompt="ab", extra_body=extra)
            choice = text.choices[0].model_dump(exclude_unset=True)
            assert choice.get("token_ids") == ([97, 98] if extra else None)
            assert choice.get("prompt_token_ids") == ([7, 8] if extra else None)


async def test_requests_of_one_prompt_cache_key_go_to_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(TalkText) as served, client_of(served) as client:
        seen: list[bytes | None] = []
        inner = served.caller.open

        async def noting(topic: str, arguments: bytes, scope: Any, *rest: Any, **options: Any) -> Any:
            seen.append(scope.affinity)
            return await inner(topic, arguments, scope, *rest, **options)

        monkeypatch.setattr(served.caller, "open", noting)
        for key in ("a" * 1000, "a" * 1000, "b"):
            await client.chat.completions.create(model="any", messages=say("a"), prompt_cache_key=key)
        await client.chat.completions.create(
            model="any", messages=say("a"), prompt_cache_key="b", extra_headers={"chains-affinity-key": "mine"}
        )
        await client.chat.completions.create(model="any", messages=say("a"))
    first, second, third, given, none = seen
    assert first == second != third
    assert all(key is not None and len(key) <= 256 for key in (first, third))
    assert (given, none) == (b"mine", None)


async def test_a_model_is_chosen_by_its_name() -> None:
    async with talking(Several) as client:
        chat, said = client.chat.completions, say("5")
        assert (await chat.create(model="Several", messages=said)).choices[0].message.content == "several: 5"
        assert (await chat.create(model="Unit Talk", messages=said)).choices[0].message.content == "5 m"
        ours = await chat.create(model="TalkUnit", messages=said, extra_body={"unit": "km"})
        assert ours.choices[0].message.content == "5 km"
        assert (await client.completions.create(model="gpt-3.5", prompt="ab")).choices[0].text == "2!"
        with pytest.raises(openai.NotFoundError, match="`Several`, `Unit Talk`") as wrong:
            await chat.create(model="gpt-4o", messages=said)
        with pytest.raises(openai.BadRequestError):
            await chat.create(model=7, messages=said)  # type: ignore[call-overload] # the mistake under test
    assert (wrong.value.code, wrong.value.param, wrong.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


async def test_what_is_not_served_is_said_so() -> None:
    async with serving(Talk) as served, client_of(served) as client:
        with pytest.raises(openai.NotFoundError, match="no such route"):
            await client.embeddings.create(model="any", input="a")
        wrong = await served.http.get(CHAT)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["code"] == "method_not_allowed"
    async with serving(Greet) as served:
        for path in ("/v1/models", "/v1/chat/completions"):
            response = await served.http.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


# --- failures


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"model": "m" * 2000}, "model"),
        ({"messages": say("x"), "n": 0}, "n"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
    ],
)
async def test_a_wrong_field_is_named(change: dict[str, Any], param: str) -> None:
    async with talking(Talk) as client:
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(**({"model": "any", "messages": say("x")} | change))
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"
    assert error.value.code == "invalid_argument"
    assert error.value.request_id


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": "x"}', b"[" * 5000])
async def test_a_body_that_is_no_request(body: bytes) -> None:
    for entrypoint in (Talk, Several):
        async with serving(entrypoint, workers=False) as served:
            response = await served.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 404)
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"]["message"]


async def test_errors_of_the_chain() -> None:
    async with talking(TalkFailing) as client:
        with pytest.raises(openai.InternalServerError, match="the engine broke") as broken:
            await client.chat.completions.create(model="any", messages=say("x"))
        with pytest.raises(openai.RateLimitError, match="the queue is full") as busy:
            await client.chat.completions.create(model="any", messages=say("/overloaded"))
        with pytest.raises(openai.InternalServerError) as final:
            await client.chat.completions.create(model="any", messages=say("/final"), stream=True)
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model="any", messages=say("/long"))
    assert (broken.value.type, broken.value.code) == ("server_error", "remote")
    assert "x-should-retry" not in broken.value.response.headers
    assert busy.value.response.headers["retry-after"] == "7"
    assert (busy.value.type, busy.value.code) == ("rate_limit_error", "overloaded")
    assert final.value.response.headers["x-should-retry"] == "false"
    assert wrong.value.param == "messages"


async def test_keys() -> None:
    key, entry = new_key("ada")
    async with serving(Talk, api_keys=str(entry)) as served:
        async with client_of(served, key) as client:
            answer = await client.chat.completions.create(model="any", messages=say("a"))
            assert answer.choices[0].message.content == "a "
            assert [model.id async for model in client.models.list()] == ["Talk"]
        async with client_of(served, "ck_wrong") as client:
            with pytest.raises(openai.AuthenticationError) as error:
                await client.chat.completions.create(model="any", messages=say("a"))
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        document = (await served.http.get("/openapi.json")).json()
    assert (error.value.type, error.value.code) == ("authentication_error", "unauthorized")
    OpenAPIV31SpecValidator(document).validate()
    refused = document["paths"][CHAT]["post"]["responses"]["401"]["content"]
    schema = {**refused["application/json"]["schema"], "components": document["components"]}
    jsonschema.validate(error.value.response.json(), schema)


async def test_a_gateway_that_is_full() -> None:
    async with serving(Talk, max_requests=1) as served, client_of(served) as client:
        stream = await client.chat.completions.create(model="any", messages=say("/hang"), stream=True)
        with pytest.raises(openai.RateLimitError, match="CHAINS_MAX_REQUESTS") as error:
            await client.chat.completions.create(model="any", messages=say("x"))
        assert error.value.response.headers["retry-after"] == "1"
        Seen.note("go")
        assert text_of([chunk async for chunk in stream]) == "first"


async def test_an_error_before_the_first_chunk_has_its_status() -> None:
    async with talking(Talk) as client:
        with pytest.raises(openai.InternalServerError, match="the engine is cold"):
            await client.chat.completions.create(model="any", messages=say("/refuse"), stream=True)


async def test_an_error_in_mid_stream() -> None:
    async with serving(Talk) as served, client_of(served) as client:
        stream = await client.chat.completions.create(model="any", messages=say("/fail"), stream=True)
        assert (await anext(stream)).choices[0].delta.content == "half"
        with pytest.raises(openai.APIError, match="the engine broke") as error:
            await anext(stream)
        assert (error.value.code, error.value.type) == ("remote", "server_error")
        response = await served.http.post(CHAT, json={"messages": say("/fail"), "stream": True})
        assert "[DONE]" not in response.text
        with pytest.raises(openai.InternalServerError, match="the engine broke"):
            await client.chat.completions.create(model="any", messages=say("/fail"))


@pytest.mark.parametrize("how", ["streamed", "whole"])
async def test_a_client_that_leaves_stops_the_chainlet(how: str) -> None:
    async with talking(Talk) as client:
        if how == "streamed":
            answer = await client.chat.completions.create(model="any", messages=say("/hang"), stream=True)
            await anext(aiter(answer))
            await Seen.until("hangs")
            await answer.close()
        else:
            waiting = asyncio.create_task(client.chat.completions.create(model="any", messages=say("/hang")))
            await Seen.until("hangs")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await Seen.until("stopped")
    assert not Seen.counts["go"]


async def test_a_gathered_answer_is_bounded() -> None:
    async with talking(Talk, max_buffered_bytes=200_000, max_body_bytes=200_000) as client:
        with pytest.raises(openai.RateLimitError, match="CHAINS_MAX_BUFFERED_BYTES"):
            await client.chat.completions.create(model="any", messages=say("x " * 2_000), n=4)


async def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT", 0.05)
    async with serving(Talk) as served:
        body = {"messages": say("/hang"), "stream": True}
        async with served.http.stream("POST", CHAT, json=body) as response:
            lines = response.aiter_lines()
            while await anext(lines) != ":":
                pass
            Seen.note("go")
            rest = [line async for line in lines]
        assert rest[-2:] == ["data: [DONE]", ""]
        async with client_of(served) as client:
            stream = await client.chat.completions.create(model="any", messages=say("/hang"), stream=True)
            assert text_of([chunk async for chunk in stream]) == "first"


@pytest.mark.parametrize("how", ["streamed", "whole"])
async def test_an_idempotency_key(how: str) -> None:
    more: Any = {"extra_headers": {"idempotency-key": "order-1"}, "model": "any", "stream": how == "streamed"}
    async with talking(TalkCounting) as client:
        ids, said = set(), set()
        for _ in range(2):
            answer = await client.chat.completions.create(messages=say("go"), **more)
            if how == "streamed":
                chunks = [chunk async for chunk in answer]
                ids.add(chunks[0].id)
                said.add(text_of(chunks))
            else:
                ids.add(answer.id)
                said.add(answer.choices[0].message.content)
        with pytest.raises(openai.UnprocessableEntityError):
            await client.chat.completions.create(messages=say("stop"), **more)
    assert said == {"run 1"}
    assert len(ids) == 1


# --- the document, and the example


async def test_the_openapi_document() -> None:
    async with serving(Several, workers=False) as served:
        document = (await served.http.get("/openapi.json")).json()
        error = (await served.http.post(CHAT, json={"messages": []})).json()
        models = (await served.http.get("/v1/models")).json()
    OpenAPIV31SpecValidator(document).validate()
    paths = document["paths"]
    assert [path for path in paths if path.startswith("/v1/")] == [
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{id}",
    ]

    def check(value: Any, schema: dict[str, Any]) -> None:
        jsonschema.validate(value, {**schema, "components": document["components"]})

    operation = paths[CHAT]["post"]
    request = operation["requestBody"]["content"]["application/json"]["schema"]
    check({"model": "m", "messages": say("x"), "stop": "a", "unit": "km"}, request)
    with pytest.raises(jsonschema.ValidationError):
        check({"model": "m", "messages": []}, request)
    check(error, operation["responses"]["400"]["content"]["application/json"]["schema"])
    check(models, paths["/v1/models"]["get"]["responses"]["200"]["content"]["application/json"]["schema"])
    async with serving(TalkWhole) as served:
        answer = (await served.http.post(CHAT, json={"messages": say("x")})).json()
    check(answer, operation["responses"]["200"]["content"]["application/json"]["schema"])
    async with serving(Greet, workers=False) as served:
        assert "/v1/models" not in (await served.http.get("/openapi.json")).json()["paths"]


async def test_the_example() -> None:
    told: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "The office opens at nine. Parking is behind the house. Lunch is at noon."},
        {"role": "user", "content": "When does the office open?"},
    ]
    async with talking(Answer) as client:
        whole = await client.chat.completions.create(model="extract", messages=told)
        cut = await client.chat.completions.create(model="extract", messages=told, max_tokens=2)
        stopped = await client.chat.completions.create(model="extract", messages=told, stop=" at")
        stream = await client.chat.completions.create(
            model="extract", messages=told, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        unknown = await client.chat.completions.create(model="extract", messages=say("Who are you?"))
        vectors = (await client.embeddings.create(model="hash", input=["a b", "b a"], dimensions=8)).data
        with pytest.raises(openai.BadRequestError) as too_many:
            await client.embeddings.create(model="hash", input="a", dimensions=10**9)
    assert whole.choices[0].message.content == text_of(chunks) == "The office opens at nine."
    assert whole.usage is not None
    assert whole.usage == chunks[-1].usage
    assert whole.usage.completion_tokens == 5
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 5
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("The office", "length")
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("The office opens", "stop")
    assert unknown.choices[0].message.content == UNKNOWN
    assert too_many.value.param == "dimensions"
    assert vectors[0].embedding == vectors[1].embedding
    assert len(vectors[0].embedding) == 8
