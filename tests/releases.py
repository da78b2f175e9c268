"""Whole tiny releases: weights, tokenizer and chat template as each family is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.model.checkpoints import bailing, minimax, native, transnormer
from tests.model.checkpoints.formulas import Oracle
from tests.server.api.checkpoint import write_tokenizer
from tests.server.pieces import train

MINIMAX_TOKENS = (
    *("<end_of_document>", "<begin_of_document>"),
    *("<beginning_of_sentence>", "<end_of_sentence>"),
)
# content is a list of parts, as the published template reads it
MINIMAX_TEMPLATE = """\
{{- '<begin_of_document>' -}}
{%- macro text(content) -%}
{%- for part in content -%}{{ part['text'] }}{%- endfor -%}
{%- endmacro -%}
{%- set heads = {'user': 'user name=user', 'assistant': 'ai name=assistant',
                 'system': 'system ai_setting=assistant', 'tool': 'tool name=tools'} -%}
{%- for message in messages -%}
{{- '<beginning_of_sentence>' + heads[message['role']] + '\\n' + text(message['content'])
    + '<end_of_sentence>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<beginning_of_sentence>ai name=assistant\\n' -}}{%- endif -%}
"""
RING_TOKENS = "<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>"
RING_TEMPLATE = """\
{%- set thinking = 'on' if enable_thinking | default(true) else 'off' -%}
{%- set first = messages[0] if messages[0].role == 'system' else none -%}
{{- '<role>SYSTEM</role>' + (first.content + '\\n' if first else '') -}}
{{- 'detailed thinking ' + thinking + '<|role_end|>' -}}
{%- for message in messages if message.role != 'system' -%}
{{- '<role>' + {'user': 'HUMAN', 'assistant': 'ASSISTANT'}[message.role] + '</role>' -}}
{{- message.content + '<|role_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}
"""
BYTES = 256  # ids of the byte-level tokenizers, special tokens after them


@dataclass(frozen=True)
class Release:
    """How a release is written; `chat` is "Hi" after the system's "Be kind", as its template has
    it, or None; `convert` whether it has to be converted."""

    write: Callable[[Path], Oracle]
    chat: str | None = None
    convert: bool = False


def _minimax(path: Path, **changes: object) -> Oracle:
    oracle = minimax.write(path, vocab_size=BYTES + len(MINIMAX_TOKENS), **changes)
    write_tokenizer(path, MINIMAX_TOKENS, MINIMAX_TEMPLATE, eos="<end_of_sentence>")
    generation = {"eos_token_id": BYTES + MINIMAX_TOKENS.index("<end_of_sentence>")}
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "modeling_minimax_text_01.py").write_text("raise SystemExit('remote code ran')")
    return oracle


def _native(path: Path) -> Oracle:
    end = BYTES + MINIMAX_TOKENS.index("<end_of_sentence>")
    oracle = native.write(path, vocab_size=BYTES + len(MINIMAX_TOKENS), eos_token_id=end)
    write_tokenizer(path, MINIMAX_TOKENS, MINIMAX_TEMPLATE, eos="<end_of_sentence>")
    return oracle


def _transnormer(path: Path) -> Oracle:
    """Two pickles with an index, the tied head in both places, and SentencePiece."""
    pieces = train()
    config, tensors, oracle = transnormer.make(vocab_size=640)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    state = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    names = ["model.embed_tokens.weight", "lm_head.weight", *tensors]
    parts = [names[:6], names[6:]]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (path / "tokenizer.model").write_bytes(pieces)
    settings = {
        "tokenizer_class": "BaiChuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "add_bos_token": False,
        "add_eos_token": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for module in ("modeling_transnormer", "tokenization_baichuan"):
        (path / f"{module}.py").write_text("raise SystemExit('remote code ran')")
    return oracle


def _ring(path: Path) -> Oracle:
    end = BYTES + RING_TOKENS.index("<|endoftext|>")
    changes = {"vocab_size": BYTES + len(RING_TOKENS), "eos_token_id": end, "pad_token_id": end}
    oracle = bailing.write(path, **changes)
    write_tokenizer(path, RING_TOKENS, RING_TEMPLATE, eos="<|role_end|>", bos="<|startoftext|>")
    return oracle


M1_CHAT = (
    "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nBe kind"
    "<end_of_sentence>\n<beginning_of_sentence>user name=user\nHi<end_of_sentence>\n"
    "<beginning_of_sentence>ai name=assistant\n"
)
RELEASES = {
    "MiniMax-M1": Release(lambda path: _minimax(path, **minimax.M1), M1_CHAT),
    "MiniMax-M1-hf": Release(_native, M1_CHAT),
    "TransNormerLLM": Release(_transnormer, convert=True),
    "Ring-mini-linear-2.0": Release(
        _ring,
        "<role>SYSTEM</role>Be kind\ndetailed thinking on<|role_end|><role>HUMAN</role>Hi"
        "<|role_end|><role>ASSISTANT</role>",
    ),
}
