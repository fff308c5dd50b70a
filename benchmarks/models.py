"""Models that need no download: a tiny one for a CPU, and ones of a real shape whose weights vLLM makes up."""

import json
from pathlib import Path
from typing import Any

from tests.vllm import tiny

VOCABULARY = 32_000  # of a model of a real shape: bytes, and tokens that no text has
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "intermediate_size": 8192},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
}


def make_tiny(folder: Path) -> Path:
    """Make the model of two layers that the tests have."""
    return tiny.make(folder)


def make_shape(folder: Path, size: str) -> Path:
    """Make a Llama of a size, for ``load_format="dummy"``: its config and a tokenizer of bytes, and no weights."""
    tiny.make(folder)
    (folder / "model.safetensors").unlink()
    shape = SHAPES[size]
    config = _read(folder / "config.json") | shape
    config |= {"head_dim": shape["hidden_size"] // shape["num_attention_heads"], "num_key_value_heads": 8}
    config |= {"vocab_size": VOCABULARY, "dtype": "bfloat16", "max_position_embeddings": 8192}
    _write(folder / "config.json", config)
    tokenizer = _read(folder / "tokenizer.json")
    known: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    known |= {f"<{number}>": number for number in range(len(known), VOCABULARY) if number not in special}
    _write(folder / "tokenizer.json", tokenizer)
    return folder


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
