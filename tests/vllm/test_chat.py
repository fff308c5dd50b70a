"""Templates, tools, grammars and reasoning: what a conversation with a real vLLM takes and gives."""

import json
import re
from typing import Any

import pytest

import chains_stream as chains
from chainlets.vllm_engine import VLLMChat
from chains_stream import openai
from tests.vllm.serving import Served, choices_of, collected, content_of, said

PLACES = {"type": "object", "properties": {"at": {"enum": ["sea", "sky"]}}, "required": ["at"]}
LOOK = openai.Tool(
    openai.FunctionDefinition("look", "Looks somewhere.", PLACES | {"additionalProperties": False}, strict=True)
)
WAIT = openai.Tool(openai.FunctionDefinition("wait", parameters={"type": "object", "properties": {}}))


async def prompt_of(served: Served, request: openai.ChatCompletionRequest) -> str:
    """Give the text that the model is given for a conversation."""
    request.max_tokens, request.return_token_ids, request.temperature = 1, True, 0
    first, *_ = await collected(served.chat.run_remote(request))
    return str(served.llm.renderer.tokenizer.decode(first.prompt_token_ids))


def calls_of(chunks: list[openai.ChatCompletionChunk]) -> dict[int, tuple[str, str, str]]:
    """Give the id, the name and the arguments of each call of a tool, put together from its pieces."""
    found: dict[int, tuple[str, str, str]] = {}
    for choice in choices_of(chunks):
        for call in choice.delta.tool_calls or ():
            id_, name, arguments = found.get(call.index, ("", "", ""))
            function = call.function or openai.ChoiceDeltaToolCallFunction()
            found[call.index] = (
                id_ or call.id or "",
                name or function.name or "",
                arguments + (function.arguments or ""),
            )
    return found


async def test_a_conversation_is_written_as_its_template_says(served: Served) -> None:
    assert await prompt_of(served, said("Hi", "Hello", "Bye")) == "[user]Hi\n[assistant]Hello\n[user]Bye\n[assistant]"
    parts: list[openai.ContentPart] = [openai.TextPart("One"), openai.TextPart("two")]
    request = openai.ChatCompletionRequest(messages=[openai.ChatMessage("user", parts)])
    assert await prompt_of(served, request) == "[user]One\ntwo\n[assistant]"
    assert await prompt_of(served, said("Hi", chat_template_kwargs={"mood": "glad"})) == "[user]Hi\n[assistant]glad"
    assert await prompt_of(served, said("Hi", add_generation_prompt=False)) == "[user]Hi\n"
    assert await prompt_of(served, said("Hi", "Hell", continue_final_message=True)) == "[user]Hi\n[assistant]Hell"
    with_tools = await prompt_of(served, said("Hi", tools=[LOOK], tool_choice="auto"))
    assert "<tools>" in with_tools
    assert "Looks somewhere." in with_tools


async def test_templates_of_clients_are_taken_only_where_they_are_trusted(served: Served) -> None:
    with pytest.raises(chains.InvalidArgumentError, match="trust_request_chat_template"):
        await collected(served.chat.run_remote(said("Hi", chat_template="{{ messages }}")))
    given = served.config.model_copy(
        update={"trust_request_chat_template": True, "chat_template": "{{ messages[0].content }}!"}
    )

    class Trusting(VLLMChat):
        config = given

    async with chains.run_chain(Trusting) as chat:
        for template, prompt in ((None, "Hi!"), ("{{ messages[0].content }}?", "Hi?")):
            request = said("Hi", chat_template=template, max_tokens=1, return_token_ids=True)
            first, *_ = await collected(chat.run_remote(request))
            assert first.prompt_token_ids == served.tokens(prompt)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
async def test_a_call_of_a_tool_comes_in_pieces(served: Served, choice: Any) -> None:
    request = said("Where is it?", tools=[LOOK], tool_choice=choice, temperature=0, max_tokens=200)
    chunks = await collected(served.chat.run_remote(request))
    ((id_, name, arguments),) = calls_of(chunks).values()
    assert id_
    assert name == "look"
    assert json.loads(arguments)["at"] in ("sea", "sky")
    assert sum(bool(choice.delta.tool_calls) for choice in choices_of(chunks)) > 1
    assert choices_of(chunks)[-1].finish_reason == ("tool_calls" if choice == "required" else "stop")


async def test_the_model_may_choose_to_call_tools(served: Served) -> None:
    calls = [
        f'<tool_call>\n{{"name": "look", "arguments": {{"at": "{place}"}}}}\n</tool_call>' for place in ("sea", "sky")
    ]
    text = "Let me see.\n" + "\n".join(calls)
    loose = openai.Tool(openai.FunctionDefinition("look", parameters=PLACES))
    fields: dict[str, Any] = {"tools": [loose, WAIT], "tool_choice": "auto", "temperature": 0}
    chunks = await collected(served.chat.run_remote(said("Hi", structured_outputs={"choice": [text]}, **fields)))
    assert content_of(chunks).strip() == "Let me see."
    found = calls_of(chunks)
    assert [json.loads(arguments) for _, _, arguments in found.values()] == [{"at": "sea"}, {"at": "sky"}]
    assert len({id_ for id_, _, _ in found.values()}) == 2
    assert choices_of(chunks)[-1].finish_reason == "tool_calls"
    fields["parallel_tool_calls"] = False
    chunks = await collected(served.chat.run_remote(said("Hi", structured_outputs={"choice": [text]}, **fields)))
    assert len(calls_of(chunks)) == 1


async def test_a_model_that_is_served_without_tools_says_so(served: Served) -> None:
    given = served.config.model_copy(update={"tool_call_parser": None})

    class Plain(VLLMChat):
        config = given

    async with chains.run_chain(Plain) as chat:
        with pytest.raises(chains.InvalidArgumentError, match="requires tool_call_parser to be set"):
            await collected(chat.run_remote(said("Hi", tools=[LOOK], tool_choice="required")))
        chunks = await collected(chat.run_remote(said("Hi", tools=[LOOK], tool_choice="none", max_tokens=3)))
        assert choices_of(chunks)[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([], "required", "tools"),
        ([LOOK], {"type": "function", "function": {"name": "listen"}}, "does not match"),
        ([LOOK], "perhaps", "tool_choice"),
    ],
)
async def test_what_is_wrong_with_tools_is_said(
    served: Served, tools: list[openai.Tool], choice: Any, reason: str
) -> None:
    with pytest.raises(chains.InvalidArgumentError, match=reason):
        await collected(served.chat.run_remote(said("Hi", tools=tools or None, tool_choice=choice)))


async def test_an_answer_fits_the_schema_that_it_is_held_to(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "open": {"type": "boolean"}},
        "required": ["city", "open"],
        "additionalProperties": False,
    }
    form = openai.ResponseFormat("json_schema", openai.JsonSchemaFormat("place", schema=schema))
    request = said("Where?", temperature=1.0, seed=1, max_tokens=300, response_format=form)
    found = json.loads(content_of(await collected(served.chat.run_remote(request))))
    assert found["city"] in ("Oslo", "Rome")
    assert isinstance(found["open"], bool)
    form = openai.ResponseFormat("json_object")
    text = content_of(
        await collected(served.chat.run_remote(said("Where?", temperature=0, max_tokens=50, response_format=form)))
    )
    assert text.lstrip().startswith("{")


async def test_grammars_of_other_kinds_hold_too(served: Served) -> None:
    for given, allowed in (({"regex": "[0-9]{3}-[0-9]{2}"}, r"\d{3}-\d{2}"), ({"choice": ["yes", "no"]}, "yes|no")):
        request = said("Well?", temperature=1.0, max_tokens=50, structured_outputs=given)
        assert re.fullmatch(allowed, content_of(await collected(served.chat.run_remote(request))))
