"""Tiny MiniMax checkpoints in transformers' layout, written and judged by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from tests.model.checkpoints.formulas import Oracle

LIGHTNING, SOFTMAX = "linear_attention", "full_attention"


def tiny_config(**changes: Any) -> MiniMaxConfig:
    """A MiniMax of four layers, two of them softmax, that runs in milliseconds."""
    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 32,
        "layer_types": [LIGHTNING, SOFTMAX, LIGHTNING, SOFTMAX],
        "full_attn_alpha_factor": 1.7,
        "full_attn_beta_factor": 0.9,
        "linear_attn_alpha_factor": 1.6,
        "linear_attn_beta_factor": 1.1,
        "mlp_alpha_factor": 1.5,
        "mlp_beta_factor": 0.8,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    return MiniMaxConfig(**(values | changes))


def write(directory: Path, *, seed: int = 0, max_shard_size: str = "5GB", **changes: Any) -> Oracle:
    """Write a checkpoint and return what it should say."""
    torch.manual_seed(seed)
    oracle = MiniMaxForCausalLM(tiny_config(**changes)).eval().float()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    oracle.save_pretrained(directory, max_shard_size=max_shard_size)
    return lambda ids: _logits(oracle, ids)


@torch.no_grad()
def _logits(oracle: MiniMaxForCausalLM, ids: list[int]) -> torch.Tensor:
    """Float32 logits [T, V] of one no-cache forward with explicit positions."""
    out = oracle(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
    )
    return out.logits[0]
