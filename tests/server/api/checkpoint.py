"""A byte-level tokenizer with a chat template, as a checkpoint directory without weights."""

from __future__ import annotations

import json
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
        for index, content in enumerate(SPECIALS)
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
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": [END_OF_TEXT, END], **generation},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    (path / "chat_template.jinja").write_text(template)
    return path
