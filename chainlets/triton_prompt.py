"""A conversation as the text that a model goes on with: by a chat template, or as plain lines."""

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import msgspec

import chains_stream as chains
from chainlets.triton_errors import INSTALL
from chains_stream import openai


def prompt_of(request: openai.ChatCompletionRequest, template: str | None, tokens: Mapping[str, str]) -> str:
    """Write a conversation for the model.

    Args:
        request: whose messages hold text alone.
        template: Jinja, as in a tokenizer's ``chat_template``: it is given `messages`, `tools`,
            `add_generation_prompt`, the `tokens`, and what the request has in `chat_template_kwargs`. Without one, each
            message is a line, ``user: …``, and a last line ``assistant:`` asks for the answer.
        tokens: ``bos_token`` and others, by name.

    Raises:
        InvalidArgumentError: the messages hold more than text, or the template refuses them.
        ChainsUsageError: the template is none, or Jinja is not installed.
    """
    messages = [_plain(message, index) for index, message in enumerate(request.messages)]
    goes_on = bool(request.continue_final_message)
    asks = not goes_on if request.add_generation_prompt is None else request.add_generation_prompt
    if template is None:
        return _lines(messages, asks=asks, goes_on=goes_on)
    import jinja2

    given = {"tools": None, **tokens, **(request.chat_template_kwargs or {})}
    try:
        text = _compiled(template).render(messages=messages, add_generation_prompt=asks, **given)
    except jinja2.TemplateError as error:
        raise chains.InvalidArgumentError(
            f"the chat template refuses the messages: {error}", path="$.messages"
        ) from error
    if goes_on:  # the template has closed the message that is to be gone on with
        last = messages[-1]["content"].rstrip()
        text = text[: text.rindex(last) + len(last)] if last in text else text
    return str(text)


def check(template: str | None) -> None:
    """Raise ChainsUsageError if a template can't be used."""
    if template is not None:
        _compiled(template)


def _plain(message: openai.ChatMessage, index: int) -> dict[str, Any]:
    content = message.content
    if not isinstance(content, str | None) and not all(isinstance(part, openai.TextPart) for part in content):
        kind = next(type(part).__name__ for part in content if not isinstance(part, openai.TextPart))
        path = f"$.messages[{index}].content"
        raise chains.InvalidArgumentError(f"a message holds text alone here, and no {kind}", path=path)
    return {**msgspec.to_builtins(message), "content": message.text}


def _lines(messages: list[dict[str, Any]], *, asks: bool, goes_on: bool) -> str:
    lines = [f"{message['role']}: {message['content']}\n" for message in messages]
    text = "".join(lines)
    return text.removesuffix("\n") if goes_on else text + ("assistant:" if asks else "")


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise chains.ChainsUsageError(f"chat templates need Jinja: {INSTALL}") from error
    # As tokenizers have it, so that their templates come out the same.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], undefined=jinja2.Undefined
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise chains.ChainsUsageError(f"the chat template is wrong in line {error.lineno}: {error.message}") from error


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
