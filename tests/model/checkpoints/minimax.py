"""Tiny MiniMax-Text-01 and MiniMax-M1 checkpoints in the authors' layout, and their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.model.checkpoints.formulas import (
    Attention,
    Config,
    Oracle,
    Recurrence,
    Shapes,
    Weights,
    double,
    gated,
    rmsnorm,
    save,
    silu,
    slopes_of,
    turn,
)

CONFIG: Config = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "model_type": "minimax_text_01",
    "auto_map": {"AutoModelForCausalLM": "modeling_minimax_text_01.MiniMaxText01ForCausalLM"},
    "attention_dropout": 0.0,
    "attn_type_list": [0, 1, 0, 0],
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layernorm_full_attention_alpha": 1.7,
    "layernorm_full_attention_beta": 0.9,
    "layernorm_linear_attention_alpha": 1.6,
    "layernorm_linear_attention_beta": 1.1,
    "layernorm_mlp_alpha": 1.5,
    "layernorm_mlp_beta": 0.8,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "rotary_dim": 8,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 97,
}
M1 = {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"}


def shapes(c: Config) -> Shapes:
    hidden, width = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    kv, inner = c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i, kind in enumerate(c["attn_type_list"]):
        layer = f"model.layers.{i}"
        mixer = {
            0: {
                "qkv_proj": (3 * width, hidden),
                "output_gate": (width, hidden),
                "norm": (width,),
                "out_proj": (hidden, width),
            },
            1: {
                "q_proj": (width, hidden),
                "k_proj": (kv, hidden),
                "v_proj": (kv, hidden),
                "o_proj": (hidden, width),
            },
        }[kind]
        found |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in mixer.items()}
        found[f"{layer}.block_sparse_moe.gate.weight"] = (c["num_local_experts"], hidden)
        for e in range(c["num_local_experts"]):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            found[f"{expert}.w1.weight"] = found[f"{expert}.w3.weight"] = (inner, hidden)
            found[f"{expert}.w2.weight"] = (hidden, inner)
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return Shapes(
        found | {"model.norm.weight": (hidden,), "lm_head.weight": (c["vocab_size"], hidden)}
    )


def write(directory: Path, *, seed: int = 0, **changes: Any) -> Oracle:
    """Write a checkpoint and return what it should say."""
    config = CONFIG | changes
    tensors = shapes(config).draw(seed)
    save(directory, config, tensors)
    weights = double(tensors)
    return lambda ids: forward(config, weights, ids)


def forward(c: Config, w: Weights, ids: list[int]) -> Tensor:
    """Logits [T, V], token by token."""
    heads, count, eps = c["num_attention_heads"], c["num_hidden_layers"], c["rms_norm_eps"]
    memory: list[Recurrence | Attention] = []
    for i, kind in enumerate(c["attn_type_list"]):
        slopes = [s * (1 - i / (count - 1) + 1e-5) for s in slopes_of(heads)]
        memory.append(Attention() if kind else Recurrence(slopes, 1.0))

    rows = []
    for position, token in enumerate(ids):
        x = w["model.embed_tokens.weight"][token]
        for i, kind in enumerate(c["attn_type_list"]):
            layer = f"model.layers.{i}"
            h = rmsnorm(x, eps, w[f"{layer}.input_layernorm.weight"])
            mix = _softmax if kind else _lightning
            name = "full" if kind else "linear"
            x = c[f"layernorm_{name}_attention_alpha"] * h + c[
                f"layernorm_{name}_attention_beta"
            ] * mix(c, w, f"{layer}.self_attn", memory[i], h, position)
            h = rmsnorm(x, eps, w[f"{layer}.post_attention_layernorm.weight"])
            experts = _experts(c, w, f"{layer}.block_sparse_moe", h)
            x = c["layernorm_mlp_alpha"] * h + c["layernorm_mlp_beta"] * experts
        rows.append(w["lm_head.weight"] @ rmsnorm(x, eps, w["model.norm.weight"]))
    return torch.stack(rows)


def _lightning(c: Config, w: Weights, name: str, memory: Any, h: Tensor, position: int) -> Tensor:
    d = c["head_dim"]
    # the rows of head h are 3 d h ... : its q, its k, its v
    qkv = silu(w[f"{name}.qkv_proj.weight"] @ h).view(-1, 3, d)
    o = memory(qkv[:, 0], qkv[:, 1], qkv[:, 2]).flatten()
    gate = 1 / (1 + torch.exp(-(w[f"{name}.output_gate.weight"] @ h)))
    return w[f"{name}.out_proj.weight"] @ (rmsnorm(o, 1e-6, w[f"{name}.norm.weight"]) * gate)


def _softmax(c: Config, w: Weights, name: str, memory: Any, h: Tensor, position: int) -> Tensor:
    q, k, v = ((w[f"{name}.{x}_proj.weight"] @ h).view(-1, c["head_dim"]) for x in "qkv")
    q, k = (turn(x, position, c["rope_theta"], c["rotary_dim"]) for x in (q, k))
    return w[f"{name}.o_proj.weight"] @ memory(q, k, v).flatten()


def _experts(c: Config, w: Weights, name: str, h: Tensor) -> Tensor:
    share = (w[f"{name}.gate.weight"] @ h).softmax(-1)
    best = share.argsort(descending=True)[: c["num_experts_per_tok"]].tolist()
    y = torch.zeros_like(h)
    for e in best:
        gate, down, up = (w[f"{name}.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
        y += share[e] / share[best].sum() * gated(h, gate, up, down)
    return y
