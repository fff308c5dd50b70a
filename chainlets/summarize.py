"""A streamed summary of a document: its most telling sentences, in its own words and order.

    chains run chainlets/summarize.py
    curl -N localhost:8000/run_remote --json @chainlets/documents/whale.json

Plain Python, no model and no weights. `Summarize` has the document split, weighs its words, has batches of sentences
scored on as many workers as there are, and streams the best ones. Scores as cheap as these could be had in place; put a
model into `ScoreSentences`, and the rest stays as it is.
"""

import asyncio
import heapq
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import chain
from typing import Annotated

import msgspec

import chains_stream as chains

Document = Annotated[str, msgspec.Meta(max_length=200_000, description="Plain text, up to 200,000 characters")]
Length = Annotated[int, msgspec.Meta(ge=1, le=50, description="How many sentences the summary has")]
Vector = dict[str, float]

BATCH = 20  # sentences in a call: few enough that an article of some pages is spread over several workers
MAX_BATCHES = 64  # longer documents get larger batches instead, so that one caller does not crowd out the others
TOPIC_WORDS = 1_000  # go along with every batch, some 30 kB; the words left out weigh next to nothing
CANDIDATES = 500  # only these are compared with the sentences chosen, which bounds the work of any document
BRIEF, LONG = 10, 80  # words; shorter sentences ("Why so?") and longer ones count for proportionally less
RELEVANCE = 0.7  # λ of maximal marginal relevance: what centrality counts, against 0.3 for novelty
SAME = 0.6  # sentences with a cosine from here on are taken to say the same, and only one of them is chosen


class Topic(msgspec.Struct, frozen=True):
    """What a whole document is about: all it takes to score one of its sentences.

    Of N sentences n_w have the word w, and v_i is the tf·idf vector of sentence i, scaled to length 1. Then
    idf[w] = ln(1 + N / n_w), centroid = Σ_i v_i / N, and rarest = ln(1 + N) is the idf of words left out.
    """

    idf: Vector
    centroid: Vector
    rarest: float


class SplitSentences(chains.ChainletBase):
    """Takes the text of a document, gives its sentences in order.

    A stop ends a sentence or belongs to an abbreviation; a function word that comes next with a capital tells which
    (the orthographic heuristic of Kiss and Strunk, Computational Linguistics 32(4), 2006, with fixed lists).
    """

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=4))

    async def run_remote(self, document: Document) -> list[str]:
        # In a thread, here and below: a megabyte takes tenths of a second, and an event loop that stands still so
        # long keeps every other request waiting, and the heartbeats by which Kafka knows that the worker lives.
        return await asyncio.to_thread(lambda: list(split_sentences(document)))


class ScoreSentences(chains.ChainletBase):
    """Takes some sentences of a document and its topic, gives a score from 0 to 1 for each.

    The score is LexRank (Erkan and Radev, Journal of Artificial Intelligence Research 22, 2004), continuous and
    undamped: how often one comes by a sentence, walking at random from each to those like it. In such an undirected
    graph that is proportional to the degree, score_i = Σ_j v_i·v_j / N = v_i·centroid. So there is no matrix of N by N,
    no iteration, and a batch needs nothing of the others.
    """

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=4))

    async def run_remote(self, sentences: list[str], topic: Topic) -> list[float]:
        return await asyncio.to_thread(lambda: [centrality(sentence, topic) for sentence in sentences])


@chains.mark_entrypoint
class Summarize(chains.ChainletBase):
    """Takes a document, streams its best sentences in order, each a line of text.

    Best means central and not said yet: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).
    """

    remote_config = chains.RemoteConfig(compute=chains.Compute(predict_concurrency=64))

    def __init__(
        self,
        split: SplitSentences = chains.depends(SplitSentences, retries=3, timeout_sec=60),
        score: ScoreSentences = chains.depends(ScoreSentences, retries=3, timeout_sec=60),
    ) -> None:
        self._split = split
        self._score = score

    async def run_remote(self, document: Document, sentences: Length = 5) -> AsyncIterator[str]:
        text = await self._split.run_remote(document)
        topic = await asyncio.to_thread(find_topic, text)
        size = max(BATCH, math.ceil(len(text) / MAX_BATCHES))
        batches = [text[start : start + size] for start in range(0, len(text), size)]
        scores = await asyncio.gather(*(self._score.run_remote(batch, topic) for batch in batches))
        for position in await asyncio.to_thread(choose, text, [*chain(*scores)], topic, sentences):
            yield text[position] + "\n"


# ruff: noqa: RUF001, SIM905 - prose has curly quotes and long dashes, and lists of words read best as words

# Function words: they tell nothing of a topic.
STOP_WORDS = frozenset(
    """
    a about above after again all almost also although always am among an and another any are as at be because been
    before being between both but by can cannot could did do does don't down during each either else even ever every
    few for from had has have having he hence her here hers herself him himself his how however i if in indeed into is
    it its itself just least less let like many may me might more most much must my myself neither never no nor not
    now of off on once one only or other others our ours out over own perhaps rather same shall she should since so
    some still such than that the thee their them themselves then there therefore these they this those thou though
    through thus thy to too under until up upon us very was we well were what when whence where whether which while
    who whole whom whose why will with within without would ye yet you your yours
    """.split(),
)
NEVER_LAST = frozenset(
    "capt cf col dr e.g gen gov hon i.e lt messrs mlle mme mr mrs ms pres prof rep rev sen sgt viz vs".split(),
)
BEFORE_NUMBERS = frozenset(
    "apr art aug ch dec eq feb fig figs jan jul jun mar no nos nov oct p pp sec sep sept vol vols".split(),
)
SOMETIMES_LAST = frozenset("al approx ave bros ca co corp dept ed eds est etc inc jr ltd mt sr st".split())
INITIALS = re.compile(r"[^\W\d]|(?:[^\W\d]{1,2}\.)+[^\W\d]{1,2}")  # J, U.S, p.m, Ph.D
NUMBERING = re.compile(r"\W*(?:[\d.]+|[ivxlc]+|\w)", re.IGNORECASE)  # of the item of a list, or a chapter
LIST_ITEM = re.compile(r"\s*(?:[-*+•◦▪#|]|#{2,6}|\(?\d{1,3}[.)]|\(?[a-z]\))\s|\s*```")  # or Markdown's other blocks
HEADING = re.compile(r"\S.{0,48}\w\s*")
OPENING = " '\"“‘«„([{_*¿¡—–-"  # what may stand before the first letter
STOP = re.compile(
    # Tried once for each run of stops, not at every one, lest a megabyte of "!!!" take quadratic time.
    r"""(?<![.!?…؟۔।॥።])(?P<stop>[.!?…؟۔।॥።]++)(?:['"”’»)\]_*]|\[\d+\])*+(?=\s)"""
    r"""|[。！？｡]+[」』）”’]*""",  # scripts that put no space between sentences
)
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’][^\W_]+)*")  # a Han or Kana sign counts as a word
ENDING = re.compile(r"['’]s$|(?<=...)(?<![us])s$")  # of possessives and plurals, after Harman's S-stemmer


def split_sentences(document: str) -> Iterator[str]:
    """Yields the sentences with single spaces between the words; nothing but space is lost."""
    for paragraph in split_paragraphs(document):
        start = 0
        for stop in STOP.finditer(paragraph):
            if stop["stop"] is None or ends_sentence(paragraph, start, stop):
                yield paragraph[start : stop.end()].strip()
                start = stop.end()
        if rest := paragraph[start:].strip():
            yield rest


def split_paragraphs(document: str) -> Iterator[str]:
    """Yields what no sentence reaches across: paragraphs, headings, items of lists."""
    lines: list[str] = []
    for line in [*document.splitlines(), ""]:
        first = lines[0].lstrip() if len(lines) == 1 else ""
        is_heading = first.startswith("#") or (HEADING.fullmatch(first) and line.lstrip()[:1].isupper())
        if lines and (is_heading or not line.strip() or LIST_ITEM.match(line)):
            yield " ".join(" ".join(lines).split())
            lines = []
        if line.strip():
            lines.append(line)


def ends_sentence(paragraph: str, start: int, stop: re.Match[str]) -> bool:
    """Whether the sentence begun at `start` is over at this stop, by the word on either side."""
    before = paragraph[max(start, stop.start() - 20) : stop.start()]
    after = paragraph[stop.end() : stop.end() + 40].lstrip(OPENING)
    if after[:1].islower() or after[:1] in ".,;:!?…)]}»":
        return False
    if stop["stop"] != ".":
        return True
    word = before.rpartition(" ")[2].strip(OPENING).casefold()
    if word in NEVER_LAST or NUMBERING.fullmatch(before):
        return False
    if word in BEFORE_NUMBERS:
        return not after[:1].isdigit()
    if word in SOMETIMES_LAST or INITIALS.fullmatch(word):
        following = re.match(r"[^\W\d]+(?!\.)", after)
        return following is not None and following[0].casefold() in STOP_WORDS
    return True


def terms(sentence: str) -> Counter[str]:
    """Counts the words that tell something of the topic; all of them where none does."""
    words = WORD.findall(sentence.casefold())
    return Counter([ENDING.sub("", word) for word in words if word not in STOP_WORDS] or words)


def unit_vector(sentence: str, idf: Vector, rarest: float) -> Vector:
    """The tf·idf vector of a sentence, scaled to length 1; empty for a sentence without words."""
    weights = {word: count * idf.get(word, rarest) for word, count in terms(sentence).items()}
    length = math.hypot(*weights.values())
    return {word: weight / length for word, weight in weights.items()}


def dot(a: Vector, b: Vector) -> float:
    """The scalar product: of vectors of length 1, the cosine."""
    if len(a) > len(b):
        a, b = b, a
    return sum(weight * b[word] for word, weight in a.items() if word in b)


def find_topic(sentences: Sequence[str]) -> Topic:
    """Reads the document twice: in how many sentences each word is, then what it weighs in all of them."""
    containing = Counter(chain.from_iterable(terms(sentence).keys() for sentence in sentences))
    idf = {word: math.log1p(len(sentences) / count) for word, count in containing.items()}
    rarest = math.log1p(len(sentences))
    weights = dict.fromkeys(idf, 0.0)
    for sentence in sentences:
        for word, weight in unit_vector(sentence, idf, rarest).items():
            weights[word] += weight / len(sentences)
    heaviest = heapq.nlargest(TOPIC_WORDS, weights, key=weights.__getitem__)
    return Topic({word: idf[word] for word in heaviest}, {word: weights[word] for word in heaviest}, rarest)


def centrality(sentence: str, topic: Topic) -> float:
    """The mean cosine of a sentence with all sentences of its document, less if it is brief or very long."""
    words = len(WORD.findall(sentence)) or 1
    mean_cosine = dot(unit_vector(sentence, topic.idf, topic.rarest), topic.centroid)
    return min(1.0, mean_cosine) * min(1.0, words / BRIEF, LONG / words)


def choose(sentences: Sequence[str], scores: Sequence[float], topic: Topic, length: int) -> list[int]:
    """The positions of the best sentences in order: `length` of them, fewer where the others repeat these."""
    distinct: dict[tuple[str, ...], int] = {}
    for position, sentence in enumerate(sentences):
        if words := tuple(terms(sentence)):
            distinct.setdefault(words, position)
    best = heapq.nlargest(CANDIDATES, distinct.values(), key=scores.__getitem__)
    vectors = {position: unit_vector(sentences[position], topic.idf, topic.rarest) for position in best}
    overlap = dict.fromkeys(best, 0.0)  # the cosine with the most similar of those chosen
    highest = max((scores[position] for position in best), default=0.0) or 1.0
    chosen: list[int] = []
    while overlap and len(chosen) < length:
        gain = {p: RELEVANCE * scores[p] / highest - (1 - RELEVANCE) * cosine for p, cosine in overlap.items()}
        chosen.append(max(gain, key=gain.__getitem__))
        newest = vectors[chosen[-1]]
        overlap = {p: max(cosine, dot(vectors[p], newest)) for p, cosine in overlap.items() if p != chosen[-1]}
        overlap = {p: cosine for p, cosine in overlap.items() if cosine < SAME}
    return sorted(chosen)
