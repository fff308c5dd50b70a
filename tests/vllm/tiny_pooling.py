"""Tiny random models that embed, score and classify, made at once and with no download.

Each is a BERT of two layers, with a tokenizer of single letters: what it says of a text is noise, but the same noise
each time, and such that different texts get clearly different answers.
"""

import json
import string
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 2, 128
MAX_TOKENS = 128
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
DIMENSIONS = (16, 32, HIDDEN)  # of a Matryoshka model
LABELS = {0: "angry", 1: "calm", 2: "glad"}


def make_embedding(folder: Path, *, matryoshka: bool = False) -> Path:
    """Write a model that gives the mean of its states, at length 1, and give the folder."""
    from transformers import BertModel

    config = _config()
    if matryoshka:
        config.matryoshka_dimensions = list(DIMENSIONS)
    _save(folder, BertModel, config)
    steps = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(steps.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


def make_cross_encoder(folder: Path) -> Path:
    """Write a model that scores a text beside another one, and give the folder."""
    from transformers import BertForSequenceClassification

    config = _config()
    config.num_labels = 1
    return _save(folder, BertForSequenceClassification, config)


def make_classifier(folder: Path) -> Path:
    """Write a model of the labels `LABELS`, and give the folder."""
    from transformers import BertForSequenceClassification

    config = _config()
    config.id2label = LABELS
    config.label2id = {label: number for number, label in LABELS.items()}
    return _save(folder, BertForSequenceClassification, config)


def _save(folder: Path, kind: Any, config: Any) -> Path:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        kind(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.2,
    )


def _vocabulary() -> dict[str, int]:
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {piece: number for number, piece in enumerate(pieces)}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary()
    pad, unknown, begin, end, mask = SPECIAL
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token=pad,
        unk_token=unknown,
        cls_token=begin,
        sep_token=end,
        mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
