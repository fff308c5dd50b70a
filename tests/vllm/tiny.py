"""Tiny random models, made at once and with no download: ``python -m tests.vllm.tiny FOLDER``.

A Llama of two layers with a tokenizer of bytes: 256 of them, a few special ones, and no merges, so that one token is
one byte. What it writes is noise, but the same noise for the same prompt, which is what tests need: mostly
printable ASCII, now and then a byte that begins a longer character, and never of itself the end of the text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 2, 128
MAX_POSITIONS = 8192
PAD, BEGIN, END, THINK, THOUGHT = range(256, 261)
SPECIAL = ("<pad>", "<s>", "</s>", "<think>", "</think>")
VOCABULARY = 256 + len(SPECIAL)
SPREAD = 0.2  # wide, so that the likeliest token leads clearly, and differs from place to place

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<tools>' + (tools | tojson) + '</tools>\\n' }}{% endif %}
{%- for message in messages %}{{ '[' + message.role + ']' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{%- if not (loop.last and continue_final_message) %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' + (mood or '') }}{% endif %}"""


def make(folder: Path, seed: int = 0) -> Path:
    """Write a model of 0.5 MB, its tokenizer and its chat template into `folder`, and give the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _config())
    _tokenizer().save(str(folder / "tokenizer.json"))
    pad, begin, end, *_ = SPECIAL
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer_config.json", {"pad_token": pad, "bos_token": begin, "eos_token": end, **kind})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def make_lora(folder: Path, seed: int = 1, rank: int = 8) -> Path:
    """Write a LoRA adapter for a model of `make` into `folder`: random and strong, so that it changes every answer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = _random(random, rank, HIDDEN)
            weights[f"{at}.lora_B.weight"] = _random(random, HIDDEN, rank)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16 * rank, "lora_dropout": 0.0}
    config |= {"target_modules": ["q_proj", "v_proj"], "bias": "none", "base_model_name_or_path": ""}
    _write(folder / "adapter_config.json", config)
    return folder


def _weights(seed: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    head = _random(random, VOCABULARY, HIDDEN)
    # A row of zeros gives a logit of 0, which one of the many others nearly always exceeds.
    head[[*range(32), 127, *range(256, VOCABULARY)]] = 0
    head[128:256] *= 0.75
    weights = {
        "model.embed_tokens.weight": _random(random, VOCABULARY, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": head,
    }
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN)}
    shapes |= {"self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = _random(random, *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(HIDDEN, np.float32)
    return weights


def _random(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.normal(0, SPREAD, shape).astype(np.float32)


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "tie_word_embeddings": False,
    }


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[:3]])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in SPECIAL[3:]])
    return tokenizer


def _letters() -> list[str]:
    """Give the letter for each byte in a byte-level tokenizer: its own if it is visible, else one of 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(make(given.folder, given.seed))  # noqa: T201 - what was asked for on the command line


if __name__ == "__main__":
    main()
