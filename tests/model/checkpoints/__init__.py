"""Tiny random checkpoints of every family in its released layout, each with an oracle.

An oracle gives the logits [T, V] of every position: transformers where it is right, else a plain
forward pass in float64, token by token. Tests that need any checkpoint take `write`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.model.checkpoints import bailing, minimax, transnormer
from tests.model.checkpoints.formulas import Oracle
from tests.model.checkpoints.native import LIGHTNING, SOFTMAX, write

__all__ = ("KINDS", "LIGHTNING", "ONE_EXPERT", "SOFTMAX", "write")

L, S = LIGHTNING, SOFTMAX
ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}
Write = Callable[[Path], Oracle]
KINDS: dict[str, Write] = {
    # transformers turns the whole head: rotary_dim is left out
    "native-dense-lightning": partial(write, layer_types=[L] * 4, **ONE_EXPERT),
    "native-lightning": partial(write, layer_types=[L] * 4),
    "native-hybrid": write,
    "native-softmax-first": partial(write, layer_types=[S, L, L, S]),
    "native-windowed": partial(write, sliding_window=24, **ONE_EXPERT),
    "native-ring": partial(write, layer_types=[L, S, L, L]),
    "native-tied": partial(write, tie_word_embeddings=True),
    "native-six-heads": partial(
        write, hidden_size=96, num_attention_heads=6, num_key_value_heads=3
    ),
    "minimax-text-01": minimax.write,
    "minimax-m1-six-heads": partial(
        minimax.write, num_attention_heads=6, num_key_value_heads=3, rotary_dim=12, **minimax.M1
    ),
    "transnormer": transnormer.write,
    "transnormer-five-heads-wide": partial(
        transnormer.write,
        decoder_attention_heads=5,
        hidden_dim=80,
        no_scale_embedding=True,
        linear_use_lrpe_list=[1, 0, 1],
    ),
    "transnormer-ring": partial(transnormer.write, tie_word_embeddings=False),
    "ring-linear": bailing.write,
    "ring-linear-hf-decay": partial(
        bailing.write, decay_layer_factor="hf", first_k_dense_replace=0
    ),
    "ring-linear-six-heads-ring": partial(
        bailing.write,
        decay_layer_factor="mlx",
        num_attention_heads=6,
        num_key_value_heads=3,
        group_norm_size=3,
        num_hidden_layers=4,
        layer_group_size=3,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        num_shared_experts=0,
        partial_rotary_factor=1.0,
        tie_word_embeddings=True,
    ),
}
