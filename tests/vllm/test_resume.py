"""A stream whose worker was lost goes on as if nothing had happened, wherever it broke off."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

import chains_stream as chains
from chainlets.vllm_answers import chat
from chainlets.vllm_core import Engine
from chainlets.vllm_frontend import Frontend
from chainlets.vllm_resume import continuing
from chains_stream import openai
from tests.vllm import tiny
from tests.vllm.serving import (
    Delta,
    Sampling,
    Served,
    choices_of,
    collected,
    content_of,
    metric,
    run,
    said,
    text_of,
    tokens_of,
    until,
    written,
)

PROMPT = "Once upon a time"
LENGTH = 32
TORN = [0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xA6, 0x9C]  # the bytes of é, € and a parrot


def logprobs_of(deltas: Sequence[Delta]) -> list[float]:
    return [its.logprob for delta in deltas for its in delta.logprobs or ()]


def counts_of(deltas: Sequence[Delta]) -> tuple[int, int]:
    usage = deltas[-1].usage
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens


async def assert_all_cuts(served: Served, sampling: Sampling) -> list[Delta]:
    """Assert that a text is the same wherever it breaks off, and give it."""
    whole: list[Delta] = await run(served.own_generate, PROMPT, sampling)
    cuts = range(1, len(whole))
    rests = await asyncio.gather(*(run(served.own_generate, PROMPT, sampling, emitted=whole[:cut]) for cut in cuts))
    text, tokens = written(whole)
    for cut, rest in zip(cuts, rests, strict=True):
        again = [*whole[:cut], *rest]
        assert written(again) == (text, tokens), f"broke off after {cut} chunks"
        assert again[-1].finish_reason == whole[-1].finish_reason
        assert logprobs_of(again) == pytest.approx(logprobs_of(whole), abs=1e-3)
        assert counts_of(again) == counts_of(whole)
    return whole


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "frequency_penalty": 0.8, "presence_penalty": 0.4, "repetition_penalty": 1.2},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "min_tokens": 20},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 11, "top_p": 0.8, "top_k": 50, "min_p": 0.02},
        {"temperature": 1.2, "seed": 2, "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"temperature": 1.0, "seed": 3, "allowed_token_ids": TORN},
        {"temperature": 1.0, "seed": 4, "allowed_token_ids": TORN, "logit_bias": {0xC3: 3.0, 0xA9: 3.0}},
    ],
    ids=",".join,
)
async def test_a_text_is_the_same_wherever_it_broke_off(served: Served, fields: dict[str, Any]) -> None:
    whole = await assert_all_cuts(served, Sampling(max_tokens=LENGTH, **fields))
    assert len(whole) > LENGTH // 2
    if "seed" in fields and "logit_bias" not in fields:
        bare = await served.bare(PROMPT, max_tokens=LENGTH, **fields)
        assert written(whole) == (bare.text, list(bare.token_ids))


async def test_seeds_go_on_beside_each_other(served: Served) -> None:
    many = [Sampling(max_tokens=LENGTH, temperature=1.0, seed=seed) for seed in range(12)]
    wholes = await asyncio.gather(*(run(served.own_generate, PROMPT, sampling) for sampling in many))
    again = await asyncio.gather(
        *(
            run(served.own_generate, PROMPT, sampling, emitted=whole[: 1 + number])
            for number, (sampling, whole) in enumerate(zip(many, wholes, strict=True))
        )
    )
    for number, (whole, rest) in enumerate(zip(wholes, again, strict=True)):
        assert written([*whole[: 1 + number], *rest]) == written(whole)


async def test_a_stop_may_lie_across_the_break(served: Served) -> None:
    text, _ = written(await run(served.own_generate, PROMPT, Sampling(temperature=0, max_tokens=LENGTH)))
    for stop, included in ((text[10:15], False), (text[20:27], True)):
        sampling = Sampling(temperature=0, max_tokens=LENGTH, stop=[stop], include_stop_str_in_output=included)
        whole = await assert_all_cuts(served, sampling)
        assert written(whole)[0] == text[: text.index(stop)] + (stop if included else "")
        assert whole[-1].finish_reason == "stop"
    # The engine knows nothing of such a stop, and is told that the text has ended.
    await until(lambda: not metric("vllm:num_requests_running"), "nothing runs any more")


async def test_a_stop_token_ends_what_goes_on(served: Served) -> None:
    _, tokens = written(await run(served.own_generate, PROMPT, Sampling(temperature=0, max_tokens=LENGTH)))
    sampling = Sampling(temperature=0, max_tokens=LENGTH, stop_token_ids=[tokens[20]])
    whole = await assert_all_cuts(served, sampling)
    assert whole[-1].finish_reason == "stop"


async def test_bad_words_may_lie_across_the_break(served: Served) -> None:
    text, _ = written(await run(served.own_generate, PROMPT, Sampling(temperature=0, max_tokens=LENGTH)))
    bad = next(text[at : at + 3] for at in range(10, 20) if text[at : at + 3].isascii())
    whole = await assert_all_cuts(served, Sampling(temperature=0, max_tokens=LENGTH, bad_words=[bad]))
    assert bad not in written(whole)[0] != text


async def test_without_a_seed_it_goes_on_to_the_same_length(served: Served) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=LENGTH)
    whole = await run(served.own_generate, PROMPT, sampling)
    rest = await run(served.own_generate, PROMPT, sampling, emitted=whole[:10])
    assert len(written([*whole[:10], *rest])[1]) == LENGTH
    assert rest[-1].usage.completion_tokens == LENGTH


async def test_choices_of_a_conversation_go_on_each_where_it_was(served: Served) -> None:
    request = said("Hello", temperature=1.0, seed=9, n=3, max_tokens=20)
    whole = await run(served.own_chat, request)
    for cut in (1, 2, 7, 25, len(whole) - 2, len(whole) - 1):
        again = [*whole[:cut], *await run(served.own_chat, request, emitted=whole[:cut])]
        for index in range(3):
            assert content_of(again, index) == content_of(whole, index)
            assert [bool(choice.finish_reason) for choice in choices_of(again, index)].count(True) == 1
        assert again[-1].usage.completion_tokens == 60
        assert again[-1].usage.prompt_tokens == whole[-1].usage.prompt_tokens
    assert await run(served.own_chat, request, emitted=whole) == []


async def test_offsets_of_an_echoed_completion_go_on(served: Served) -> None:
    request = openai.CompletionRequest(
        prompt=["One", "Two"], temperature=0, max_tokens=10, echo=True, logprobs=1, allowed_token_ids=[*range(97, 123)]
    )
    whole = await run(served.own_completions, request)
    for cut in (1, 2, 3, 8, len(whole) - 1):
        again = [*whole[:cut], *await run(served.own_completions, request, emitted=whole[:cut])]
        for index in range(2):
            assert text_of(again, index) == text_of(whole, index)
            offsets = [offset for choice in choices_of(again, index) for offset in choice.logprobs.text_offset]
            assert offsets == list(range(13))


async def test_a_call_of_a_tool_goes_on_in_its_arguments(served: Served) -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "the sea and the sky"}}\n</tool_call>'
    tools = [openai.Tool(openai.FunctionDefinition("look", parameters={"type": "object"}))]
    forced = said("Look!", temperature=0, tools=tools, structured_outputs={"choice": [call]})
    whole = await run(served.own_chat, forced)
    begun = next(
        number for number, text in enumerate(arguments_of(whole[:n]) for n in range(len(whole))) if "the s" in text
    )
    free = said("Look!", temperature=0, tools=tools, max_tokens=len(tokens_of(whole[:begun])) + 5)
    rest = await run(served.own_chat, free, emitted=whole[:begun])
    assert arguments_of(rest)
    assert content_of(rest) == ""


def arguments_of(chunks: Sequence[openai.ChatCompletionChunk]) -> str:
    calls = [call for choice in choices_of(chunks) for call in choice.delta.tool_calls or ()]
    return "".join(call.function.arguments or "" for call in calls if call.function)


async def test_who_had_thought_goes_on_with_the_answer(served: Served) -> None:
    own = served.own_chat.engine
    given = served.config.model_copy(update={"reasoning_parser": "deepseek_r1"})
    thinking = Engine(given, own._core, Frontend(own.llm, given))
    request = said("Hello", temperature=0, max_tokens=10)
    for sent, said_now in (([*b"hm", tiny.THOUGHT, *b"so"], "content"), ([*b"hmm"], "reasoning_content")):
        emitted = [openai.ChatCompletionChunk.of("") for _ in sent]
        for chunk, token in zip(emitted, sent, strict=True):
            chunk.choices[0].token_ids = [token]
        rest = await collected(chat(thinking, request, (), emitted))
        found = {
            name
            for choice in choices_of(rest)
            for name in ("content", "reasoning_content")
            if getattr(choice.delta, name)
        }
        assert found == {said_now}
        assert rest[-1].usage.completion_tokens == 10
        assert rest[-1].usage.completion_tokens_details is not None


async def test_an_answer_that_is_held_to_a_grammar_does_not_go_on(served: Served) -> None:
    sampling = Sampling(temperature=0, max_tokens=LENGTH, structured_outputs={"regex": "[a-z]{20}"})
    whole = await run(served.own_generate, PROMPT, sampling)
    with pytest.raises(chains.StreamInterruptedError, match="held to a grammar"):
        await run(served.own_generate, PROMPT, sampling, emitted=whole[:3])


@dataclass(frozen=True)
class Sampler:
    """A sampler as of an engine that can't be started here."""

    continues: bool = False
    by_position: bool = False
    speculative: bool = False


GPU = Sampler(by_position=True)
GUESSING = Sampler(by_position=True, speculative=True)


@pytest.mark.parametrize(
    ("sampler", "fields", "reason"),
    [
        (GPU, {"seed": 1}, None),
        (GPU, {"repetition_penalty": 1.2, "temperature": 0}, None),
        (GPU, {"frequency_penalty": 1.0, "temperature": 0}, "penalties"),
        (GPU, {"bad_words": ["no"], "temperature": 0}, "bad words"),
        (GUESSING, {"temperature": 0}, None),
        (GUESSING, {"seed": 1, "temperature": 0}, None),
        (GUESSING, {"seed": 1}, "speculative decoding"),
        (Sampler(), {"seed": 1}, "seed"),
    ],
)
def test_other_samplers_go_on_where_the_rest_is_the_same(
    sampler: Sampler, fields: dict[str, Any], reason: str | None
) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=10, min_tokens=4, stop=["."], **fields)
    if reason is None:
        found = continuing(params, 3, sampler)
        assert (found.max_tokens, found.min_tokens, found.stop, found.seed) == (7, 1, [], params.seed)
        assert not found.extra_args
    else:
        with pytest.raises(chains.StreamInterruptedError, match=reason):
            continuing(params, 3, sampler)
    assert continuing(params, 0, sampler) is params


async def test_chunks_without_tokens_are_nothing_to_go_on_from(served: Served) -> None:
    request = said("Hello", temperature=0, max_tokens=10)
    emitted = [openai.ChatCompletionChunk.of("He")]
    with pytest.raises(chains.StreamInterruptedError, match="no token_ids"):
        await run(served.own_chat, request, emitted=emitted)


async def test_chunks_can_be_read_back_as_they_were_sent(served: Served) -> None:
    whole = await run(served.own_chat, said("Hello", temperature=0, max_tokens=5, logprobs=True))
    encoded = msgspec.msgpack.encode(whole)
    assert msgspec.msgpack.decode(encoded, type=list[openai.ChatCompletionChunk]) == whole
