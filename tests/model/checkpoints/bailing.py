"""Tiny Ring-linear-2.0 checkpoints as released, and their oracle."""

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
    slopes_of,
    turn,
)

CONFIG: Config = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "model_type": "bailing_moe_linear",
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe_linear_v2.BailingMoeLinearV2Config",
        "AutoModelForCausalLM": "modeling_bailing_moe_linear_v2.BailingMoeLinearV2ForCausalLM",
    },
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "eos_token_id": 96,
    "first_k_dense_replace": 1,
    "group_norm_size": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 80,
    "layer_group_size": 2,
    "linear_silu": False,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 96,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "vocab_size": 97,
}

VARIANTS = "sglang", "hf", "mlx"  # of the layer factor in the decay


def is_softmax(c: Config, i: int) -> bool:
    """The last of each group, and what is left over after whole groups."""
    count, size = c["num_hidden_layers"], c["layer_group_size"]
    return (i + 1) % size == 0 or i >= count // size * size


def shapes(c: Config) -> Shapes:
    hidden, heads, d = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (c["vocab_size"], hidden)}

    def feed_forward(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.gate_proj.weight": (width, hidden),
            f"{name}.up_proj.weight": (width, hidden),
            f"{name}.down_proj.weight": (hidden, width),
        }

    for i in range(c["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.attention", f"model.layers.{i}.mlp"
        others = 2 * (c["num_key_value_heads"] if is_softmax(c, i) else heads)
        found[f"{attention}.query_key_value.weight"] = ((heads + others) * d, hidden)
        found[f"{attention}.query_layernorm.weight"] = (d,)
        found[f"{attention}.key_layernorm.weight"] = (d,)
        if not is_softmax(c, i):
            found[f"{attention}.g_proj.weight"] = (heads * d, hidden)
            found[f"{attention}.g_norm.weight"] = (heads * d,)
        found[f"{attention}.dense.weight"] = (hidden, heads * d)
        if i < c["first_k_dense_replace"]:
            found |= feed_forward(mlp, c["intermediate_size"])
        else:
            found[f"{mlp}.gate.weight"] = (c["num_experts"], hidden)
            found[f"{mlp}.gate.expert_bias"] = (c["num_experts"],)
            for e in range(c["num_experts"]):
                found |= feed_forward(f"{mlp}.experts.{e}", c["moe_intermediate_size"])
            if c["num_shared_experts"]:
                width = c["moe_intermediate_size"] * c["num_shared_experts"]
                found |= feed_forward(f"{mlp}.shared_experts", width)
        found[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        found[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], hidden)
    return Shapes(found)


def write(directory: Path, *, seed: int = 0, **changes: Any) -> Oracle:
    """Write a checkpoint and return what it should say."""
    config = CONFIG | changes
    tensors = shapes(config).draw(seed)
    save(directory, config, tensors)
    weights = double(tensors)
    return lambda ids: forward(config, weights, ids)


def decays(c: Config, i: int) -> list[float]:
    """Slopes of layer i, by what the config says of the published variants."""
    index = {"sglang": i, "hf": i - 1, "mlx": max(0, i - 1)}[c.get("decay_layer_factor", "sglang")]
    factor = 1 - index / (c["num_hidden_layers"] - 1) + 1e-5
    return [slope * factor for slope in slopes_of(c["num_attention_heads"])]


def forward(c: Config, w: Weights, ids: list[int]) -> Tensor:
    """Logits [T, V], token by token."""
    layers, eps = range(c["num_hidden_layers"]), c["rms_norm_eps"]
    memory: list[Attention | Recurrence] = [
        Attention() if is_softmax(c, i) else Recurrence(decays(c, i), c["head_dim"] ** -0.5)
        for i in layers
    ]
    embedding = w["model.word_embeddings.weight"]
    rows = []
    for position, token in enumerate(ids):
        x = embedding[token]
        for i in layers:
            layer = f"model.layers.{i}"
            h = rmsnorm(x, eps, w[f"{layer}.input_layernorm.weight"])
            x = x + _attention(c, w, f"{layer}.attention", memory[i], h, position)
            h = rmsnorm(x, eps, w[f"{layer}.post_attention_layernorm.weight"])
            if i < c["first_k_dense_replace"]:
                x = x + _gated(w, f"{layer}.mlp", h)
            else:
                x = x + _experts(c, w, f"{layer}.mlp", h)
        rows.append(w.get("lm_head.weight", embedding) @ rmsnorm(x, eps, w["model.norm.weight"]))
    return torch.stack(rows)


def _attention(c: Config, w: Weights, name: str, memory: Any, h: Tensor, position: int) -> Tensor:
    heads, d, eps = c["num_attention_heads"], c["head_dim"], c["rms_norm_eps"]
    qkv = (w[f"{name}.query_key_value.weight"] @ h).view(-1, d)
    others = (len(qkv) - heads) // 2
    q, k, v = qkv[:heads], qkv[heads : heads + others], qkv[heads + others :]
    q = rmsnorm(q, eps, w[f"{name}.query_layernorm.weight"])
    k = rmsnorm(k, eps, w[f"{name}.key_layernorm.weight"])
    turned = int(d * c["partial_rotary_factor"])
    q, k = (turn(x, position, c["rope_theta"], turned) for x in (q, k))
    o = memory(q, k, v).flatten()
    if f"{name}.g_proj.weight" in w:
        groups = o.view(c["group_norm_size"], -1)
        o = rmsnorm(groups, eps).flatten() * w[f"{name}.g_norm.weight"]
        o = o / (1 + torch.exp(-(w[f"{name}.g_proj.weight"] @ h)))
    return w[f"{name}.dense.weight"] @ o


def _gated(w: Weights, name: str, h: Tensor) -> Tensor:
    return gated(h, *(w[f"{name}.{x}_proj.weight"] for x in ("gate", "up", "down")))


def _experts(c: Config, w: Weights, name: str, h: Tensor) -> Tensor:
    score = (1 / (1 + torch.exp(-(w[f"{name}.gate.weight"] @ h)))).tolist()
    choice = [s + b for s, b in zip(score, w[f"{name}.gate.expert_bias"].tolist(), strict=True)]
    size = c["num_experts"] // c["n_group"]

    def strength(group: int) -> float:
        return sum(sorted(choice[group * size : (group + 1) * size])[-2:])

    kept = sorted(range(c["n_group"]), key=strength)[-c["topk_group"] :]
    candidates = [e for e in range(c["num_experts"]) if e // size in kept]
    best = sorted(candidates, key=lambda e: choice[e])[-c["num_experts_per_tok"] :]
    total = sum(score[e] for e in best) if len(best) > 1 else 1.0
    y = torch.zeros_like(h)
    for e in best:
        y += c["routed_scaling_factor"] * score[e] / total * _gated(w, f"{name}.experts.{e}", h)
    if c["num_shared_experts"]:
        y += _gated(w, f"{name}.shared_experts", h)
    return y
