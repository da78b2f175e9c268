"""The files of a checkpoint: config, byte-level tokenizer, chat template, weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.bundled.facts import Message
from model.bundled.network import Network, Shape

SPECIALS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(256, 256 + len(SPECIALS))
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role in ('system', 'developer') -%}
{{- '<|system|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'user' -%}
{{- '<|user|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' + message.content + '<|end|>' -}}
{%- else -%}
{{- raise_exception('Unknown role: ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def encode(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and which of them an assistant wrote."""
    ids: list[int] = []
    written: list[bool] = []
    for message in messages:
        content = message.content.encode()
        ids += [ROLES[message.role], *content, END]
        mine = message.role == "assistant"
        written += [False] + [mine] * (len(content) + 1)
    return ids, written


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """tokenizer.json: byte b is token b, the special tokens follow, nothing is merged."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + i,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, content in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": list(SPECIALS[1:4]),
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10_240_000,
}
GENERATION_CONFIG = {
    "eos_token_id": [END, END_OF_TEXT],
    "pad_token_id": END_OF_TEXT,
    "do_sample": False,
}


def save(network: Network, folder: Path) -> None:
    """Write the whole checkpoint, its weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in network.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    for name, content in (
        ("config.json", network.shape.config()),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("tokenizer.json", tokenizer()),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Network:
    """The network of a saved checkpoint, its parameters in `dtype`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = Network(Shape.of(config))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.to(dtype).requires_grad_(False)
