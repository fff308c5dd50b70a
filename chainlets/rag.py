"""Answers from your own documents: retrieve, embed, generate, stream. Four Chainlets, with models or without.

    chains run chainlets/rag.py
    curl -N localhost:8000/v1/chat/completions --json '{"model": "Ask", "stream": true, "messages": [
      {"role": "user", "content": "How long is the largest whale?"}]}'

Runs with nothing but this package: words are hashed for an embedding, and the answer is made of sentences of the
documents. Models take their places with no other change:

    chains run chainlets/rag.py --set documents=docs --set model=<folder or hub id> --set embedding_model=<another>

`Ask` has `Retrieve` find the passages that are closest to the last message, by what `Embed` makes of both, and has
`Generate` answer from them. Answers cite passages as [1], and end with the sources that were cited. Clients of OpenAI's
API may ask `Embed` and `Generate` themselves, as the models `embed` and `generate`.
"""

import asyncio
import contextvars
import json
import logging
import math
import operator
import re
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec
import pydantic

import chains_stream as chains
from chainlets.openai_chat import DIMENSIONS, MAX_DIMENSIONS, cut, embed, words
from chainlets.summarize import STOP_WORDS, split_sentences
from chains_stream import openai

ConfigT = TypeVar("ConfigT", bound=pydantic.BaseModel)
Embedder = Literal["auto", "vllm", "sentence-transformers", "hashed"]

BATCH = 64  # passages that are embedded with one call
PASSAGE = 500  # characters, about; whole sentences as far as they fit
MAX_PASSAGES = 20_000  # in one worker's memory; they are compared one by one: some 20 µs each with 384 dimensions
READABLE = (".txt", ".md", ".rst", ".json")
UNKNOWN = "The documents do not say."
SENTENCES = 2  # of an answer without a model, at most
ENOUGH = 0.7  # of the score of the best one, for another to be told too
CITATION = re.compile(r"\[(\d{1,3})\]")
PASSAGES = re.compile(r"^\[(\d+)\] [^\n]*?: (.*)$", re.MULTILINE)  # in a prompt
PROMPT = """\
Answer the question from the passages below, in a few sentences. After each statement cite the passage that it is \
taken from by its number in square brackets, as in [1]. If the passages do not answer it, say so.
"""

log = logging.getLogger(__name__)


class Settings(pydantic.BaseModel):
    """What ``--set`` takes.

    Attributes:
        documents: a folder of text files: .txt, .md, .rst, and the texts in .json. Those named README are left out.
        embedder: who embeds; ``auto`` is vLLM or sentence-transformers if there is an `embedding_model`, whichever is
            installed, and else hashed words.
        embedding_model: a folder, or an id of the Hugging Face hub.
        model: a folder or an id for vLLM to answer with; without it, answers are sentences of the documents.
        passages: how many of them an answer is made from.
        vllm, embedding_vllm: more fields of the `VLLMConfig` of either model, by name; where both share a GPU, how much
            of it each takes: ``{"gpu_memory_utilization": 0.2}``.
        gpu, embedding_gpu: what the workers of either model are to be deployed on, such as ``H100``.
    """

    documents: Path = Path(__file__).parent / "documents"
    embedder: Embedder = "auto"
    embedding_model: str = ""
    model: str = ""
    passages: Annotated[int, pydantic.Field(ge=1, le=20)] = 3
    vllm: dict[str, Any] = {}
    embedding_vllm: dict[str, Any] = {}
    gpu: str | None = None
    embedding_gpu: str | None = None

    @pydantic.model_validator(mode="after")
    def _has_a_model(self) -> "Settings":
        if self.embedder in ("vllm", "sentence-transformers") and not self.embedding_model:
            raise ValueError(f"embedder={self.embedder} needs an embedding_model")
        return self


class Passage(msgspec.Struct):
    """A piece of a document, and how close it is to the question: a cosine."""

    source: str
    text: str
    score: float = 0.0


settings = chains.parameters(Settings)


def compute_of(gpu: str | None, engine: str) -> chains.Compute:
    """Say what a worker runs on, and how much at once: with vLLM as much as its engine does."""
    return chains.Compute(gpu=gpu) if engine == "vllm" else chains.Compute(gpu=gpu, predict_concurrency=8)


# --- embedding


class HashedEmbed(chains.ChainletBase):
    """Embeds texts without a model: their words but for function words, hashed into a vector of length 1.

    It finds passages that share words with the question, and no others.
    """

    async def __aenter__(self) -> Self:
        log.warning("no embedding_model is set: words are hashed, and only passages with words of the question found")
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def run_remote(self, request: openai.EmbeddingRequest) -> openai.EmbeddingResponse:
        size = request.dimensions or DIMENSIONS
        if size > MAX_DIMENSIONS:
            raise chains.InvalidArgumentError(f"there are at most {MAX_DIMENSIONS} dimensions", path="$.dimensions")
        texts = [telling(text) if isinstance(text, str) else [*map(str, text)] for text in request.inputs]
        return openai.EmbeddingResponse.of([embed(text, size) for text in texts], prompt_tokens=sum(map(len, texts)))


class SentenceEmbed(chains.ChainletBase):
    """Embeds texts by a model of the package sentence-transformers. What is too long for the model is cut off."""

    def __init__(self) -> None:
        self._model: Any = None

    async def __aenter__(self) -> Self:
        self._model = await asyncio.to_thread(self._load)
        log.info("embedding with sentence-transformers: %s", settings.embedding_model)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._model = None

    def _load(self) -> Any:
        try:
            package = import_module("sentence_transformers")  # heavy, and not everybody's
        except ImportError as error:
            raise chains.ChainsUsageError(f"{error}: pip install sentence-transformers") from error
        try:
            return package.SentenceTransformer(settings.embedding_model)
        except (OSError, ValueError) as error:
            told = f"embedding_model={settings.embedding_model} can't be loaded"
            raise chains.ChainsUsageError(f"{told}: {str(error).splitlines()[0]}") from error

    async def run_remote(self, request: openai.EmbeddingRequest) -> openai.EmbeddingResponse:
        texts = [text for text in request.inputs if isinstance(text, str)]
        if len(texts) < len(request.inputs):
            raise chains.InvalidArgumentError("sentence-transformers takes texts, and no tokens", path="$.input")
        return await asyncio.to_thread(self._embed, texts, request.dimensions)

    def _embed(self, texts: list[str], dimensions: int | None) -> openai.EmbeddingResponse:
        model = self._model
        if dimensions is not None and dimensions != model.get_sentence_embedding_dimension():
            raise chains.InvalidArgumentError("this model has one number of dimensions", path="$.dimensions")
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()
        tokens = sum(len(ids) for ids in model.tokenizer(texts, truncation=True)["input_ids"])
        return openai.EmbeddingResponse.of(vectors, prompt_tokens=tokens)


def vllm_embed() -> type[Any]:
    """Give a class that embeds with vLLM."""
    from chainlets.vllm_pooling import VLLMEmbed, VLLMPoolingConfig  # of an extra

    class Embedding(VLLMEmbed):
        config = config_of(
            VLLMPoolingConfig,
            "embedding_vllm",
            model=settings.embedding_model,
            truncate=True,
            **settings.embedding_vllm,
        )

    return Embedding


def config_of(kind: type[ConfigT], name: str, **fields: Any) -> ConfigT:
    """Make the config of a model. Raises ChainsUsageError that names the setting which is wrong."""
    from chainlets.vllm_start import one_line

    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise chains.ChainsUsageError(f"{name}: {one_line(error)}") from None


def chosen_embedder() -> str:
    """Say who embeds, where the settings leave it open."""
    if settings.embedder != "auto":
        return settings.embedder
    if not settings.embedding_model:
        return "hashed"
    return "sentence-transformers" if find_spec("vllm") is None else "vllm"


EMBEDDERS: dict[str, Callable[[], type[Any]]] = {
    "vllm": vllm_embed,
    "sentence-transformers": lambda: SentenceEmbed,
    "hashed": lambda: HashedEmbed,
}


class Embed(EMBEDDERS[chosen_embedder()]()):  # type: ignore[misc] # a class that the settings choose
    """Embeds passages and questions, and texts of clients."""

    remote_config = chains.RemoteConfig(name="embed", compute=compute_of(settings.embedding_gpu, chosen_embedder()))


# --- retrieval


class Retrieve(chains.ChainletBase):
    """Takes a question, gives the passages that are closest to it, the closest first. Its index is in memory."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=16))

    def __init__(self, embed: Embed = chains.depends(Embed, retries=3, timeout_sec=120)) -> None:
        self._embed = embed
        self._passages: list[Passage] = []
        self._vectors: asyncio.Task[list[list[float]]] | None = None

    async def __aenter__(self) -> Self:
        self._passages = await asyncio.to_thread(read_passages, settings.documents)
        # Not awaited: `Embed` may be in this process too, and takes requests once all are entered.
        self._vectors = self._begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._vectors is not None:
            self._vectors.cancel()
            await asyncio.wait([self._vectors])

    async def run_remote(self, question: str, count: int = 3) -> list[Passage]:
        vectors = await self._index()
        asked = (await self._vectors_of([question]))[0]
        return await asyncio.to_thread(closest, asked, self._passages, vectors, count)

    async def _index(self) -> list[list[float]]:
        """Wait until all passages are embedded, which is begun again where it failed. Raises what it fails of."""
        task = self._vectors
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._vectors = self._begin()
        return await asyncio.shield(task)

    def _begin(self) -> asyncio.Task[list[list[float]]]:
        # In a context of its own: it belongs to no request, and ends with none.
        return asyncio.create_task(self._embed_all(), name="index", context=contextvars.Context())

    async def _embed_all(self) -> list[list[float]]:
        texts = [passage.text for passage in self._passages]
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        found = await asyncio.gather(*map(self._vectors_of, batches))
        log.info("indexed %d passages of %s", len(texts), settings.documents)
        return [vector for vectors in found for vector in vectors]

    async def _vectors_of(self, texts: list[str]) -> list[list[float]]:
        response = await self._embed.run_remote(openai.EmbeddingRequest(input=texts))
        return [unit(item.embedding) for item in response.data]


def read_passages(folder: Path) -> list[Passage]:
    """Give the passages of all documents under a folder. Raises ChainsUsageError if there are none, or too many."""
    if not folder.is_dir():
        raise chains.ChainsUsageError(f"documents={folder} is no folder")
    passages: list[Passage] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in READABLE or path.stem == "README" or not path.is_file():
            continue
        name = str(path.relative_to(folder))
        passages += [Passage(name, text) for document in texts_in(path) for text in split_passages(document)]
        if len(passages) > MAX_PASSAGES:
            raise chains.ChainsUsageError(f"documents={folder} has more than {MAX_PASSAGES:,} passages: name a part")
    if not passages:
        raise chains.ChainsUsageError(f"documents={folder} has no text in it ({', '.join(READABLE)})")
    return passages


def texts_in(path: Path) -> list[str]:
    """Give the text of a file, or the texts in one of JSON. One that can't be read is left out, and the log says so."""
    try:
        text = path.read_text(encoding="utf-8")
        return [*strings(json.loads(text))] if path.suffix == ".json" else [text]
    except (OSError, ValueError, RecursionError) as error:
        log.warning("left out %s: %s", path, error)
        return []


def strings(value: Any) -> Iterator[str]:
    """Give all strings of several words in a value of JSON, but for the names of its fields."""
    if isinstance(value, str):
        if " " in value:
            yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def split_passages(document: str) -> Iterator[str]:
    """Give a document as passages of about `PASSAGE` characters, each one line."""
    passage = ""
    for sentence in split_sentences(document):
        for piece in textwrap.wrap(sentence, PASSAGE):
            if passage and len(passage) + len(piece) >= PASSAGE:
                yield passage
                passage = ""
            passage = f"{passage} {piece}".lstrip()
    if passage:
        yield passage


def unit(vector: Sequence[float]) -> list[float]:
    """Scale a vector to length 1, so that a product of two is their cosine; zeros stay."""
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else list(vector)


def closest(asked: list[float], passages: list[Passage], vectors: list[list[float]], count: int) -> list[Passage]:
    """Give the `count` passages of the highest cosine, of those that are above zero."""
    scores = [sum(map(operator.mul, asked, vector)) for vector in vectors]
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:count]
    return [Passage(passages[at].source, passages[at].text, scores[at]) for at in best if scores[at] > 0]


# --- generation


class ExtractiveGenerate(chains.ChainletBase):
    """Answers without a model: by the sentences, of passages in the prompt, that share the most with the question."""

    async def run_remote(self, request: openai.ChatCompletionRequest) -> AsyncIterator[openai.ChatCompletionChunk]:
        prompt = "\n".join(message.text for message in request.messages)
        answer = cut(extract(question_of(request), prompt), request.stops)
        tokens = re.findall(r"\s*\S+", answer)
        limit = len(tokens) if request.token_limit is None else request.token_limit
        reason: openai.FinishReason = "length" if limit < len(tokens) else "stop"
        for index in range(request.n or 1):
            for token in tokens[:limit]:
                yield openai.ChatCompletionChunk.of(token, index=index)
            yield openai.ChatCompletionChunk.of(index=index, finish_reason=reason)
        said = (request.n or 1) * len(tokens[:limit])
        usage = openai.Usage(prompt_tokens=len(words(prompt)), completion_tokens=said)
        yield openai.ChatCompletionChunk(choices=[], usage=usage)


def vllm_generate() -> type[Any]:
    """Give a class that answers with vLLM."""
    from chainlets.vllm_engine import VLLMChat, VLLMConfig  # of an extra

    class Generating(VLLMChat):
        config = config_of(VLLMConfig, "vllm", model=settings.model, **settings.vllm)

    return Generating


class Generate(vllm_generate() if settings.model else ExtractiveGenerate):  # type: ignore[misc] # as above
    """Takes a conversation, streams what comes next."""

    remote_config = chains.RemoteConfig(
        name="generate", compute=compute_of(settings.gpu, "vllm" if settings.model else "")
    )


def extract(question: str, prompt: str) -> str:
    """Give the best sentences of the passages in a prompt, each with its citation; `UNKNOWN` if there are none.

    The score of a sentence is the sum of idf, over the sentences, of the words that it shares with the question, by the
    root of its length.
    """
    passages = PASSAGES.findall(prompt)
    found = [(f"[{number}]", text) for number, passage in passages for text in split_sentences(passage)]
    sentences = [(citation, text) for citation, text in found if not text.endswith("?")]  # a question is no answer
    bags = [set(telling(text)) for _, text in sentences]
    frequency = Counter(word for bag in bags for word in bag)
    asked = set(telling(question))
    scores = [
        sum(math.log(1 + len(bags) / frequency[word]) for word in asked & bag) / math.sqrt(len(bag) or 1)
        for bag in bags
    ]
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:SENTENCES]
    chosen = [at for at in sorted(best) if scores[at] >= ENOUGH * max(scores) > 0]
    return " ".join(f"{sentences[at][1]} {sentences[at][0]}" for at in chosen) or UNKNOWN


def telling(text: str) -> list[str]:
    """Give the words of a text that tell what it is about; all of them where none does."""
    found = words(text)
    return [word for word in found if word not in STOP_WORDS] or found


def question_of(request: openai.ChatCompletionRequest) -> str:
    """Give the last thing that the user said. Raises InvalidArgumentError if it is no text."""
    question = next((message.text for message in reversed(request.messages) if message.role == "user"), "")
    if not question.strip():
        raise chains.InvalidArgumentError("there is no question: no message of the user has text", path="$.messages")
    return question


# --- the whole


@chains.mark_entrypoint
class Ask(chains.ChainletBase):
    """Answers the last message of a conversation from the documents, and says from which."""

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=256))

    def __init__(
        self,
        retrieve: Retrieve = chains.depends(Retrieve, retries=3, timeout_sec=300),
        generate: Generate = chains.depends(Generate, retries=3, timeout_sec=300),
    ) -> None:
        self._retrieve = retrieve
        self._generate = generate

    async def run_remote(self, request: openai.ChatCompletionRequest) -> AsyncIterator[openai.ChatCompletionChunk]:
        passages = await self._retrieve.run_remote(question_of(request), settings.passages)
        sources = Sources(passages, listed=takes_a_list(request))
        async for chunk in self._generate.run_remote(grounded(request, passages)):
            for piece in sources.added_to(chunk):
                yield piece


def grounded(request: openai.ChatCompletionRequest, passages: list[Passage]) -> openai.ChatCompletionRequest:
    """Put the passages before a conversation: into its first message, as templates know one of the system at most."""
    lines = [f"[{number}] {passage.source}: {passage.text}" for number, passage in enumerate(passages, 1)]
    prompt = "\n".join([PROMPT, *lines])
    first, *others = request.messages
    if first.role in ("system", "developer"):
        told = openai.ChatMessage(first.role, f"{first.text}\n\n{prompt}")
    else:
        told, others = openai.ChatMessage("system", prompt), request.messages
    return msgspec.structs.replace(request, model="", messages=[told, *others])


def takes_a_list(request: openai.ChatCompletionRequest) -> bool:
    """Tell whether an answer may end in a list of sources: one that is JSON, or calls of tools, would be broken."""
    return not request.tools and (request.response_format is None or request.response_format.type == "text")


class Sources:
    """Follows an answer, and adds its sources before its end."""

    def __init__(self, passages: list[Passage], *, listed: bool) -> None:
        self._passages = passages
        self._listed = listed
        self._said: dict[int, str] = {}  # by the number of the choice

    def added_to(self, chunk: openai.ChatCompletionChunk) -> Iterator[openai.ChatCompletionChunk]:
        """Give a chunk, or, of one that ends a choice, what comes to it, the sources, and its end."""
        for choice in chunk.choices:
            self._said[choice.index] = self._said.get(choice.index, "") + (choice.delta.content or "")
        ended = [choice for choice in chunk.choices if choice.finish_reason is not None]
        if not (ended and self._listed and self._passages):
            yield chunk
            return
        open_ended = [msgspec.structs.replace(choice, finish_reason=None) for choice in chunk.choices]
        if any(choice.delta != openai.ChoiceDelta() or choice.token_ids for choice in open_ended):
            yield msgspec.structs.replace(chunk, choices=open_ended, usage=None)
        for choice in ended:
            yield openai.ChatCompletionChunk.of(self._list(self._said[choice.index]), index=choice.index)
        for choice in ended:
            yield openai.ChatCompletionChunk.of(index=choice.index, finish_reason=choice.finish_reason)
        if chunk.usage is not None:
            yield openai.ChatCompletionChunk(choices=[], usage=chunk.usage)

    def _list(self, said: str) -> str:
        """Give the sources that an answer cites, or else those that it was made from."""
        numbers = range(1, len(self._passages) + 1)
        cited = sorted({int(number) for number in CITATION.findall(said)} & {*numbers})
        named = ", ".join(f"[{number}] {self._passages[number - 1].source}" for number in cited or numbers)
        return f"\n\n{'Sources' if cited else 'Sources read'}: {named}"


if __name__ == "__main__":

    async def main(question: str) -> None:
        asked = openai.ChatCompletionRequest(messages=[openai.ChatMessage("user", question)])
        async for chunk in Ask().run_remote(asked):
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)  # noqa: T201 - a program that prints
        print()  # noqa: T201

    with chains.run_local():
        asyncio.run(main("How long is the largest whale?"))
