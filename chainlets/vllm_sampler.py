"""How a resumed request is sampled as if it had not been interrupted. It runs inside vLLM's engine process.

vLLM's first model runner keeps, for a request, a random generator and the tokens that it has written. A resumed request
has the tokens that were sent in its prompt, so both would begin anew: its seed would give the noise of the first token
to a later one, and penalties and bad words would not see what was sent. These processors, which act on resumed requests
alone, put that right with vLLM's own functions. A request says by its `extra_args` how many tokens of its prompt are
such (`EMITTED`), its `SEED`, and its `PENALTIES`, which it then doesn't give to vLLM.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from chainlets.vllm_resume import EMITTED, PENALTIES, SEED


class Resumed(LogitsProcessor):  # type: ignore[misc] # vLLM's are Any where types are checked
    """Applies penalties and bad words to all that a resumed request has written, in this process or before."""

    def __init__(self, _vllm_config: Any, device: torch.device, _is_pin_memory: bool) -> None:  # noqa: FBT001 - vLLM's
        self._device = device
        self._rows: dict[int, _Written] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, _Written.of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, written in self._rows.items():
            written.forbid(logits[row])
            if written.penalties:
                self._punish(logits[row : row + 1], written)
        return logits

    def _punish(self, logits: torch.Tensor, written: "_Written") -> None:
        presence, frequency, repetition = (
            torch.tensor([penalty], dtype=torch.float32, device=self._device) for penalty in written.penalties
        )
        prompt = torch.tensor([written.prompt], dtype=torch.int64, device=self._device)
        apply_all_penalties(logits, prompt, presence, frequency, repetition, [written.output])


class _Written:
    """What a resumed request was asked, and has written; `_new` is vLLM's own list, which grows."""

    def __init__(self, prompt: Sequence[int], emitted: int, new: Sequence[int], params: SamplingParams) -> None:
        cut = len(prompt) - emitted
        self.prompt = list(prompt[:cut])
        self.penalties: Sequence[float] = params.extra_args.get(PENALTIES, ())
        self._before = list(prompt[cut:])
        self._new = new
        # Those of one token alone are forbidden by vLLM, wherever they stand.
        self._bad = [bad for bad in params.bad_words_token_ids or () if len(bad) > 1]

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int] | None, new: Sequence[int]) -> "_Written | None":
        emitted = (params.extra_args or {}).get(EMITTED, 0)
        if not emitted or prompt is None:
            return None
        written = cls(prompt, emitted, new, params)
        return written if written.penalties or written._bad else None

    @property
    def output(self) -> list[int]:
        return [*self._before, *self._new]

    def forbid(self, logits: torch.Tensor) -> None:
        """Forbid the last token of each of the bad words whose other tokens were written last, in part before."""
        for bad in self._bad:
            begun = len(bad) - 1
            if len(self._new) < begun and self.output[-begun:] == bad[:-1]:
                logits[bad[-1]] = float("-inf")


class Seeded(LogitsProcessor):  # type: ignore[misc] # vLLM's are Any where types are checked
    """Chooses the tokens of resumed requests that have a seed, with the noise that they would have had."""

    def __init__(self, vllm_config: Any, device: torch.device, _is_pin_memory: bool) -> None:  # noqa: FBT001 - vLLM's
        self._device = device
        self._sampler = TopKTopPSampler(use_fp64_gumbel=vllm_config.model_config.use_fp64_gumbel)
        self._rows: dict[int, _Noise] = {}

    def is_argmax_invariant(self) -> bool:
        return True  # it comes after the temperature, and not to greedy requests

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, self._noise)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, noise in self._rows.items():
            token = noise.choose(logits[row : row + 1])
            logits[row] = float("-inf")
            logits[row, token] = 0.0
        return logits

    def _noise(self, params: SamplingParams, _prompt: Any, new: Sequence[int]) -> "_Noise | None":
        seed = (params.extra_args or {}).get(SEED)
        return None if seed is None else _Noise(self._sampler, seed, params, new, self._device)


class _Noise:
    """The random numbers of one request: those of the tokens that were sent are drawn and thrown away."""

    def __init__(
        self, sampler: Any, seed: int, params: SamplingParams, new: Sequence[int], device: torch.device
    ) -> None:
        self._sampler = sampler
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._skip = params.extra_args[EMITTED] + len(new)  # some are there already after vLLM has put it off
        self._new = new
        self._chosen = -1  # the number, in `new`, of the token that was chosen last
        self._state = self._generator.get_state()  # before it was
        self._top_k = torch.tensor([params.top_k], device=device) if params.top_k > 0 else None
        self._top_p = torch.tensor([params.top_p], device=device) if params.top_p < 1 else None

    def choose(self, logits: torch.Tensor) -> int:
        """Choose the next token, of one row of logits. vLLM may throw it away, and ask for it again."""
        number = len(self._new)
        if number == self._chosen:
            self._generator.set_state(self._state)
        for _ in range(self._skip):
            self._draw(torch.zeros_like(logits), None, None)
        self._skip = 0
        self._chosen, self._state = number, self._generator.get_state()
        top_k = None if self._top_k is None else self._top_k.clamp(max=logits.shape[-1])
        return self._draw(logits.clone(), top_k, self._top_p)

    def _draw(self, logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> int:
        token, _ = self._sampler(logits, {0: self._generator}, top_k, top_p)
        return int(token.item())
