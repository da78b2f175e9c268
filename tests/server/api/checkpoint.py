"""A byte-level tokenizer with a chat template, as a checkpoint directory without weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from server.api.detokenizer import _byte_alphabet

SPECIALS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(256, 261)
VOCAB = 272
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_checkpoint(path: Path, template: str = TEMPLATE, **generation: object) -> Path:
    """Fill `path` with what the API process reads of a checkpoint."""
    path.mkdir(parents=True)
    write_tokenizer(path, SPECIALS, template, eos="<|endoftext|>")
    generation = {"eos_token_id": [END_OF_TEXT, END], **generation}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def write_tokenizer(
    path: Path, specials: Sequence[str], template: str | None, *, eos: str, **config: object
) -> None:
    """A byte-level tokenizer.json with special tokens from id 256 on, and a chat template."""
    vocab = {char: byte for char, byte in _byte_alphabet().items()}
    added = [
        {
            "id": 256 + index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, content in enumerate(specials)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
