"""How likely tokens were: vLLM's logprobs as OpenAI's API shows them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chains_stream import openai

LEAST = -9999.0  # in place of minus infinity, which JSON has not

Logprobs = Sequence[Mapping[int, Any] | None]
Decode = Callable[[Sequence[int]], str]


def of_chat(tokens: Sequence[int], logprobs: Logprobs, top: int, decode: Decode) -> list[openai.TokenLogprob]:
    """Give the logprobs of tokens, each with those of the `top` likeliest at its place."""
    found = []
    for token, here in zip(tokens, logprobs, strict=True):
        own = (here or {}).get(token)
        text = _text(token, own, decode)
        likeliest = [_top(_text(other, its, decode), its) for other, its in _likeliest(here, top)]
        found.append(openai.TokenLogprob(text, _value(own), _bytes(text), likeliest))
    return found


def of_completion(
    tokens: Sequence[int], logprobs: Logprobs, top: int, decode: Decode, offset: int
) -> openai.CompletionLogprobs:
    """Give the logprobs of tokens whose text begins at `offset`. The first token of a prompt has none."""
    found = openai.CompletionLogprobs([], [], [], [])
    assert found.text_offset is not None
    assert found.token_logprobs is not None
    assert found.tokens is not None
    assert found.top_logprobs is not None
    for token, here in zip(tokens, logprobs, strict=True):
        own = (here or {}).get(token)
        text = _text(token, own, decode)
        found.text_offset.append(offset)
        found.tokens.append(text)
        found.token_logprobs.append(None if own is None else _value(own))
        likeliest = {_text(other, its, decode): _value(its) for other, its in _likeliest(here, top)}
        found.top_logprobs.append(None if here is None else likeliest)
        offset += len(text)
    return found


def end_of(logprobs: openai.CompletionLogprobs) -> int:
    """Give where the text of the tokens behind these begins."""
    offsets, tokens = logprobs.text_offset, logprobs.tokens
    return offsets[-1] + len(tokens[-1]) if offsets and tokens else 0


def _likeliest(here: Mapping[int, Any] | None, top: int) -> list[tuple[int, Any]]:
    return sorted((here or {}).items(), key=lambda item: -item[1].logprob)[:top]


def _text(token: int, logprob: Any, decode: Decode) -> str:
    decoded = None if logprob is None else logprob.decoded_token
    return decode([token]) if decoded is None else str(decoded)


def _value(logprob: Any) -> float:
    return LEAST if logprob is None else max(float(logprob.logprob), LEAST)


def _top(text: str, logprob: Any) -> openai.TopLogprob:
    return openai.TopLogprob(text, _value(logprob), _bytes(text))


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", "replace"))
