"""Models that embed, score and classify, run by vLLM in the worker's process: `VLLMEmbed`, `VLLMScore`, `VLLMClassify`.

Derive a class and say which model it runs, and it is a Chainlet:

    class Embed(VLLMEmbed):
        remote_config = chains.RemoteConfig(name="embed", compute=chains.Compute(gpu="L4"))
        config = VLLMPoolingConfig(model="BAAI/bge-m3")

The texts of one request run at once, and beside those of others; a request that is cancelled takes its texts out of the
engine. A text that is too long for the model is refused, unless the config says ``truncate=True``.
"""

import asyncio
import copy
import functools
import math
import operator
import threading
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import msgspec
import pydantic
from pydantic import PositiveInt

import chains_stream as chains
from chainlets.vllm_config import VLLMConfig
from chainlets.vllm_core import OpenEngine, open_as
from chainlets.vllm_engine import VLLMChainlet
from chainlets.vllm_start import one_line
from chains_stream import openai

T = TypeVar("T")
Task = Literal["embed", "classify"]
Texts = Annotated[list[str], msgspec.Meta(min_length=1)]
Pair = tuple[list[int], int | None]  # tokens, and where the second text begins if the model wants to know
QUERY, DOCUMENT = "{query}", "{document}"  # in a `score_template`


class VLLMPoolingConfig(VLLMConfig):
    """A model that embeds, scores or classifies, and how vLLM runs it: what `VLLMConfig` has, and some more.

    Attributes:
        convert: what a model that generates is made into: ``embed`` or ``classify``; ``auto`` goes by its files.
        pooler_config: arguments of vLLM's ``PoolerConfig``, for example ``{"seq_pooling_type": "CLS"}``.
        truncate: cuts off what is too long for the model, in place of refusing it.
        max_inputs: how many texts one request may have.
        score_template: how a model that scores is asked, with ``{query}`` and ``{document}`` in it; without one, as a
            cross-encoder is.
    """

    convert: Literal["auto", "none", "embed", "classify"] = "auto"
    pooler_config: dict[str, Any] | None = None
    truncate: bool = False
    max_inputs: PositiveInt = 2048
    score_template: str | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lora_modules:
            raise ValueError("lora_modules are for models that generate")
        template = self.score_template
        if template is not None and not (QUERY in template and DOCUMENT in template):
            raise ValueError(f"score_template should have {QUERY} and {DOCUMENT} in it")
        return self

    @property
    def engine_key(self) -> str:
        """The same for configs that one engine serves."""
        return f"pooling {super().engine_key} {self.convert} {self.pooler_config}"

    def arguments(self, engine_args: type[Any]) -> dict[str, Any]:
        """Give what vLLM's ``AsyncEngineArgs``, which is `engine_args`, is made of. Raises ChainsUsageError."""
        found = super().arguments(engine_args) | {"runner": "pooling", "convert": self.convert}
        if self.pooler_config is not None:
            from vllm.config import PoolerConfig

            try:
                found["pooler_config"] = PoolerConfig(**self.pooler_config)
            except Exception as error:
                raise chains.ChainsUsageError(f"VLLMPoolingConfig.pooler_config: {one_line(error)}") from error
        return found


class Pooled(msgspec.Struct, frozen=True):
    """What the engine made of one text: a vector, a score, or one for each label; and how many tokens it had."""

    values: list[float]
    tokens: int


class PoolingEngine(OpenEngine):
    """An engine whose model gives vectors and scores, and no text. What depends on vLLM's version is 0.32's."""

    config: VLLMPoolingConfig

    async def require(self, task: Task, kind: type[Any]) -> None:
        """Raise ChainsUsageError if the model does not do that."""
        tasks = await self.llm.get_supported_tasks()
        if task not in tasks:
            told = f"the model {self.config.model} does not {task}, which {kind.__name__} needs"
            raise chains.ChainsUsageError(f"{told}; it does {', '.join(sorted(tasks))}")

    async def encode(self, prompt: Any, params: Any, path: str) -> Pooled:
        """Have one text pooled; a caller that is cancelled takes it out of the engine. `path` names it in errors.

        Raises what `explained` does.
        """
        with self.explained(path):
            rendered = await self._render(prompt)
            async with aclosing(self.llm.encode(rendered, params, str(uuid.uuid4()))) as outputs:
                async for output in outputs:
                    if output.finished:
                        return Pooled(output.outputs.data.flatten().tolist(), len(output.prompt_token_ids))
        raise chains.WorkerLostError("vLLM gave the request up")

    async def _render(self, prompt: Any) -> Any:
        """Make of a text or its tokens what the engine takes, with vLLM's own renderer."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = self.llm.renderer
        how = renderer.default_cmpl_tok_params
        if self.config.truncate:
            how = how.with_kwargs(truncate_prompt_tokens=-1)
        [rendered] = await renderer.render_cmpl_async([parse_model_prompt(self.llm.model_config, prompt)], how)
        return rendered

    async def encode_all(self, prompts: Sequence[Any], task: Task, path: str, **params: Any) -> list[Pooled]:
        """Have many texts pooled, as many at once as the engine runs; the first that fails ends them all."""

        def one(number: int) -> Coroutine[Any, Any, Pooled]:
            return self.encode(prompts[number], parameters(task, **params), f"{path}[{number}]")

        return await at_once(one, len(prompts), self.config.max_num_seqs)

    async def score_pairs(self, pairs: Sequence[Pair], path: str) -> list[float]:
        """Have many pairs scored, as `encode_all` does texts."""

        def one(number: int) -> Coroutine[Any, Any, Pooled]:
            tokens, begins = pairs[number]
            # By this name vLLM's own endpoint tells its model runner.
            extra = None if begins is None else {"compressed_token_type_ids": begins}
            params = parameters("classify", extra_kwargs=extra)
            return self.encode({"prompt_token_ids": tokens}, params, f"{path}[{number}]")

        return [pooled.values[0] for pooled in await at_once(one, len(pairs), self.config.max_num_seqs)]

    @functools.cached_property
    def labels(self) -> list[str]:
        """What the values of a classifier stand for, in their order."""
        config = self.llm.model_config.hf_config
        names = dict(getattr(config, "id2label", None) or {})
        return [names.get(number, f"LABEL_{number}") for number in range(int(config.num_labels))]


def parameters(task: Task, **more: Any) -> Any:
    """Give vLLM's ``PoolingParams``: new ones for each text, as vLLM writes into them."""
    from vllm import PoolingParams

    return PoolingParams(task=task, **more)


async def at_once(one: Callable[[int], Coroutine[Any, Any, T]], count: int, most: int) -> list[T]:
    """Do `one` for each number below `count`, no more than so many at once. The first that fails ends them all."""
    found: dict[int, T] = {}
    numbers = iter(range(count))

    async def lane() -> None:
        for number in numbers:
            found[number] = await one(number)

    try:
        async with asyncio.TaskGroup() as lanes:
            for _ in range(min(count, most)):
                lanes.create_task(lane())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others, if any, say the same of other texts
    return [found[number] for number in range(count)]


class VLLMPooling(VLLMChainlet):
    """What the Chainlets of this module have in common: `config`, which a class derived from them gives."""

    config: ClassVar[VLLMPoolingConfig]
    _engine: PoolingEngine | None = None  # type: ignore[assignment] # one of another kind

    async def __aenter__(self) -> Self:
        if not isinstance(getattr(self, "config", None), VLLMPoolingConfig):
            told = "has no config for it; write `config = VLLMPoolingConfig(model=…)` in its class"
            raise chains.ChainsUsageError(f"{type(self).__name__} {told}")
        self._engine = await open_as(PoolingEngine, self.config)
        try:
            await self._prepare(self._engine)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    @property
    def engine(self) -> PoolingEngine:  # type: ignore[override] # as above
        """The engine, while the Chainlet is entered; `engine.llm` is vLLM's own ``AsyncLLM``."""
        engine: Any = super().engine
        assert isinstance(engine, PoolingEngine), "what `__aenter__` has opened"
        return engine

    async def _prepare(self, engine: PoolingEngine) -> None:
        """See to what the Chainlet needs of the engine. Raises ChainsUsageError for a model of another kind."""


class VLLMEmbed(VLLMPooling):
    """Embeds texts, or tokens: OpenAI's embeddings. `dimensions` is for models that were trained for fewer."""

    async def _prepare(self, engine: PoolingEngine) -> None:
        await engine.require("embed", VLLMEmbed)

    async def run_remote(self, request: openai.EmbeddingRequest) -> openai.EmbeddingResponse:
        engine, given = self.engine, request.inputs
        check_number(given, engine.config, "$.input")
        dimensions = cut_to(request.dimensions, engine.llm.model_config)
        prompts = [text if isinstance(text, str) else {"prompt_token_ids": list(text)} for text in given]
        found = await engine.encode_all(prompts, "embed", "$.input", dimensions=dimensions)
        tokens = sum(one.tokens for one in found)
        return openai.EmbeddingResponse.of([one.values for one in found], prompt_tokens=tokens)


class VLLMScore(VLLMPooling):
    """Scores documents by how well they answer a query.

    A cross-encoder reads both together: its score is what its own activation gives, mostly from 0 to 1. Of a model that
    embeds it is the cosine of the two vectors.
    """

    async def _prepare(self, engine: PoolingEngine) -> None:
        tasks = await engine.llm.get_supported_tasks()
        self._pairs: Pairs | None = None
        if "classify" not in tasks:
            await engine.require("embed", VLLMScore)
        elif len(engine.labels) > 1:
            told = f"the model {engine.config.model} has {len(engine.labels)} labels: use VLLMClassify"
            raise chains.ChainsUsageError(f"{told}; a model that scores has one")
        else:
            self._pairs = Pairs(engine)

    async def run_remote(self, query: str, documents: Texts) -> list[float]:
        engine = self.engine
        check_number(documents, engine.config, "$.documents")
        if self._pairs is not None:
            pairs = await asyncio.to_thread(self._pairs.of, query, documents)
            return await engine.score_pairs(pairs, "$.documents")
        asked = await engine.encode(query, parameters("embed"), "$.query")
        found = await engine.encode_all(documents, "embed", "$.documents")
        return [cosine(asked.values, one.values) for one in found]


class Label(msgspec.Struct, frozen=True):
    """What a text was taken for: the likeliest label, its score, and the scores of all."""

    label: str
    score: float
    scores: dict[str, float]


class VLLMClassify(VLLMPooling):
    """Says which of the model's labels each text has."""

    async def _prepare(self, engine: PoolingEngine) -> None:
        await engine.require("classify", VLLMClassify)

    async def run_remote(self, texts: Texts) -> list[Label]:
        engine = self.engine
        check_number(texts, engine.config, "$.texts")
        found = await engine.encode_all(texts, "classify", "$.texts")
        return [label_of(dict(zip(engine.labels, one.values, strict=True))) for one in found]


class Pairs:
    """Makes prompts of queries and documents, as a cross-encoder was trained with."""

    def __init__(self, engine: PoolingEngine) -> None:
        model = engine.llm.model_config
        # Of our own: it is used in threads, and vLLM's is in others.
        self._tokenizer = copy.deepcopy(engine.llm.get_tokenizer())
        self._lock = threading.Lock()
        self._most: int = model.max_model_len
        self._separate = bool(model.use_sep_token)
        self._config = engine.config

    def of(self, query: str, documents: Sequence[str]) -> list[Pair]:
        """Give the tokens of each pair, and where the document begins if the model wants to know.

        Raises InvalidArgumentError for a query that leaves no room for a document.
        """
        with self._lock:
            return [self._pair(query, document) for document in documents]

    def _pair(self, query: str, document: str) -> Pair:
        template, cut = self._config.score_template, self._config.truncate
        options: dict[str, Any] = {"truncation": "only_second", "max_length": self._most} if cut else {}
        if template is not None or not self._separate:
            # The query first, lest a document with {query} in it is taken for a template.
            before, _, after = (template or QUERY + DOCUMENT).partition(DOCUMENT)
            whole = before.replace(QUERY, query) + document + after.replace(QUERY, query)
            if cut:
                options["truncation"] = True
            return self._tokenizer(whole, **options)["input_ids"], None
        try:
            encoded = self._tokenizer(text=query, text_pair=document, **options)
        except Exception as error:
            raise chains.InvalidArgumentError(f"the query leaves no room: {one_line(error)}", path="$.query") from error
        kinds = encoded.get("token_type_ids")
        return encoded["input_ids"], None if kinds is None else (kinds.index(1) if 1 in kinds else len(kinds))


def check_number(given: Sequence[Any], config: VLLMPoolingConfig, path: str) -> None:
    """Raise InvalidArgumentError for more texts than one request may have."""
    if len(given) > config.max_inputs:
        raise chains.InvalidArgumentError(f"{len(given)} texts, and at most {config.max_inputs} are taken", path=path)


def cut_to(asked: int | None, model: Any) -> int | None:
    """Give how many dimensions vectors of a model, vLLM's ``ModelConfig``, are to be cut to; None for all it has.

    Raises InvalidArgumentError for a number that it was not trained for.
    """
    if asked is None or asked == model.embedding_size:
        return None
    if not model.is_matryoshka:
        told = f"the model has {model.embedding_size} dimensions, and was not trained for fewer"
    elif model.matryoshka_dimensions and asked not in model.matryoshka_dimensions:
        told = f"the model has {', '.join(map(str, model.matryoshka_dimensions))} dimensions"
    elif asked > model.embedding_size:
        told = f"the model has at most {model.embedding_size} dimensions"
    else:
        return asked
    raise chains.InvalidArgumentError(f"{told}; {asked} were asked for", path="$.dimensions")


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Give the cosine of two vectors; 0 if one of them is of zeros."""
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(map(operator.mul, one, other)) / lengths if lengths else 0.0


def label_of(scores: Mapping[str, float]) -> Label:
    best = max(scores, key=scores.__getitem__)
    return Label(best, scores[best], dict(scores))
