"""SentencePiece models for tests, trained by the library itself on this project's prose."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece

ROOT = Path(__file__).parents[2]
# as Baichuan's: identity normalisation, every digit alone, bytes for what is unknown
BAICHUAN: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 640,
    "byte_fallback": True,
    "character_coverage": 0.995,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 100_000,
}


def train(**changes: Any) -> bytes:
    """A tokenizer.model's bytes."""
    lines = [
        line
        for name in ("README.md", "CONTRIBUTING.md", "LICENSE", "docs/decay.md")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2 + ["深い川は静かに流れる。", "  two  spaces   "] * 20),
        model_writer=made,
        minloglevel=2,
        **(BAICHUAN | changes),
    )
    return made.getvalue()


def oracle_of(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)
