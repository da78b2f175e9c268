"""The released models' own shapes: they parse, and weights and states are as large as published."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from model.config import Fields
from model.families import build
from model.lightning import Memory
from model.store import row_bytes
from model.weights import Parameters
from tests.model.checkpoints import bailing, minimax, native, transnormer

TEXT_01 = minimax.CONFIG | {
    "hidden_size": 6144,
    "num_hidden_layers": 80,
    "attn_type_list": [int((i + 1) % 8 == 0) for i in range(80)],
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 10_000_000,
    "intermediate_size": 9216,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "vocab_size": 200_064,
    "max_position_embeddings": 10_240_000,
}
RING_MINI = bailing.CONFIG | {
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "layer_group_size": 5,
    "rope_theta": 1_000_000,
    "vocab_size": 157_184,
    "max_position_embeddings": 131_072,
    "eos_token_id": 156_892,
    "pad_token_id": 156_892,
}
RING_FLASH = RING_MINI | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "layer_group_size": 8,
}
HYBRID_2B = native.tiny_config().to_dict() | {
    "architectures": ["MiniMaxForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 2048,
    "vocab_size": 65_536,
    "num_local_experts": 8,
    "layer_types": [*[native.LIGHTNING] * 7, native.SOFTMAX] * 2,
    "rope_theta": 10_000_000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
    "max_position_embeddings": 4_194_304,
}


def transnormer_of(dim: int, layers: int, heads: int, glu: int) -> dict[str, Any]:
    return transnormer.CONFIG | {
        "decoder_embed_dim": dim,
        "hidden_dim": dim,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "glu_dim": glu,
        "linear_use_lrpe_list": [1] + [0] * (layers - 1),
        "vocab_size": 64_000,
    }


@pytest.mark.parametrize(
    ("config", "parameters", "state", "kv", "digits"),
    [
        # parameters; elements of a state; KV bytes a token in bfloat16
        pytest.param(TEXT_01, 456e9, 73.4e6, 40_960, 1e-3, id="minimax-text-01"),
        pytest.param(RING_MINI, 16.4e9, 4.19e6, 8192, 4e-3, id="ring-mini-linear-2.0"),
        pytest.param(RING_FLASH, 104e9, 14.68e6, 8192, 1e-2, id="ring-flash-linear-2.0"),
        pytest.param(transnormer_of(1024, 24, 8, 2816), 0.399e9, 3.28e6, 0, 2e-3, id="tnl-385m"),
        pytest.param(transnormer_of(2048, 16, 16, 5632), 1.02e9, 4.46e6, 0, 5e-3, id="tnl-1b"),
        pytest.param(transnormer_of(4096, 30, 32, 11008), 6.84e9, 16.25e6, 0, 1e-3, id="tnl-7b"),
        pytest.param(HYBRID_2B, 2.19e9, 14 * 16 * 128**2, 4096, 3e-3, id="hybrid-2b"),
    ],
)
def test_sizes(
    config: dict[str, Any], parameters: float, state: float, kv: int, digits: float
) -> None:
    made = Parameters(torch.device("meta"), torch.bfloat16)
    model = build(Fields(config), made)
    assert sum(prod(p.shape) for p in made.places.values()) == pytest.approx(parameters, rel=digits)
    fields = model.slot_fields(Memory(torch.float32, 0, torch.bfloat16))
    assert row_bytes(fields) / 4 == pytest.approx(state, rel=2e-3)
    assert row_bytes(model.block_fields(64)) == kv * 64


def test_weights_take_the_bytes_that_the_release_counts() -> None:
    """total_size of MiniMax-Text-01's index, to the byte: bfloat16, and float32 routers."""
    made = Parameters(torch.device("meta"), torch.bfloat16)
    build(Fields(TEXT_01), made)
    assert sum(p.numel() * p.itemsize for p in made.places.values()) == 912_210_767_872


@pytest.mark.parametrize("config", [TEXT_01, RING_MINI, transnormer_of(1024, 24, 8, 2816)])
def test_all_but_few_weights_may_be_quantised(config: dict[str, Any]) -> None:
    """Linear layers and experts; not embedding, head, norms, router, its bias, and angles."""
    made = Parameters(torch.device("meta"), torch.bfloat16)
    build(Fields(config), made)
    kept = ("embed", "lm_head", "norm", ".gate.", "theta")
    linear = {id(tensor.untyped_storage()) for tensor in made.linear}
    for name, place in made.places.items():
        assert (id(place.untyped_storage()) in linear) != any(part in name for part in kept), name
