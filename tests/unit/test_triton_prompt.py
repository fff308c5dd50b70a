"""A conversation as a prompt: plain lines, a template, and what neither can write."""

from typing import Any

import pytest

import chains_stream as chains
from chainlets import triton_prompt
from chainlets.triton_prompt import prompt_of
from chains_stream import openai

PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)
TALK = [openai.ChatMessage("user", "Hi."), openai.ChatMessage("assistant", "Hello, ")]


def written(template: str | None, messages: list[openai.ChatMessage] | None = None, **fields: Any) -> str:
    return prompt_of(openai.ChatCompletionRequest(messages=messages or TALK, **fields), template, {"eos_token": "</s>"})


def test_plain_lines_ask_for_an_answer() -> None:
    assert written(None) == "user: Hi.\nassistant: Hello, \nassistant:"
    assert written(None, add_generation_prompt=False) == "user: Hi.\nassistant: Hello, \n"
    assert written(None, continue_final_message=True) == "user: Hi.\nassistant: Hello, "


def test_a_template_is_given_what_a_tokenizer_gives_it() -> None:
    assert written(PLAIN) == "<user>Hi.</user><assistant>Hello, </assistant><assistant>"
    assert written(PLAIN, add_generation_prompt=False) == "<user>Hi.</user><assistant>Hello, </assistant>"
    assert written(PLAIN, continue_final_message=True) == "<user>Hi.</user><assistant>Hello,"
    assert written("{{ eos_token }}{{ tools }}{{ deep }}", chat_template_kwargs={"deep": True}) == "</s>NoneTrue"


def test_parts_of_text_are_one_text() -> None:
    parts: list[openai.ContentPart] = [openai.TextPart("a"), openai.TextPart("b")]
    assert written(None, [openai.ChatMessage("user", parts)]) == "user: ab\nassistant:"


def test_an_image_is_refused_with_its_place() -> None:
    image: list[openai.ContentPart] = [openai.ImagePart(openai.ImageUrl("data:,"))]
    with pytest.raises(chains.InvalidArgumentError, match="text alone here, and no ImagePart") as caught:
        written(None, [*TALK, openai.ChatMessage("user", image)])
    assert caught.value.path == "$.messages[2].content"


def test_a_template_may_refuse_and_can_do_no_harm() -> None:
    with pytest.raises(chains.InvalidArgumentError, match="refuses the messages: roles must alternate"):
        written("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(chains.InvalidArgumentError, match="unsafe"):
        written("{{ messages.__class__.__mro__ }}")


def test_a_wrong_template_says_where() -> None:
    with pytest.raises(chains.ChainsUsageError, match=r"the chat template is wrong in line 2: "):
        triton_prompt.check("{{ messages }}\n{% if %}")
    triton_prompt.check(None)
