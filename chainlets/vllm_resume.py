"""Going on with a generation that another worker began: from its prompt and the tokens that were already sent."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import chains_stream as chains

# What the engine's process is told of a resumed request, in its `extra_args`: see `vllm_sampler`.
EMITTED = "chains_emitted"
SEED = "chains_seed"
PENALTIES = "chains_penalties"


class Sent(NamedTuple):
    """What came to one choice with a chunk; `token_ids` is None if the chunk does not say."""

    choice: int
    token_ids: Sequence[int] | None
    finished: bool


@dataclass
class Past:
    """What was sent of one choice: the tokens of each of its chunks, and whether that is all."""

    chunks: list[list[int]] = field(default_factory=list)
    finished: bool = False

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk]


def pasts(sent: Iterable[Sent]) -> dict[int, Past]:
    """Give what was sent of each choice, by its index. Raises StreamInterruptedError where a chunk has no tokens."""
    found: dict[int, Past] = {}
    for choice, token_ids, finished in sent:
        if token_ids is None:
            raise chains.StreamInterruptedError(
                "the stream can't go on: a chunk that was sent has no token_ids to go on from"
            )
        past = found.setdefault(choice, Past())
        past.chunks.append(list(token_ids))
        past.finished = past.finished or finished
    return found


class Sampler(Protocol):
    """What is known of the engine's sampler."""

    @property
    def continues(self) -> bool:
        """Whether our own part of it, `vllm_sampler`, is there."""

    @property
    def by_position(self) -> bool:
        """Whether the noise of a token is drawn from the seed and the token's position."""

    @property
    def speculative(self) -> bool:
        """Whether it is given several tokens at once, to accept or not."""


def continuing(params: Any, emitted: int, sampler: Sampler) -> Any:
    """Give the ``SamplingParams`` of a request that goes on behind `emitted` tokens, now part of its prompt.

    Stops are left out: they may straddle the tokens that were sent, and are looked for in all of the text.
    Raises StreamInterruptedError where the rest would be another one than that of an undisturbed run.
    """
    if not emitted:
        return params
    if refusal := _refusal(params, sampler):
        raise chains.StreamInterruptedError(f"the stream can't go on where it broke off: {refusal}")
    found = copy.deepcopy(params)
    found.max_tokens = params.max_tokens - emitted
    found.min_tokens = max(0, params.min_tokens - emitted)
    found.stop, found.prompt_logprobs = [], None
    if sampler.continues:
        found.extra_args = dict(params.extra_args or {}) | {EMITTED: emitted}
        if params.seed is not None and params.temperature > 0:
            found.extra_args[SEED], found.seed = params.seed, None
        if _penalties_of_output(params):
            found.extra_args[PENALTIES] = [
                params.presence_penalty,
                params.frequency_penalty,
                params.repetition_penalty,
            ]
            found.presence_penalty, found.frequency_penalty, found.repetition_penalty = 0.0, 0.0, 1.0
    return found


def _refusal(params: Any, sampler: Sampler) -> str | None:
    """Say why a request can't go on as if it had not been interrupted; None if it can."""
    if params.structured_outputs is not None:
        return "its answer is held to a grammar, and the engine can't take that up in the middle"
    if getattr(params, "thinking_token_budget", None) or getattr(params, "repetition_detection", None):
        return "the engine counts what it has written, and can't take that up in the middle"
    seeded = params.seed is not None and params.temperature > 0
    if seeded and (sampler.speculative or not (sampler.continues or sampler.by_position)):
        return "it has a seed, and with speculative decoding the engine would draw other numbers"
    if (_penalties_of_output(params) or params.bad_words) and not sampler.continues:
        return "its penalties and bad words count what was written, and this engine can't take that up in the middle"
    return None


def _penalties_of_output(params: Any) -> bool:
    """Tell whether there are penalties that prompts do not count for: those for repetition take in the prompt."""
    return bool(params.presence_penalty or params.frequency_penalty)
