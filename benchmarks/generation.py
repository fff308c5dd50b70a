"""How streams of an engine are loaded and measured, whichever way they come: in this process or over HTTP.

Every system gets the same conversations and the same greedy settings. Tokens are counted by their ids: an engine may
put several into one chunk. Answers are taken apart after the clock has stopped.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from benchmarks.driving import WrongAnswerError
from benchmarks.http_caller import Pool
from chains_stream import openai

T = TypeVar("T")
CHAT = "/v1/chat/completions"
Tokens = list[int]


class Load(msgspec.Struct, kw_only=True, frozen=True):
    """So many streams at once, until so many questions are answered, with `tokens` tokens each."""

    streams: int
    questions: int
    tokens: int


class Figures(msgspec.Struct, kw_only=True):
    """What one system did under a load, once. Times are in seconds.

    Attributes:
        seconds: from the first question to the last answer.
        first: from each question to its first token.
        answers: token ids, in the order of the questions.
    """

    seconds: float
    first: list[float]
    answers: list[Tokens]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


class Client(Generic[T]):
    """Asks questions one way: `read` gives what was answered, and calls its second argument at the first token."""

    def __init__(
        self, read: Callable[[int, Callable[[], None]], Awaitable[T]], tokens_of: Callable[[T], Tokens]
    ) -> None:
        self.read = read
        self.tokens_of = tokens_of


def question(number: int) -> str:
    """Give a question that differs from the others from its first letter on, so that no prefix cache helps."""
    return f"{number * 7919 % 10_007:05d}: what is said of the number {number}, and of the one after it?"


def request(number: int, tokens: int) -> openai.ChatCompletionRequest:
    """Give the request of a question: the likeliest tokens, just so many."""
    return openai.ChatCompletionRequest(
        messages=[openai.ChatMessage("user", question(number))],
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        stream=True,
        return_token_ids=True,
    )


def body(number: int, tokens: int, model: str) -> bytes:
    """Write the same for OpenAI's API."""
    return msgspec.json.encode(msgspec.structs.replace(request(number, tokens), model=model))


async def measure(client: Client[T], load: Load) -> Figures:
    """Ask all the questions, so many at once, and read the answers to their ends. Raises WrongAnswerError."""
    first: list[float] = []
    answers: dict[int, T] = {}
    numbers = iter(range(load.questions))

    async def lane() -> None:
        for number in numbers:
            asked = time.perf_counter()
            answers[number] = await client.read(number, lambda asked=asked: first.append(time.perf_counter() - asked))  # type: ignore[misc] # a default of a lambda

    began = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(load.streams)))
    seconds = time.perf_counter() - began
    found = [client.tokens_of(answers[number]) for number in range(load.questions)]
    for number, tokens in enumerate(found):
        if len(tokens) != load.tokens:
            raise WrongAnswerError(f"{len(tokens)} tokens instead of {load.tokens} to question {number}")
    return Figures(seconds=seconds, first=first, answers=found)


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


_decode = msgspec.json.Decoder(_Chunk).decode
_HAS_TOKENS = b'"token_ids":['


def http_client(pool: Pool, tokens: int, model: str) -> Client[bytes]:
    """Ask a server of OpenAI's API."""

    async def read(number: int, first: Callable[[], None]) -> bytes:
        connection = await pool.take()
        begun = False
        async for piece in connection.stream(CHAT, body(number, tokens, model)):
            if not begun and _HAS_TOKENS in piece:
                begun = True
                first()
        pool.give_back(connection)
        return connection.body()

    return Client(read, tokens_in)


def tokens_in(events: bytes) -> Tokens:
    """Give the token ids of a stream of events. Raises WrongAnswerError for one that failed."""
    found: Tokens = []
    for event in events.split(b"\n\n"):
        data = event.removeprefix(b"data: ").strip()
        if not event.startswith(b"data: ") or data == b"[DONE]":
            continue  # a comment keeps a connection that rests
        try:
            chunk = _decode(data)
        except msgspec.DecodeError as error:
            raise WrongAnswerError(f"{error}: {data[:200]!r}") from error
        for choice in chunk.choices:
            found += choice.token_ids or ()
    return found
