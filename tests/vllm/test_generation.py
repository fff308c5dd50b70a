"""What clients get of a real vLLM is what the bare engine gives, token for token, whatever they ask for."""

import asyncio
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest

import chains_stream as chains
from chains_stream import openai
from tests.vllm.serving import (
    ADAPTER,
    MAX_LENGTH,
    SEQUENCES,
    SERVED,
    Sampling,
    Served,
    choices_of,
    collected,
    content_of,
    metric,
    said,
    text_of,
    tokens_of,
    written,
)

LETTERS = [*range(ord("a"), ord("z") + 1)]  # what they are of is no matter, but each is a character


def rendered(served: Served, request: openai.ChatCompletionRequest) -> list[int]:
    """Give the tokens of a conversation as transformers renders it."""
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    tokenizer = served.llm.renderer.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text))


def completion(prompt: Any, **fields: Any) -> openai.CompletionRequest:
    return openai.CompletionRequest(prompt=prompt, **fields)


async def test_64_conversations_at_once_are_those_of_the_bare_engine_token_for_token(served: Served) -> None:
    requests = [said(f"Tell me about {number}", temperature=0, max_tokens=60) for number in range(SEQUENCES)]
    answers = await asyncio.gather(*(collected(served.chat.run_remote(request)) for request in requests))
    for request, chunks in zip(requests, answers, strict=True):
        prompt = rendered(served, request)
        bare = await served.bare(prompt, temperature=0, max_tokens=60)
        assert tokens_of(chunks) == list(bare.token_ids)
        assert content_of(chunks) == bare.text
        assert choices_of(chunks)[-1].finish_reason == "length"
        usage = chunks[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 60)


async def test_an_answer_takes_what_is_left_of_the_context(served: Served) -> None:
    chunks = await collected(served.chat.run_remote(said("Go on", temperature=0)))
    assert chunks[-1].usage.total_tokens == MAX_LENGTH
    deltas = await collected(served.generate.run_remote("Go on", Sampling(temperature=0)))
    assert deltas[-1].usage.total_tokens == MAX_LENGTH


async def test_a_completion_is_as_long_as_in_openai_s_api_by_default(served: Served) -> None:
    chunks = await collected(served.completions.run_remote(completion("Once", temperature=0)))
    assert len(tokens_of(chunks)) == 16


async def test_a_seed_gives_the_text_that_it_gives_the_bare_engine(served: Served) -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "seed": 7,
        "max_tokens": 40,
    }
    bare = await served.bare("Once", **sampling)
    for _ in range(2):
        deltas = await collected(served.generate.run_remote("Once", Sampling(**sampling)))
        assert written(deltas) == (bare.text, list(bare.token_ids))


async def test_choices_are_those_of_the_bare_engine_and_their_prompt_counts_once(served: Served) -> None:
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 30, "n": 4}
    bare = sorted(await served.bare("Once", **sampling), key=lambda output: output.index)
    chunks = await collected(served.completions.run_remote(completion("Once", **sampling)))
    for index, output in enumerate(bare):
        assert tokens_of(chunks, index) == list(output.token_ids)
    assert len({text_of(chunks, index) for index in range(4)}) == 4
    assert chunks[-1].usage.prompt_tokens == 4
    assert chunks[-1].usage.completion_tokens == 120


async def test_several_prompts_are_several_choices(served: Served) -> None:
    prompts = ["One", "Two", "Three"]
    chunks = await collected(served.completions.run_remote(completion(prompts, temperature=0, n=2, max_tokens=10)))
    for number, prompt in enumerate(prompts):
        bare = await served.bare(prompt, temperature=0, max_tokens=10)
        assert tokens_of(chunks, 2 * number) == tokens_of(chunks, 2 * number + 1) == list(bare.token_ids)
    assert chunks[-1].usage.prompt_tokens == sum(map(len, prompts))


async def test_tokens_are_taken_for_a_prompt(served: Served) -> None:
    tokens = served.tokens("Once")
    bare = await served.bare(tokens, temperature=0, max_tokens=10)
    chunks = await collected(served.completions.run_remote(completion(tokens, temperature=0, max_tokens=10)))
    assert text_of(chunks) == bare.text
    deltas = await collected(served.generate.run_remote(tokens, Sampling(temperature=0, max_tokens=10)))
    assert written(deltas)[0] == bare.text


async def test_a_stop_ends_the_text_before_it_or_behind_it(served: Served) -> None:
    whole = (await served.bare("Once", temperature=0, max_tokens=60)).text
    stop = whole[20:23]
    before = whole[: whole.index(stop)]
    chunks = await collected(served.completions.run_remote(completion("Once", temperature=0, max_tokens=60, stop=stop)))
    assert text_of(chunks) == before
    assert choices_of(chunks)[-1].finish_reason == "stop"
    request = completion("Once", temperature=0, max_tokens=60, stop=[stop], include_stop_str_in_output=True)
    assert text_of(await collected(served.completions.run_remote(request))) == before + stop


async def test_a_token_may_be_a_stop_but_not_before_the_least_number_of_tokens(served: Served) -> None:
    tokens = list((await served.bare("Once", temperature=0, max_tokens=40)).token_ids)
    stop = tokens[10]
    at = tokens.index(stop)
    request = completion("Once", temperature=0, max_tokens=40, stop_token_ids=[stop])
    chunks = await collected(served.completions.run_remote(request))
    assert len(tokens_of(chunks)) == at + 1
    assert choices_of(chunks)[-1].finish_reason == "stop"
    request = completion("Once", temperature=0, max_tokens=40, stop_token_ids=[stop], min_tokens=at + 5)
    assert len(tokens_of(await collected(served.completions.run_remote(request)))) >= at + 5


async def test_what_may_be_written_is_the_client_s_to_say(served: Served) -> None:
    allowed = served.tokens("abc")
    request = completion("Once", temperature=1.0, max_tokens=20, allowed_token_ids=allowed)
    assert set(text_of(await collected(served.completions.run_remote(request)))) <= set("abc")
    request = completion("Once", temperature=0, max_tokens=5, logit_bias={str(ord("z")): 100.0})
    assert text_of(await collected(served.completions.run_remote(request))) == "zzzzz"
    deltas = await collected(
        served.generate.run_remote("Once", Sampling(temperature=0, max_tokens=5, logit_bias={ord("q"): 100}))
    )
    assert written(deltas)[0] == "qqqqq"
    end = {"258": 100.0}
    request = completion("Once", temperature=0, max_tokens=5, logit_bias=end)
    assert len(tokens_of(await collected(served.completions.run_remote(request)))) == 1
    request = completion("Once", temperature=0, max_tokens=5, logit_bias=end, ignore_eos=True)
    assert len(tokens_of(await collected(served.completions.run_remote(request)))) == 5


async def test_characters_of_several_bytes_are_never_torn(served: Served) -> None:
    text = "Grüße, 世界! 🦜🦜"
    request = completion("Once", temperature=0, max_tokens=60, structured_outputs={"choice": [text]})
    chunks = await collected(served.completions.run_remote(request))
    assert text_of(chunks) == text
    assert "�" not in "".join(choice.text for choice in choices_of(chunks))
    assert len(tokens_of(chunks)) >= len(text.encode())


async def test_logprobs_are_those_of_the_bare_engine(served: Served) -> None:
    bare = await served.bare("Once", temperature=0, max_tokens=10, logprobs=3, allowed_token_ids=LETTERS)
    request = completion("Once", temperature=0, max_tokens=10, logprobs=3, allowed_token_ids=LETTERS)
    chunks = await collected(served.completions.run_remote(request))
    found = [choice.logprobs for choice in choices_of(chunks)]
    values = [value for its in found for value in its.token_logprobs]
    own = [here[token].logprob for token, here in zip(bare.token_ids, bare.logprobs, strict=True)]
    assert values == pytest.approx(own, abs=1e-4)
    offsets = [offset for its in found for offset in its.text_offset]
    assert offsets == list(range(10))
    assert all(1 <= len(top) <= 3 for its in found for top in its.top_logprobs)  # some may have the same text
    sampling = Sampling(temperature=0, max_tokens=10, logprobs=0, allowed_token_ids=LETTERS)
    deltas = await collected(served.generate.run_remote("Once", sampling))
    assert [its.logprob for delta in deltas for its in delta.logprobs] == pytest.approx(own, abs=1e-4)


async def test_logprobs_of_a_conversation_name_the_likeliest_first(served: Served) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 1, "max_tokens": 10, "allowed_token_ids": LETTERS}
    request = said("Hello", logprobs=True, top_logprobs=4, **fields)
    chunks = await collected(served.chat.run_remote(request))
    found = [its for choice in choices_of(chunks) for its in choice.logprobs.content]
    assert "".join(its.token for its in found) == content_of(chunks)
    assert all(len(its.top_logprobs) == 4 for its in found)
    assert all(one.logprob >= next_.logprob for its in found for one, next_ in pairwise(its.top_logprobs))


async def test_a_prompt_is_echoed_with_its_logprobs(served: Served) -> None:
    sampling = {"temperature": 0, "max_tokens": 5, "allowed_token_ids": LETTERS}
    chunks = await collected(served.completions.run_remote(completion("Once upon", echo=True, logprobs=1, **sampling)))
    bare = await served.bare("Once upon", **sampling)
    assert text_of(chunks) == "Once upon" + bare.text
    assert tokens_of(chunks) == list(bare.token_ids)
    found = [choice.logprobs for choice in choices_of(chunks)]
    assert "".join(token for its in found for token in its.tokens) == "Once upon" + bare.text
    assert found[0].token_logprobs[0] is None
    assert all(value < 0 for value in found[0].token_logprobs[1:])
    assert [offset for its in found for offset in its.text_offset] == list(range(14))


async def test_tokens_of_the_prompt_are_for_who_asks_for_them(served: Served) -> None:
    request = said("Hello", temperature=0, max_tokens=3, return_token_ids=True)
    first, *others = await collected(served.chat.run_remote(request))
    assert first.prompt_token_ids == rendered(served, request)
    assert not any(isinstance(chunk.prompt_token_ids, list) for chunk in others)
    request_of_text = completion("Once", temperature=0, max_tokens=3, return_token_ids=True)
    chunks = await collected(served.completions.run_remote(request_of_text))
    assert choices_of(chunks)[0].prompt_token_ids == served.tokens("Once")


async def test_an_adapter_is_chosen_by_its_name(served: Served) -> None:
    plain, named, other = [
        await collected(served.chat.run_remote(said("Hello", temperature=0, max_tokens=20, model=model)))
        for model in ("", SERVED, ADAPTER)
    ]
    assert content_of(plain) == content_of(named) != content_of(other)
    assert tuple(type(served.own_chat).openai_models) == (SERVED, ADAPTER)
    with pytest.raises(chains.InvalidArgumentError, match=rf"no model `gpt`; there are {SERVED}, .*{ADAPTER}"):
        await collected(served.chat.run_remote(said("Hello", model="gpt")))


async def test_what_was_read_before_is_cached(served: Served) -> None:
    prompt = "A long story that is told again and again, with the same words. " * 3
    first, second = [
        await collected(served.completions.run_remote(completion(prompt, temperature=0, max_tokens=5)))
        for _ in range(2)
    ]
    assert text_of(first) == text_of(second)
    assert first[-1].usage.prompt_tokens_details.cached_tokens == 0
    assert second[-1].usage.prompt_tokens_details.cached_tokens > 100


async def test_requests_may_have_a_priority(served: Served) -> None:
    chunks = await collected(served.chat.run_remote(said("Hello", temperature=0, max_tokens=3, priority=-5)))
    assert len(tokens_of(chunks)) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "x" * MAX_LENGTH}, f"{MAX_LENGTH} tokens"),
        ({"prompt": "x" * 2 * MAX_LENGTH}, f"{MAX_LENGTH}"),
        ({"prompt": [100_000]}, "vocab"),
        ({"prompt": "x", "repetition_penalty": -1.0}, "repetition_penalty"),
        ({"prompt": "x", "top_k": -5}, "top_k"),
        ({"prompt": "x", "logprobs": 1000}, "logprobs"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"prompt": "x", "logit_bias": {"100000": 1.0}}, "vocab"),
        ({"prompt": "x", "structured_outputs": {"json": "no schema"}}, ""),
        ({"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "one kind"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
    ],
)
async def test_what_is_wrong_is_said_in_a_line(served: Served, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(chains.InvalidArgumentError, match=reason) as caught:
        await collected(served.completions.run_remote(completion(**fields)))
    assert "\n" not in str(caught.value)


async def test_who_leaves_frees_the_engine_within_a_second(served: Served) -> None:
    request = said("Hello", temperature=1.0, min_tokens=900, n=8)
    async with aclosing(served.chat.run_remote(request)) as chunks:
        await anext(chunks)
        while metric("vllm:num_requests_running") != 8:
            await anext(chunks)
        assert (metric("vllm:kv_cache_usage_perc") or 0) > 0
    begun = asyncio.get_running_loop().time()
    while metric("vllm:num_requests_running") or metric("vllm:kv_cache_usage_perc"):
        await asyncio.sleep(0.01)
        if metric("vllm:num_requests_running"):
            assert asyncio.get_running_loop().time() - begun < 1.0
        assert asyncio.get_running_loop().time() - begun < 10.0
