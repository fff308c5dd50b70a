"""A chat that answers from what it was told, for any client of OpenAI's API; and embeddings, which it finds it by.

    chains run chainlets/openai_chat.py
    curl localhost:8000/v1/chat/completions --json '{"model": "extract", "messages": [
      {"role": "system", "content": "The office opens at nine. Parking is behind the house."},
      {"role": "user", "content": "When does the office open?"}]}'

Plain Python, no model and no weights: the answer is the sentence of the conversation that is closest to the question,
and tokens are words. Put an engine into `Answer` and a model into `Embed`, and clients see no difference.
"""

import math
import operator
import re
import zlib
from collections import Counter
from collections.abc import AsyncIterator

import chains_stream as chains
from chains_stream import openai

DIMENSIONS = 512  # of a vector, if the client does not say
MAX_DIMENSIONS = 4096
MAX_SENTENCES = 500  # of a conversation that are looked at, the latest
CLOSE = 0.1  # cosine from which on a sentence is taken to have to do with the question
UNKNOWN = "Nothing in this conversation says so."


class Embed(chains.ChainletBase):
    """Embeds texts: their words, hashed into a vector of length 1 (Weinberger et al., ICML 2009)."""

    # A name offers it to clients, as a model, beside the entrypoint.
    remote_config = chains.RemoteConfig(name="embed", compute=chains.Compute(predict_concurrency=8))

    async def run_remote(self, request: openai.EmbeddingRequest) -> openai.EmbeddingResponse:
        texts = [words(text) if isinstance(text, str) else [*map(str, text)] for text in request.inputs]
        size = request.dimensions or DIMENSIONS
        if size > MAX_DIMENSIONS:
            raise chains.InvalidArgumentError(f"there are at most {MAX_DIMENSIONS} dimensions", path="$.dimensions")
        return openai.EmbeddingResponse.of([embed(text, size) for text in texts], prompt_tokens=sum(map(len, texts)))


@chains.mark_entrypoint
class Answer(chains.ChainletBase):
    """Answers the last message with the sentence before it that is closest to it, word by word."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    def __init__(self, embed: Embed = chains.depends(Embed, retries=3, timeout_sec=60)) -> None:
        self._embed = embed

    async def run_remote(self, request: openai.ChatCompletionRequest) -> AsyncIterator[openai.ChatCompletionChunk]:
        *before, question = (message.text for message in request.messages)
        sentences = [sentence for text in before for sentence in split(text)][-MAX_SENTENCES:]
        answer = cut(await self._closest(question, sentences), request.stops)
        tokens = re.findall(r"\s*\S+", answer)
        limit = len(tokens) if request.token_limit is None else request.token_limit
        choices = request.n or 1
        for index in range(choices):
            for token in tokens[:limit]:
                yield openai.ChatCompletionChunk.of(token, index=index)
            reason: openai.FinishReason = "length" if limit < len(tokens) else "stop"
            yield openai.ChatCompletionChunk.of(index=index, finish_reason=reason)
        prompt = sum(len(words(text)) for text in (*before, question))
        usage = openai.Usage(prompt_tokens=prompt, completion_tokens=choices * len(tokens[:limit]))
        yield openai.ChatCompletionChunk(choices=[], usage=usage)

    async def _closest(self, question: str, sentences: list[str]) -> str:
        if not sentences:
            return UNKNOWN
        response = await self._embed.run_remote(openai.EmbeddingRequest(input=[question, *sentences]))
        asked, *known = (item.embedding for item in response.data if isinstance(item.embedding, list))
        scores = [sum(map(operator.mul, asked, vector)) for vector in known]
        best = max(range(len(scores)), key=scores.__getitem__)
        return sentences[best] if scores[best] >= CLOSE else UNKNOWN


def words(text: str) -> list[str]:
    """Give the words of a text in lower case, without the endings that English gives them."""
    return [re.sub(r"(?<=\w{3})(ing|ed|es|s)$", "", word) for word in re.findall(r"\w+", text.lower())]


def split(text: str) -> list[str]:
    """Give the sentences of a text."""
    return [sentence for part in re.split(r"(?<=[.!?])\s+|\n+", text) if (sentence := part.strip())]


def embed(text: list[str], size: int) -> list[float]:
    """Give the vector of the words of a text: zeros for none."""
    vector = [0.0] * size
    for word, count in Counter(text).items():
        digest = zlib.crc32(word.encode())
        vector[digest % size] += count * (1 if digest >> 31 else -1)
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else vector


def cut(text: str, stops: list[str]) -> str:
    """Give a text up to the first of the stops."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
