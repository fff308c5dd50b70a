"""What `chainlets/summarize.py` promises: sentences, scores and choice one by one, then the Chain as a whole."""

# ruff: noqa: RUF001 - other scripts have stops of their own

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chains_stream as chains
from chainlets import summarize

DOCUMENTS = Path(summarize.__file__).parent / "documents"
WHALE = json.loads((DOCUMENTS / "whale.json").read_text(encoding="utf-8"))

PIECES = (
    "The whale swam.|A ship sailed far!|Why?|He said, “Stop.”|U.S.|e.g.|Mr.|...|3.14|- item|1.|# Title|word|Word|!!!"
    "|¿Qué?|鯨は泳ぐ。|\n|\n\n|\t|\u2028|\x1c"
)
prose = st.lists(st.sampled_from(PIECES.split("|")), max_size=60).map(" ".join)
documents = st.one_of(prose, st.text(max_size=300))


def split(document: str) -> list[str]:
    return list(summarize.split_sentences(document))


def without_space(text: str) -> str:
    return "".join(text.split())


def choose(sentences: list[str], length: int) -> list[str]:
    topic = summarize.find_topic(sentences)
    scores = [summarize.centrality(sentence, topic) for sentence in sentences]
    return [sentences[position] for position in summarize.choose(sentences, scores, topic, length)]


class TestSplitting:
    @given(documents)
    def test_loses_nothing_but_space_and_keeps_the_order(self, document: str) -> None:
        assert without_space("".join(split(document))) == without_space(document)

    @given(documents)
    def test_sentences_are_single_trimmed_lines_and_never_empty(self, document: str) -> None:
        for sentence in split(document):
            assert sentence
            assert sentence == " ".join(sentence.split())

    @pytest.mark.parametrize(
        "sentences",
        [
            ["Mr. Smith met Dr. J. R. Brown, i.e. the surgeon.", "They talked."],
            ["He lives in the U.S. Virgin Islands.", "She left the U.S.", "He stayed."],
            ["It began at 5 p.m. on Monday.", "We came at 6 p.m.", "The hall was full."],
            ["Bring bread, milk, etc. to the camp.", "Bring bread, etc.", "It is far."],
            ["Pi is 3.14159, roughly.", "Version 2.0 came out in 1998.", "It cost $4.50."],
            ["See Fig. 3 and vol. 2, pp. 7.", "No. 5 is alive."],
            ["Did he say no?", "He did.", "No.", "He did not."],
            ["Well... perhaps.", "He waited . . . and waited.", "Nothing came…", "Then it did."],
            ["“Stop.”", "He stopped.", '"Why?" he asked.', "(Nobody knew.)", "It ended there.[12]", "So they say."],
            ["Really?!", "Yes!!!", "Oh."],
            ["Kiss et al. (2006) describe it.", "So do others, cf. Reynar."],
            ["George I. was king.", "So was J. S. Bach, in a way."],
            ["Ça va.", "Écoute.", "¿Qué pasa?", "¡Nada!", "Ölpreis steigt."],
            ["هل تفهم؟", "نعم."],
            ["यह एक वाक्य है।", "यह दूसरा है।"],
        ],
    )
    def test_running_prose(self, sentences: list[str]) -> None:
        assert split(" ".join(sentences)) == sentences

    def test_where_lines_are_wrapped_makes_no_difference(self) -> None:
        paragraphs = WHALE["document"].split("\n\n")
        assert split("\n\n".join(textwrap.fill(p, 72) for p in paragraphs)) == split(WHALE["document"])

    def test_chinese_and_japanese_put_no_space_between_sentences(self) -> None:
        assert split("鯨は泳ぐ。船は行く!本当?「はい。」終わり。") == [
            "鯨は泳ぐ。",
            "船は行く!本当?「はい。」",
            "終わり。",
        ]
        assert split("你好！真的吗？是的。") == ["你好！", "真的吗？", "是的。"]

    def test_headings_paragraphs_and_lists_end_sentences_without_a_stop(self) -> None:
        document = (
            "The Whale\n\nOf its size\nIt is large,\nvery large. Indeed.\n\n"
            "## Notes\nto see:\n- one. Two\n* three\n1. four\n(b) five\n| six | 6 |\n"
        )
        assert split(document) == [
            *("The Whale", "Of its size", "It is large, very large.", "Indeed.", "## Notes"),
            *("to see:", "- one.", "Two", "* three", "1. four", "(b) five", "| six | 6 |"),
        ]

    @pytest.mark.parametrize("document", ["", " \n\t\n ", "\u3000\x85"])
    def test_of_nothing_comes_nothing(self, document: str) -> None:
        assert split(document) == []

    @pytest.mark.parametrize(
        "unit", ["!", "!x", ".'", ". ", "e.g. ", "。", "[1", ".[1]", "\n- a", "# a\n", "I. ", " a\n", "-"]
    )
    @pytest.mark.timeout(60)  # quadratic time would be minutes
    def test_takes_linear_time_whatever_the_text(self, unit: str) -> None:
        text = unit * (200_000 // len(unit)) + "x"
        assert "".join("".join(split(text)).split()) == "".join(text.split())


class TestScores:
    @given(documents)
    def test_are_finite_and_within_0_and_1(self, document: str) -> None:
        sentences = split(document)
        topic = summarize.find_topic(sentences)
        for sentence in sentences:
            assert math.isfinite(score := summarize.centrality(sentence, topic))
            assert 0 <= score <= 1

    def test_are_the_mean_cosine_with_every_sentence(self) -> None:
        sentences = [s for s in split(WHALE["document"]) if 12 < len(s.split()) < 70]
        topic = summarize.find_topic(sentences)
        vectors = [summarize.unit_vector(s, topic.idf, topic.rarest) for s in sentences]
        for sentence, vector in zip(sentences, vectors, strict=True):
            mean = math.fsum(summarize.dot(vector, other) for other in vectors) / len(vectors)
            assert summarize.centrality(sentence, topic) == pytest.approx(mean, rel=1e-9)

    def test_what_most_sentences_speak_of_scores_above_an_aside(self) -> None:
        topic = summarize.find_topic(sentences := split(WHALE["document"]))
        central = summarize.centrality(
            "The great Sperm Whale is as large today as in Pliny's time, and will survive.", topic
        )
        aside = summarize.centrality("My aunt keeps a small bakery behind the station, and opens it at seven.", topic)
        assert central > max(aside, sum(summarize.centrality(s, topic) for s in sentences) / len(sentences))

    def test_brief_and_very_long_sentences_count_for_less(self) -> None:
        topic = summarize.find_topic(split(WHALE["document"]))
        brief, usual, long = (summarize.centrality("whale " * words, topic) for words in (2, 20, 400))
        assert (brief, long) == pytest.approx((usual / 5, usual / 5))

    def test_a_long_documents_topic_is_bounded(self) -> None:
        topic = summarize.find_topic([f"Word{n} meets word{n + 1}." for n in range(3_000)])
        assert len(topic.idf) == len(topic.centroid) == summarize.TOPIC_WORDS

    def test_hold_for_other_scripts(self) -> None:
        topic = summarize.find_topic(sentences := split("鯨は大きい。鯨は泳ぐ。海は青い。Кит плывёт. Кит велик."))
        assert all(summarize.centrality(sentence, topic) > 0 for sentence in sentences)


class TestChoice:
    @given(documents, st.integers(1, 50))
    def test_is_in_order_and_never_more_than_asked(self, document: str, length: int) -> None:
        sentences = split(document)
        topic = summarize.find_topic(sentences)
        positions = summarize.choose(sentences, [summarize.centrality(s, topic) for s in sentences], topic, length)
        assert positions == sorted(set(positions))
        assert len(positions) <= min(length, len(sentences))
        assert positions or not any(summarize.WORD.search(sentence) for sentence in sentences)

    @given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 20))
    def test_every_distinct_sentence_is_had_once_before_it_falls_short(self, numbers: list[int], length: int) -> None:
        words = ("whale", "ship", "sea", "storm", "oil", "harpoon", "captain", "island", "bread", "letter")
        chosen = choose([f"{words[n].title()}." for n in numbers], length)
        assert len(chosen) == len(set(chosen)) == min(length, len(set(numbers)))

    def test_no_two_say_the_same(self) -> None:
        same = ["The whale swims in the cold northern sea.", "In the cold northern sea, the whales swim!"]
        other = ["Bread is baked at seven.", "A letter came from Nantucket."]
        chosen = choose([*same, *other, *same], 6)
        assert chosen == [same[0], *other]

    def test_sentences_without_words_are_never_chosen(self) -> None:
        assert choose(["* * *", "To be or not to be.", "—", "!!!"], 5) == ["To be or not to be."]

    def test_a_document_of_one_sentence_is_its_own_summary(self) -> None:
        assert choose(["Whales."], 5) == ["Whales."]

    def test_copies_by_the_thousand_hide_nothing(self) -> None:
        document = ["The whale swims in the cold northern sea."] * 5_000 + ["Bread is baked at seven."]
        assert choose(document, 2) == [document[0], document[-1]]


@pytest.mark.timeout(60)  # anything that grows with the square of the length would take hours
def test_a_megabyte_is_no_problem() -> None:
    text = (WHALE["document"] + "\n\n") * 120
    document = "".join(f"{text[i : i + 80]} {i}" for i in range(0, len(text), 80))[: 2**20]
    assert len(choose(split(document), 50)) == 50


def test_the_document_of_the_readme_is_a_valid_request() -> None:
    assert set(WHALE) == {"document", "sentences"}
    assert msgspec.convert(WHALE["document"], summarize.Document)
    assert msgspec.convert(WHALE["sentences"], summarize.Length) == 5
    assert 1_500 <= len(WHALE["document"].split()) <= 4_000


def test_its_summary_makes_the_chapters_point() -> None:
    summary = " ".join(choose(split(WHALE["document"]), 5))
    assert "they have degenerated?" in summary
    assert "The whale of to-day is as big as his ancestors in Pliny's time." in summary
    assert "gradual extinction of the Sperm Whale" in summary


def test_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from chainlets import summarize as s\n"
        f"text = [*s.split_sentences({WHALE['document']!r})]\n"
        "topic = s.find_topic(text); scores = [s.centrality(x, topic) for x in text]\n"
        "print(list(topic.centroid.items()), scores, s.choose(text, scores, topic, 20))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1


class TestChain:
    async def test_streams_a_line_a_sentence_in_this_process(self) -> None:
        with chains.run_local():
            summary = [line async for line in summarize.Summarize().run_remote(WHALE["document"])]
        assert summary == [sentence + "\n" for sentence in choose(split(WHALE["document"]), 5)]

    async def test_streams_the_same_over_a_broker(self) -> None:
        async with chains.run_chain(summarize.Summarize) as chain:
            summary = [line async for line in chain.run_remote(WHALE["document"], sentences=7)]
        assert summary == [sentence + "\n" for sentence in choose(split(WHALE["document"]), 7)]

    async def test_spreads_a_long_document_over_a_bounded_number_of_batches(self) -> None:
        scored: list[list[str]] = []

        class Fake(summarize.ScoreSentences):
            async def run_remote(self, sentences: list[str], topic: summarize.Topic) -> list[float]:  # noqa: ARG002 - as there
                scored.append(sentences)
                return [0.5] * len(sentences)

        document = " ".join(f"Ship {n} sails to the island of {n * n}." for n in range(3_000))
        with chains.run_local():
            chain = summarize.Summarize(score=Fake())
            assert len([line async for line in chain.run_remote(document, 50)]) == 50
        assert len(scored) == summarize.MAX_BATCHES
        assert [sentence for batch in scored for sentence in batch] == split(document)

    @pytest.mark.parametrize("document", ["", " \n", "* * *"])
    async def test_of_nothing_streams_nothing(self, document: str) -> None:
        with chains.run_local():
            assert [line async for line in summarize.Summarize().run_remote(document)] == []

    @pytest.mark.parametrize(("document", "sentences"), [("Whales.", 0), ("Whales.", 51), ("x" * 200_001, 5)])
    async def test_refuses_what_is_out_of_bounds(self, document: str, sentences: int) -> None:
        with chains.run_local():
            summary = summarize.Summarize().run_remote(document, sentences)
            with pytest.raises(chains.InvalidArgumentError):
                await anext(summary)
