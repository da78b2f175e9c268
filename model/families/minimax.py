"""MiniMax-Text-01 (arXiv 2501.08313) in the layout of transformers' MiniMaxForCausalLM.

Post-norm residual: h = norm(x); x' = alpha h + beta mixer(h); the stream is the normed one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kernels.experts import moe
from kernels.gated import silu_
from kernels.paged_attention import paged_attention
from kernels.residual_rmsnorm import residual_rmsnorm
from kernels.rmsnorm import rmsnorm
from kernels.rmsnorm_gate import rmsnorm_gate
from kernels.rotary import rotary, rotary_angles
from kernels.window_attention import window_attention
from model.batch import Batch
from model.config import Fields
from model.layers import alibi_slopes, head_logits, rotary_frequencies
from model.lightning import Lightning, Memory, memory_fields
from model.store import Field, Store
from model.weights import Parameters

OUTPUT_NORM_EPS = 1e-6  # of the lightning layers' output norm, whatever rms_norm_eps says


@dataclass(slots=True, frozen=True, kw_only=True)
class MiniMaxConfig:
    """config.json of MiniMaxForCausalLM; layers[i] is "lightning", "softmax" or "window"."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    experts: int
    experts_per_token: int
    eps: float
    layers: tuple[str, ...]
    window: int
    rope_theta: float
    max_positions: int
    tied: bool
    alpha_beta: dict[str, tuple[float, float]]  # by "linear_attn", "full_attn", "mlp"

    @classmethod
    def parse(cls, fields: Fields) -> MiniMaxConfig:
        """Check and take the fields. Raises ConfigError that names the first bad one."""
        fields.only("hidden_act", "silu")
        fields.only("attention_dropout", 0, 0.0, None)
        fields.only("quantization_config", None)
        hidden = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        count = fields.integer("num_hidden_layers")
        kv_heads = fields.integer("num_key_value_heads")
        if heads % kv_heads:
            raise fields.fail("num_key_value_heads", f"a divisor of {heads}")
        window = (
            fields.integer("sliding_window", least=2)
            if fields.values.get("sliding_window") is not None
            else 0
        )
        types = fields.values.get("layer_types")
        names = {
            "linear_attention": "lightning",
            "full_attention": "window" if window else "softmax",
        }
        if (
            not isinstance(types, list)
            or len(types) != count
            or not all(isinstance(t, str) and t in names for t in types)
        ):
            raise fields.fail("layer_types", f"a list of {count} of {', '.join(map(repr, names))}")
        rope: Any = fields.values.get("rope_parameters") or {}
        if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
            raise fields.fail("rope_parameters", "rope_type 'default'")
        theta = rope.get("rope_theta", fields.values.get("rope_theta", 1e6))
        experts = fields.integer("num_local_experts", 8)
        top = fields.integer("num_experts_per_tok", 2)
        if top > experts:
            raise fields.fail("num_experts_per_tok", f"at most {experts}")
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=fields.integer("head_dim", hidden // heads),
            intermediate=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            experts=experts,
            experts_per_token=top,
            eps=fields.number("rms_norm_eps", 1e-5),
            layers=tuple(names[t] for t in types),
            window=window,
            rope_theta=Fields({"rope_theta": theta}, fields.source).number("rope_theta"),
            max_positions=fields.integer("max_position_embeddings", 1 << 40),
            tied=bool(fields.values.get("tie_word_embeddings", False)),
            alpha_beta={
                kind: (
                    fields.number(f"{kind}_alpha_factor", 1.0),
                    fields.number(f"{kind}_beta_factor", 1.0),
                )
                for kind in ("linear_attn", "full_attn", "mlp")
            },
        )


class LightningMixer:
    """o = norm(q^T S) * sigmoid(gate): silu on q, k and v, no rotary, no scale."""

    def __init__(self, config: MiniMaxConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.self_attn"
        self.heads, self.dim = config.heads, config.head_dim
        width = self.heads * self.dim
        self.qkv_gate = parameters.rows(
            [(f"{prefix}.qkv_proj.weight", 3 * width), (f"{prefix}.output_gate.weight", width)],
            config.hidden,
        )
        self.norm = parameters.tensor(f"{prefix}.norm.weight", width)
        self.out = parameters.matrix(f"{prefix}.out_proj.weight", config.hidden, width)
        # transformers' own layer factor: in the last layer it differs from the paper's
        factor = 1 - index / (len(config.layers) - 1 + 1e-5) + 1e-5
        slopes = alibi_slopes(self.heads) * factor
        slopes = slopes.to(device=parameters.device, dtype=torch.float32)
        self.lightning = Lightning(index, slopes, scale=1.0)

    def __call__(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        width = self.heads * self.dim
        projected = F.linear(h, self.qkv_gate)
        qkv = silu_(projected[:, : 3 * width])
        q, k, v = qkv.unflatten(1, (self.heads, 3, self.dim)).unbind(2)
        o = self.lightning(q, k, v, step.batch, step.store)
        o = rmsnorm_gate(o.flatten(1), projected[:, 3 * width :], self.norm, OUTPUT_NORM_EPS)
        return F.linear(o, self.out)


class SoftmaxMixer:
    """Grouped-query softmax attention with rotary, over all positions or a sliding window."""

    def __init__(self, config: MiniMaxConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.self_attn"
        self.index = index
        self.window = config.window if config.layers[index] == "window" else None
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, config.head_dim
        rows, kv_rows = self.heads * self.dim, self.kv_heads * self.dim
        self.qkv = parameters.rows(
            [
                (f"{prefix}.q_proj.weight", rows),
                (f"{prefix}.k_proj.weight", kv_rows),
                (f"{prefix}.v_proj.weight", kv_rows),
            ],
            config.hidden,
        )
        self.out = parameters.matrix(f"{prefix}.o_proj.weight", config.hidden, rows)

    def __call__(self, h: torch.Tensor, step: Step) -> torch.Tensor:
        qkv = F.linear(h, self.qkv).unflatten(1, (-1, self.dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotary(q, step.cos, step.sin), rotary(k, step.cos, step.sin)
        scale = self.dim**-0.5
        batch = step.batch
        if self.window is not None:
            views = step.store.slots.views
            rings = views[f"keys.{self.index}"], views[f"values.{self.index}"]
            o = window_attention(q, k, v, *rings, batch.packing, self.window, scale)
        else:
            views = step.store.blocks.views
            pages = views[f"keys.{self.index}"], views[f"values.{self.index}"]
            o = paged_attention(q, k, v, *pages, batch.tables, batch.packing, scale)
        return F.linear(o.flatten(1), self.out)


class Experts:
    """Top-k of E gated experts, weights renormalised to 1; one expert needs no router."""

    def __init__(self, config: MiniMaxConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.block_sparse_moe"
        count, width, hidden = config.experts, config.intermediate, config.hidden
        self.top = config.experts_per_token
        self.router = parameters.tensor(f"{prefix}.gate.weight", count, hidden)
        self.gate_up = parameters.matrices(count, 2 * width, hidden)
        self.down = parameters.matrices(count, hidden, width)
        for e in range(count):
            name = f"{prefix}.experts.{e}"
            parameters.places[f"{name}.w1.weight"] = self.gate_up[e, :width]
            parameters.places[f"{name}.w3.weight"] = self.gate_up[e, width:]
            parameters.places[f"{name}.w2.weight"] = self.down[e]

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        if len(self.router) == 1:
            return moe(h, self.gate_up, self.down, None, None)
        scores = F.linear(h, self.router).softmax(-1, dtype=torch.float32)
        weights, ids = scores.topk(self.top, dim=-1)
        return moe(h, self.gate_up, self.down, ids, weights / weights.sum(-1, keepdim=True))


@dataclass(slots=True, frozen=True, eq=False)
class Step:
    """What the layers share within one step."""

    batch: Batch
    store: Store
    cos: torch.Tensor
    sin: torch.Tensor


class MiniMax:
    """Embedding, layers, final norm and head."""

    # what transformers writes beside each lightning layer: derived from the slopes, maybe rounded
    ignored = re.compile(
        r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
    )

    def __init__(self, fields: Fields, parameters: Parameters) -> None:
        self.config = config = MiniMaxConfig.parse(fields)
        self.dtype = parameters.dtype
        self.embedding = parameters.tensor(
            "model.embed_tokens.weight", config.vocab_size, config.hidden
        )
        count = len(config.layers)
        self.norms = [
            parameters.tensor(f"model.layers.{i}.input_layernorm.weight", config.hidden)
            for i in range(count)
        ]
        self.norms.append(parameters.tensor("model.norm.weight", config.hidden))
        self.middle_norms = [
            parameters.tensor(f"model.layers.{i}.post_attention_layernorm.weight", config.hidden)
            for i in range(count)
        ]
        self.mixers = [
            (LightningMixer if kind == "lightning" else SoftmaxMixer)(config, i, parameters)
            for i, kind in enumerate(config.layers)
        ]
        self.experts = [Experts(config, i, parameters) for i in range(count)]
        self.head = (
            self.embedding
            if config.tied
            else parameters.tensor("lm_head.weight", config.vocab_size, config.hidden)
        )
        self.frequencies = rotary_frequencies(config.head_dim, config.rope_theta, parameters.device)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the positions allow; None without full softmax layers."""
        return self.config.max_positions if "softmax" in self.config.layers else None

    def slot_fields(self, memory: Memory) -> list[Field]:
        """What one sequence keeps in its slot: states and rings, and windows of windowed layers."""
        c = self.config
        fields: list[Field] = []
        for i, kind in enumerate(c.layers):
            if kind == "lightning":
                fields += memory_fields(i, c.heads, c.head_dim, c.head_dim, memory)
            elif kind == "window":
                window = (c.window, c.kv_heads, c.head_dim)
                fields += [
                    Field(f"{name}.{i}", window, self.dtype, axis=0) for name in ("keys", "values")
                ]
        return fields

    def block_fields(self, block_size: int) -> list[Field]:
        """What one KV block of block_size positions holds."""
        c = self.config
        shape = (block_size, c.kv_heads, c.head_dim)
        return [
            Field(f"{name}.{i}", shape, self.dtype, axis=0)
            for i, kind in enumerate(c.layers)
            if kind == "softmax"
            for name in ("keys", "values")
        ]

    def forward(self, batch: Batch, store: Store) -> torch.Tensor:
        """Fold the batch into the store; logits [R, V] float32 of the rows to sample."""
        c = self.config
        cos, sin = rotary_angles(batch.positions, self.frequencies)
        step = Step(batch, store, cos, sin)
        h = rmsnorm(F.embedding(batch.ids, self.embedding), self.norms[0], c.eps)
        last = len(c.layers) - 1
        for i, kind in enumerate(c.layers):
            mixed = self.mixers[i](h, step)
            if i == last:  # what follows is row by row: only the rows that are asked for
                h, mixed = h[batch.sample_rows], mixed[batch.sample_rows]
            alpha, beta = c.alpha_beta["linear_attn" if kind == "lightning" else "full_attn"]
            h = residual_rmsnorm(h, mixed, alpha, beta, self.middle_norms[i], c.eps)
            expanded = self.experts[i](h)
            alpha, beta = c.alpha_beta["mlp"]
            dtype = torch.float32 if i == last else None
            h = residual_rmsnorm(
                h, expanded, alpha, beta, self.norms[i + 1], c.eps, out_dtype=dtype
            )
        return head_logits(h, self.head)
