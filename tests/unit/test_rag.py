"""What `chainlets/rag.py` promises where there are no models: passages, answers, their sources, and the Chain whole."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import chains_stream as chains
from chainlets import rag
from chains_stream import openai

HANDBOOK = "The office opens at nine. Parking is behind the house. Visitors sign the book in the hall."
CANTEEN = "Lunch is served from noon to two. The canteen takes cards, and no coins. On Fridays there is fish."


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two documents, which the Chain reads."""
    folder = tmp_path / "documents"
    (folder / "house").mkdir(parents=True)
    (folder / "house" / "handbook.txt").write_text(HANDBOOK, encoding="utf-8")
    (folder / "canteen.json").write_text(json.dumps({"title": "Canteen", "text": [CANTEEN]}), encoding="utf-8")
    monkeypatch.setattr(rag, "settings", rag.Settings(documents=folder))
    return folder


FROM_THE_FOLDER = pytest.mark.usefixtures("documents")


def asking(question: str, **more: object) -> openai.ChatCompletionRequest:
    return openai.ChatCompletionRequest(messages=[openai.ChatMessage("user", question)], **more)  # type: ignore[arg-type]


class FailingOnce:
    """Stands for `Embed`, and fails when it is first asked."""

    def __init__(self) -> None:
        self.asked = 0
        self._embed = rag.HashedEmbed()

    async def run_remote(self, request: openai.EmbeddingRequest) -> openai.EmbeddingResponse:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("out of memory")
        return await self._embed.run_remote(request)


async def answer(chunks: AsyncIterator[openai.ChatCompletionChunk]) -> str:
    return "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])


class TestTheChain:
    @FROM_THE_FOLDER
    async def test_answers_and_cites_in_one_process(self) -> None:
        with chains.run_local():
            ask = rag.Ask()
        said = await answer(ask.run_remote(asking("When does the office open?")))
        assert said == "The office opens at nine. [1]\n\nSources: [1] house/handbook.txt"

    @FROM_THE_FOLDER
    async def test_answers_and_cites_over_a_broker(self) -> None:
        async with chains.run_chain(rag.Ask) as chat:
            said = await answer(chat.run_remote(asking("Does the canteen take coins?")))
            many = await asyncio.gather(*(answer(chat.run_remote(asking("Where is parking?"))) for _ in range(20)))
        assert said == "The canteen takes cards, and no coins. [1]\n\nSources: [1] canteen.json"
        assert set(many) == {"Parking is behind the house. [1]\n\nSources: [1] house/handbook.txt"}

    @FROM_THE_FOLDER
    async def test_says_that_the_documents_do_not_say(self) -> None:
        with chains.run_local():
            ask = rag.Ask()
        assert await answer(ask.run_remote(asking("Who painted Guernica?"))) == rag.UNKNOWN

    async def test_the_sample_documents(self) -> None:
        with chains.run_local():
            ask = rag.Ask()
        said = await answer(ask.run_remote(asking("How long is the largest whale?")))
        assert "less than seventy feet in length in the skeleton" in said
        assert "whale.json" in said.rpartition("\n")[2]

    @pytest.mark.parametrize("content", ["", "  ", None])
    @FROM_THE_FOLDER
    async def test_a_question_without_text_is_refused(self, content: str | None) -> None:
        with chains.run_local():
            ask = rag.Ask()
        request = openai.ChatCompletionRequest(messages=[openai.ChatMessage("user", content)])
        with pytest.raises(chains.InvalidArgumentError, match="no question"):
            await answer(ask.run_remote(request))

    @FROM_THE_FOLDER
    async def test_limits_choices_and_stops_are_kept(self) -> None:
        with chains.run_local():
            ask = rag.Ask()
        request = asking("When does the office open?", max_tokens=2, n=2, stop="at")
        chunks = [chunk async for chunk in ask.run_remote(request)]
        ends = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices if c.finish_reason]
        assert ends == [(0, "length"), (1, "length")]
        first = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == 0]
        assert "".join(first) == "The office\n\nSources read: [1] house/handbook.txt"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 4


class TestRetrieving:
    @FROM_THE_FOLDER
    async def test_the_closest_passage_comes_first(self) -> None:
        with chains.run_local():
            retrieve = rag.Retrieve()
        found = await retrieve.run_remote("fish on Fridays at noon", 5)
        assert [passage.source for passage in found][:1] == ["canteen.json"]
        assert found == sorted(found, key=lambda passage: -passage.score)
        assert all(0 < passage.score <= 1.0001 for passage in found)

    async def test_what_can_not_be_read_is_left_out_and_said(
        self, documents: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (documents / "broken.json").write_text("{", encoding="utf-8")
        (documents / "latin.txt").write_bytes(b"caf\xe9")
        (documents / "README.md").write_text("Where these are from.", encoding="utf-8")
        (documents / "picture.png").write_bytes(b"\x89PNG")
        sources = {passage.source for passage in rag.read_passages(documents)}
        assert sources == {"house/handbook.txt", "canteen.json"}
        assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
            f"left out {documents / 'broken.json'}",
            f"left out {documents / 'latin.txt'}",
        ]

    @FROM_THE_FOLDER
    async def test_an_index_that_failed_is_begun_again(self) -> None:
        embed = FailingOnce()
        with chains.run_local():
            retrieve = rag.Retrieve(embed=embed)  # type: ignore[arg-type] # a fake
        with pytest.raises(RuntimeError, match="out of memory"):
            await retrieve.run_remote("parking")
        assert [passage.source for passage in await retrieve.run_remote("parking", 1)] == ["house/handbook.txt"]

    @pytest.mark.parametrize(("made", "message"), [(False, "is no folder"), (True, "has no text in it")])
    async def test_a_folder_of_nothing_is_refused_at_the_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, made: bool, message: str
    ) -> None:
        folder = tmp_path / "none"
        if made:
            folder.mkdir()
        monkeypatch.setattr(rag, "settings", rag.Settings(documents=folder))
        with pytest.raises(chains.ChainsUsageError, match=message):
            async with chains.run_chain(rag.Ask):
                pass

    def test_passages_are_lines_of_whole_sentences_and_lose_nothing(self) -> None:
        text = json.loads((rag.Settings().documents / "whale.json").read_text(encoding="utf-8"))["document"]
        passages = [*rag.split_passages(text)]
        assert "".join("".join(passages).split()) == "".join(text.split())
        assert all(len(passage) <= rag.PASSAGE + 1 and "\n" not in passage for passage in passages)
        assert [*rag.split_passages("x" * 2000)] == ["x" * rag.PASSAGE] * 4
        assert [*rag.split_passages(" \n\n ")] == []


class TestSources:
    def chunks(self, *, listed: bool, text: str) -> list[openai.ChatCompletionChunk]:
        passages = [rag.Passage("a.txt", "A."), rag.Passage("b.txt", "B."), rag.Passage("c.txt", "C.")]
        sources = rag.Sources(passages, listed=listed)
        last = openai.ChatCompletionChunk.of(text[3:], finish_reason="stop", usage=openai.Usage(1, 2))
        given = [openai.ChatCompletionChunk.of(text[:3]), last]
        return [piece for chunk in given for piece in sources.added_to(chunk)]

    @pytest.mark.parametrize(
        ("text", "listed"),
        [
            ("So it is [3], and [1][3].", "Sources: [1] a.txt, [3] c.txt"),
            ("No citation, or one of nothing [9].", "Sources read: [1] a.txt, [2] b.txt, [3] c.txt"),
        ],
    )
    def test_come_after_the_text_and_before_the_end(self, text: str, listed: str) -> None:
        chunks = self.chunks(listed=True, text=text)
        said = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(choice.delta.content or "" for choice in said) == f"{text}\n\n{listed}"
        assert [choice.finish_reason for choice in said] == [*[None] * (len(said) - 1), "stop"]
        assert [chunk.usage for chunk in chunks if chunk.usage] == [openai.Usage(1, 2)]

    def test_do_not_break_an_answer_in_json(self) -> None:
        chunks = self.chunks(listed=False, text='{"a": [1]}')
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == '{"a": [1]}'
        assert rag.takes_a_list(asking("a"))
        assert not rag.takes_a_list(asking("a", response_format=openai.ResponseFormat("json_object")))

    def test_passages_join_the_message_of_the_system(self) -> None:
        request = openai.ChatCompletionRequest(
            model="Ask", messages=[openai.ChatMessage("developer", "Be brief."), openai.ChatMessage("user", "Why?")]
        )
        told, question = rag.grounded(request, [rag.Passage("a.txt", "Because.")]).messages
        assert told.role == "developer"
        assert told.text.startswith("Be brief.\n\n")
        assert told.text.endswith("\n[1] a.txt: Because.")
        assert question.text == "Why?"


class TestSettings:
    def test_an_embedder_needs_its_model(self) -> None:
        with pytest.raises(ValueError, match="embedder=vllm needs an embedding_model"):
            rag.Settings(embedder="vllm")
