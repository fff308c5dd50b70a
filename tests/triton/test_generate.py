"""Language models: text that streams, what is asked of the model, and OpenAI's client in front of it."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

import chains_stream as chains
from chainlets.triton_engine import Guide, Sampling, TritonGenerate, TritonTextConfig
from chains_stream.chain import Chain
from tests.serving import serving
from tests.triton.chainlets import Chat, Generate
from tests.triton.server import ROOT, URL, WAIT, Notes

pytestmark = pytest.mark.usefixtures("triton")


class Former(TritonGenerate):
    """On a model that batches, and whose inputs have the names that they had before."""

    config = TritonTextConfig(url=URL, model="ensemble")


class Accumulating(TritonGenerate):
    config = TritonTextConfig(url=URL, model="tensorrt_llm_bls", accumulated=True)


async def generated(cls: type[TritonGenerate], prompt: str, sampling: Sampling | None = None) -> list[str]:
    async with chains.run_chain(cls) as chain:
        return [piece async for piece in chain.run_remote(prompt, sampling or Sampling())]


def asked(key: str) -> dict[str, Any]:
    """Give the inputs that the model was given."""
    inputs: dict[str, Any] = json.loads(Notes(key).lines[0])
    return inputs


@pytest.mark.parametrize("cls", [Generate, Former])
async def test_text_streams_a_token_at_a_time(cls: type[TritonGenerate]) -> None:
    assert await generated(cls, "one two three") == [" one", " two", " three"]


async def test_accumulated_text_comes_as_what_is_new() -> None:
    assert await generated(Accumulating, "one accumulating three") == [" one", " accumulating", " three"]


async def test_a_character_in_parts_comes_whole() -> None:
    pieces = await generated(Generate, "bytewise é€😀")
    assert "".join(pieces) == " bytewise é€😀"
    assert "\ufffd" not in "".join(pieces)
    pieces = await generated(Accumulating, "bytewise accumulating é€😀")
    assert "".join(pieces) == " bytewise accumulating é€😀"


async def test_the_model_gets_what_was_asked_for(key: str) -> None:
    sampling = Sampling(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_tokens=2,
        seed=2**63,
        stop=["###"],
        bad_words=["bad", "worse"],
        frequency_penalty=0.1,
        presence_penalty=0.2,
        repetition_penalty=1.1,
        ignore_eos=True,
        guide=Guide("regex", "[ab]+"),
    )
    await generated(Generate, f"hello key={key}", sampling)
    inputs = asked(key)
    for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
        inputs[name] = round(inputs[name], 6)
    assert inputs == {
        "text_input": f"hello key={key}",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_tokens": 2,
        "seed": 2**63,
        "stop_words": "###",
        "bad_words": ["bad", "worse"],
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
        "end_id": -1,
        "guided_decoding_guide_type": "regex",
        "guided_decoding_guide": "[ab]+",
        "stream": True,
        "exclude_input_in_output": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


async def test_former_names_are_used_where_a_model_has_them(key: str) -> None:
    await generated(
        Former, f"hello key={key}", Sampling(seed=5, min_tokens=1, temperature=0.5, top_p=1, stop=["a", "b"])
    )
    assert asked(key) == {
        "text_input": f"hello key={key}",
        "max_tokens": 1024,
        "random_seed": 5,
        "min_length": 1,
        "temperature": 0.5,
        "stop_words": ["a", "b"],
        "stream": True,
    }


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(top_p=0.5), "top_p"),
        (Sampling(top_k=5), "top_k"),
        (Sampling(temperature=0), "top_k"),
        (Sampling(frequency_penalty=1), "frequency_penalty"),
        (Sampling(ignore_eos=True), "end_id"),
        (Sampling(guide=Guide("json")), "guide_type"),
        (Sampling(bad_words=["bad"]), "bad_words"),
    ],
)
async def test_what_a_model_can_not_take_is_refused(sampling: Sampling, name: str) -> None:
    with pytest.raises(chains.InvalidArgumentError, match=f"model `ensemble` at .* has no input for `{name}`"):
        await generated(Former, "hello", sampling)


async def test_an_answer_ends_at_a_stop_and_the_model_with_it(key: str) -> None:
    pieces = await generated(
        Generate, f"slowly one two en dless endless key={key}", Sampling(stop=["two en", "nowhere"])
    )
    assert "".join(pieces) == " slowly one "
    await Notes(key).have("cancelled")


async def test_a_stop_may_be_kept() -> None:
    pieces = await generated(Generate, "one two three", Sampling(stop=["two"], include_stop=True))
    assert "".join(pieces) == " one two"


async def test_what_only_began_as_a_stop_comes_at_the_end() -> None:
    assert "".join(await generated(Generate, "one two", Sampling(stop=["two three"]))) == " one two"


async def test_a_model_that_breaks_is_an_error_after_what_came() -> None:
    pieces = []
    async with chains.run_chain(Generate) as chain:
        with pytest.raises(chains.ChainsError, match=r"model `tensorrt_llm_bls` at .*: the engine broke"):
            async for piece in chain.run_remote("breaking in the middle"):
                pieces.append(piece)  # noqa: PERF401 - what came before the error counts
    assert pieces == [" breaking", " in"]


async def test_a_model_for_something_else_is_told_apart() -> None:
    class NoText(TritonGenerate):
        config = TritonTextConfig(url=URL, model="doubling")

    with pytest.raises(chains.ChainsUsageError) as caught:
        async with chains.run_chain(NoText):
            pass
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "the model has no input `text_input` for the prompt",
        "the model asks for an input `x`, FP32 [1024, 1024], which has no value here",
        "the model has no output `text_output` of text; it has `y`",
    ]


# --- OpenAI's client


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def client_of(url: str) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT, http_client=http)


async def test_a_chat_streams_to_the_client(key: str) -> None:
    async with serving(Chat) as served, client_of(served.url) as client:
        stream = await client.chat.completions.create(
            model="any",
            messages=say(f"hi key={key}"),
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=50,
            temperature=0,
        )
        chunks = [chunk async for chunk in stream]
    prompt = f"system: Be brief.\nuser: hi key={key}\nassistant:"
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == " " + " ".join(
        prompt.split()
    )
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 7)
    inputs = asked(key)
    assert (inputs["text_input"], inputs["max_tokens"], inputs["top_k"]) == (prompt, 50, 1)
    assert "temperature" not in inputs


async def test_the_ready_chain_serves_a_model_on_triton() -> None:
    values = {"engine": "triton", "url": URL, "model": "tensorrt_llm_bls", "max_in_flight": "8"}
    chain = Chain.load(str(ROOT / "chainlets" / "llm.py"), values)
    assert chain.entrypoint.remote_config.compute.predict_concurrency == 8
    async with serving(chain.entrypoint) as served, client_of(served.url) as client:
        whole = await client.chat.completions.create(model="any", messages=say("hello"))
    assert whole.choices[0].message.content == " system: Be brief. user: hello assistant:"


async def test_a_chat_in_whole_and_at_its_limit() -> None:
    async with serving(Chat) as served, client_of(served.url) as client:
        whole = await client.chat.completions.create(model="any", messages=say("endless"), max_tokens=5)
        assert whole.choices[0].message.content == " system: Be brief. user: endless"
        assert whole.choices[0].finish_reason == "length"
        stopped = await client.chat.completions.create(model="any", messages=say("endless"), stop="user")
        assert stopped.choices[0].message.content == " system: Be brief. "
        assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "guide"),
    [
        ({"response_format": {"type": "json_object"}}, ("json", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
            ("json_schema", '{"type": "object"}'),
        ),
        ({"extra_body": {"structured_outputs": {"choice": ["a.b", "c"]}}}, ("regex", r"a\.b|c")),
        ({"extra_body": {"structured_outputs": {"grammar": "root ::= [0-9]+"}}}, ("ebnf_grammar", "root ::= [0-9]+")),
    ],
)
async def test_the_form_of_an_answer_is_given_to_the_model(
    fields: dict[str, Any], guide: tuple[str, str], key: str
) -> None:
    async with serving(Chat) as served, client_of(served.url) as client:
        await client.chat.completions.create(model="any", messages=say(f"hi key={key}"), **fields)
    inputs = asked(key)
    assert (inputs["guided_decoding_guide_type"], inputs["guided_decoding_guide"]) == guide


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"n": 2}, "`n`"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"min_p": 0.5}}, "min_p"),
        ({"extra_body": {"structured_outputs": {"shape": "round"}}}, "structured_outputs"),
        ({"extra_body": {"chat_template": "{{ messages }}"}}, "chat_template"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)
async def test_what_can_not_be_had_is_an_error_of_the_client(fields: dict[str, Any], name: str) -> None:
    async with serving(Chat) as served, client_of(served.url) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{"model": "any", "messages": say("hi"), **fields})
    assert name in f"{caught.value.param} {caught.value}"


async def test_a_chat_template_writes_the_prompt(key: str, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ bos_token }}{% for message in messages %}\n  [{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
    )

    class Templated(Chat):
        config = TritonTextConfig(
            url=URL, model="tensorrt_llm_bls", chat_template_file=template, special_tokens={"bos_token": "<s>"}
        )

    async with serving(Templated) as served, client_of(served.url) as client:
        extra = {"chat_template_kwargs": {"mood": "!"}}
        await client.chat.completions.create(model="any", messages=say(f"key={key}"), extra_body=extra)
    assert asked(key)["text_input"] == f"<s>  [system] Be brief.\n  [user] key={key}\n[assistant]!"
