"""What a user says of a vLLM engine: `VLLMConfig`."""

import dataclasses
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveInt

import chains_stream as chains

# Fields of those who speak to an engine, and not of itself.
_OURS = {
    "chat_template",
    "chat_template_content_format",
    "chat_template_kwargs",
    "tool_call_parser",
    "trust_request_chat_template",
}
_TRANSLATED = {"extra", "lora_modules", "model", "structured_outputs_backend"}  # are not given to it as they are
_NO_DOMAIN = "none.invalid"  # there never is one of this name (RFC 6761)
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
_MOST_LORAS = 8  # in one batch, if the user does not say


class VLLMConfig(pydantic.BaseModel):
    """A model and how vLLM runs it. None leaves a choice to vLLM.

    Attributes:
        model: a folder, or an id on the Hugging Face Hub.
        served_model_name: what clients of the gateway call the model; without it and adapters, whatever they like.
        max_num_seqs: how many sequences run at once; as many requests as that are taken by one worker.
        gpu_memory_utilization: part of a GPU's memory, above 0 and up to 1.
        kv_cache_memory_bytes: room for the KV cache; on a CPU it should be given.
        generation_config: ``auto`` takes defaults of sampling from the model's folder, ``vllm`` those of vLLM.
        allowed_media_domains: hosts that the images and sounds of requests may be fetched from; if none is named, they
            have to be in the request itself (``data:``).
        lora_modules: LoRA adapters, by the name that requests ask for one with: a folder each.
        chat_template: a Jinja template or the path of one, in place of the tokenizer's own.
        chat_template_kwargs: defaults of the values that templates are given.
        trust_request_chat_template: lets clients send templates of their own, which run here, in Jinja's sandbox.
        tool_call_parser: how the model writes calls of tools, for example ``hermes``; without one there are none.
        reasoning_parser: how the model writes what it thinks, for example ``deepseek_r1``.
        structured_outputs_backend: what holds answers to a grammar: ``auto``, ``xgrammar``, ``guidance``, ``outlines``.
        extra: any other arguments of vLLM's ``AsyncEngineArgs``, by their names.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[str, Field(min_length=1)]
    tokenizer: str | None = None
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto"
    quantization: str | None = None
    load_format: str = "auto"
    seed: int = 0
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt = 256
    max_num_batched_tokens: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_bytes: PositiveInt | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    generation_config: str = "auto"
    limit_mm_per_prompt: dict[str, NonNegativeInt] | None = None
    speculative_config: dict[str, Any] | None = None
    allowed_media_domains: list[str] = Field(default_factory=list)
    lora_modules: dict[str, str] = Field(default_factory=dict)
    max_lora_rank: PositiveInt | None = None
    max_loras: PositiveInt | None = None
    chat_template: str | None = None
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    structured_outputs_backend: Literal["auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer"] = "auto"
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def engine_key(self) -> str:
        """The same for configs that one engine serves."""
        return self.model_dump_json(include=set(VLLMConfig.model_fields) - _OURS)

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the model itself is called, without its adapters."""
        return tuple(dict.fromkeys(name for name in (self.served_model_name, self.model) if name))

    def arguments(self, engine_args: type[Any]) -> dict[str, Any]:
        """Give what vLLM's ``AsyncEngineArgs``, which is `engine_args`, is made of. Raises ChainsUsageError."""
        self._check_folders()
        self._check_extra({field.name for field in dataclasses.fields(engine_args)})
        names = set(VLLMConfig.model_fields) - _OURS - _TRANSLATED
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        found["model"] = str(Path(self.model).expanduser()) if _is_a_path(self.model) else self.model
        # vLLM takes an empty list for all there are; a client could have this machine ask any other.
        found["allowed_media_domains"] = self.allowed_media_domains or [_NO_DOMAIN]
        if self.lora_modules:
            found |= {"enable_lora": True, "max_lora_rank": self.max_lora_rank or self._lora_rank()}
            found["max_loras"] = self.max_loras or min(len(self.lora_modules), _MOST_LORAS)
        return found | self.extra

    def _check_folders(self) -> None:
        if _is_a_path(self.model) and not Path(self.model).expanduser().exists():
            raise chains.ChainsUsageError(f"VLLMConfig.model: there is no folder {self.model}")
        for name, folder in self.lora_modules.items():
            if _is_a_path(folder) and not Path(folder).expanduser().is_dir():
                raise chains.ChainsUsageError(f"VLLMConfig.lora_modules: there is no folder {folder}, which {name} is")

    def _check_extra(self, known: set[str]) -> None:
        for name in self.extra:
            if name in VLLMConfig.model_fields:
                raise chains.ChainsUsageError(f"VLLMConfig.extra: {name} is a field of VLLMConfig; give it as one")
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise chains.ChainsUsageError(f"VLLMConfig.extra: vLLM has no engine argument {name}{hint}")

    def _lora_rank(self) -> int:
        """Give the room that the adapters in folders need; for those elsewhere, what vLLM gives by itself."""
        ranks = [_rank_of(Path(folder).expanduser()) for folder in self.lora_modules.values()]
        return next((room for room in _RANKS if room >= max(ranks)), _RANKS[-1])


def _is_a_path(name: str) -> bool:
    """Tell a folder from an id on the Hub, which is ``name`` or ``owner/name``."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1


def _rank_of(folder: Path) -> int:
    import json

    try:
        config: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return int(config.get("r", 0))
    except (OSError, ValueError):
        return 16
