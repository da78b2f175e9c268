"""Tiny TransNormerLLM checkpoints as released, and their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.model.checkpoints.formulas import (
    Config,
    Oracle,
    Recurrence,
    Shapes,
    Weights,
    double,
    rmsnorm,
    save,
    silu,
    slopes_of,
)

EPS = 1e-6
CONFIG: Config = {
    "architectures": ["TransnormerForCausalLM"],
    "model_type": "transnormer",
    "auto_map": {
        "AutoConfig": "configuration_transnormer.TransnormerConfig",
        "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
    },
    "vocab_size": 97,
    "decoder_embed_dim": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "hidden_dim": 64,
    "glu_dim": 80,
    "glu_act": "none",
    "norm_type": "simplermsnorm",
    "linear_act_fun": "swish",
    "linear_use_lrpe_list": [1, 0, 0],
    "bias": False,
    "no_scale_embedding": False,
    "add_bos_token": False,
    "init_std": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "use_cache": True,
}


def shapes(c: Config) -> Shapes:
    dim, hidden, glu = c["decoder_embed_dim"], c["hidden_dim"], c["glu_dim"]
    heads = c["decoder_attention_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], dim)}
    for i, lrpe in enumerate(c["linear_use_lrpe_list"]):
        mixer, unit = f"model.layers.{i}.token_mixer", f"model.layers.{i}.channel_mixer"
        found[f"{mixer}.qkvu_proj.weight"] = (4 * hidden, dim)
        found[f"{mixer}.out_proj.weight"] = (dim, hidden)
        if lrpe:
            found[f"{mixer}.lrpe.theta"] = (heads, 1, hidden // heads)
        found[f"{unit}.l1.weight"] = found[f"{unit}.l2.weight"] = (glu, dim)
        found[f"{unit}.l3.weight"] = (dim, glu)
    if c.get("tie_word_embeddings") is False:
        found["lm_head.weight"] = (c["vocab_size"], dim)
    return Shapes(found)


def make(seed: int = 0, **changes: Any) -> tuple[Config, dict[str, Tensor], Oracle]:
    """Config, tensors, and what a model of them should say."""
    config = CONFIG | changes
    tensors = shapes(config).draw(seed)
    weights = double(tensors)
    return config, tensors, lambda ids: forward(config, weights, ids)


def write(directory: Path, *, seed: int = 0, **changes: Any) -> Oracle:
    """Write a checkpoint in safetensors and return what it should say."""
    config, tensors, oracle = make(seed, **changes)
    save(directory, config, tensors)
    return oracle


def forward(c: Config, w: Weights, ids: list[int]) -> Tensor:
    """Logits [T, V], token by token."""
    heads, count = c["decoder_attention_heads"], c["decoder_layers"]
    memory = [
        Recurrence([s * (1 - i / (count - 1) + 1e-5) for s in slopes_of(heads)], 1.0)
        for i in range(count)
    ]
    scale = 1.0 if c["no_scale_embedding"] else c["decoder_embed_dim"] ** 0.5
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    rows = []
    for position, token in enumerate(ids):
        x = scale * w["model.embed_tokens.weight"][token]
        for i in range(count):
            x = x + _mixer(w, f"model.layers.{i}.token_mixer", memory[i], rmsnorm(x, EPS), position)
            h = rmsnorm(x, EPS)
            l1, l2, l3 = (w[f"model.layers.{i}.channel_mixer.l{n}.weight"] for n in (1, 2, 3))
            x = x + l3 @ ((l1 @ h) * (l2 @ h))
        rows.append(head @ rmsnorm(x, EPS))
    return torch.stack(rows)


def _mixer(w: Weights, name: str, memory: Recurrence, h: Tensor, position: int) -> Tensor:
    heads = len(memory.decay)
    q, k, v, u = (w[f"{name}.qkvu_proj.weight"] @ h).chunk(4)
    q, k, v = silu(q).view(heads, -1), silu(k).view(heads, -1), v.view(heads, -1)
    theta = w.get(f"{name}.lrpe.theta")
    if theta is not None:
        cos, sin = torch.cos(theta[:, 0] * position), torch.sin(theta[:, 0] * position)
        q, k = (torch.cat((x * cos, x * sin), dim=1) for x in (q, k))
    return w[f"{name}.out_proj.weight"] @ (rmsnorm(memory(q, k, v).flatten(), EPS) * u)
