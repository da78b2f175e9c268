"""MiniMax-Text-01 (arXiv 2501.08313) and MiniMax-M1, in the authors' layout and in transformers'.

Post-norm residual: h = norm(x); x' = alpha h + beta mixer(h); the stream is the normed one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.fused_linear import Residual, gate_linear, residual_linear
from kernels.join import Rows
from kernels.linear import linear
from kernels.logits import residual_logits
from kernels.residual_route import residual_route
from kernels.rotary import rotary, rotary_angles
from kernels.routing import Choice
from model.attention import Softmax, page_fields, window_fields
from model.batch import Batch
from model.config import Fields
from model.experts import Experts
from model.layers import (
    Step,
    alibi_slopes,
    geometric_slopes,
    layer_factor,
    rotary_frequencies,
)
from model.lightning import Lightning, Memory, memory_fields
from model.store import Field, Store
from model.weights import Parameters

OUTPUT_NORM_EPS = 1e-6  # of the lightning layers' output norm, whatever rms_norm_eps says
ROWS, TOKENS = 200_064, 200_032  # of the released embeddings, and how many the tokenizer knows


@dataclass(slots=True, frozen=True)
class Layout:
    """In which fields a config.json says what, and which decay goes with it; tensors are named
    alike. `residual` is a pattern for "lightning", "softmax" and "mlp", then "alpha" or "beta"."""

    kinds: str
    lightning: object
    softmax: object
    residual: dict[str, str]
    slopes: Callable[[int], torch.Tensor]
    factor: Callable[[int, int], float]
    router: torch.dtype | None  # None: that of the model


ORIGINAL = Layout(
    kinds="attn_type_list",
    lightning=0,
    softmax=1,
    residual={
        "lightning": "layernorm_linear_attention_{}",
        "softmax": "layernorm_full_attention_{}",
        "mlp": "layernorm_mlp_{}",
    },
    slopes=alibi_slopes,
    factor=layer_factor,
    router=torch.float32,  # as the releases store it, among bfloat16
)
TRANSFORMERS = Layout(
    kinds="layer_types",
    lightning="linear_attention",
    softmax="full_attention",
    residual={
        "lightning": "linear_attn_{}_factor",
        "softmax": "full_attn_{}_factor",
        "mlp": "mlp_{}_factor",
    },
    slopes=geometric_slopes,
    # in the last layer, the one that forgets slowest, 1.33 times the authors' at 4 layers
    factor=lambda index, count: 1 - index / (count - 1 + 1e-5) + 1e-5,
    router=None,
)
LAYOUTS = {
    "MiniMaxText01ForCausalLM": ORIGINAL,
    "MiniMaxM1ForCausalLM": ORIGINAL,
    "MiniMaxForCausalLM": TRANSFORMERS,
}


@dataclass(slots=True, frozen=True, kw_only=True)
class MiniMaxConfig:
    """config.json in either layout; layers[i] is "lightning", "softmax" or "window"."""

    layout: Layout
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
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
    alpha_beta: dict[str, tuple[float, float]]  # by "lightning", "softmax", "window", "mlp"

    @classmethod
    def parse(cls, fields: Fields) -> MiniMaxConfig:
        """Check and take the fields. Raises ConfigError that names the first bad one."""
        layout = LAYOUTS[fields.architecture]
        fields.only("hidden_act", "silu")
        fields.only("attention_dropout", 0, 0.0, None)
        fields.without("decay_layer_factor", "only one is published for this architecture")
        fields.only("postnorm", True)
        fields.only("shared_intermediate_size", 0, None)
        rope = fields.rope()
        if layout is ORIGINAL:
            fields.only("sliding_window", None)
        hidden = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads")
        if heads % kv_heads:
            raise fields.fail("num_key_value_heads", f"a divisor of {heads}")
        head_dim = fields.optional_integer("head_dim") or hidden // heads
        rotary_dim = fields.optional_integer("rotary_dim")
        if rotary_dim is None:  # transformers turns the whole head
            rotary_dim = int(head_dim * rope.number("partial_rotary_factor", 1.0, above=0))
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise fields.fail("rotary_dim", f"an even number up to {head_dim}")
        experts = fields.integer("num_local_experts", 8)
        top = fields.integer("num_experts_per_tok", 2)
        if top > experts:
            raise fields.fail("num_experts_per_tok", f"at most {experts}")
        window = fields.optional_integer("sliding_window", least=2) or 0
        alpha_beta = {
            kind: (
                fields.number(name.format("alpha"), 1.0),
                fields.number(name.format("beta"), 1.0),
            )
            for kind, name in layout.residual.items()
        }
        return cls(
            layout=layout,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            intermediate=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            experts=experts,
            experts_per_token=top,
            eps=fields.number("rms_norm_eps", 1e-5, above=0),
            layers=_layers(fields, layout, "window" if window else "softmax"),
            window=window,
            rope_theta=rope.number("rope_theta", 1e6, above=0),
            max_positions=fields.integer("max_position_embeddings", 1 << 40),
            tied=fields.flag("tie_word_embeddings", False),
            alpha_beta=alpha_beta | {"window": alpha_beta["softmax"]},
        )


def _layers(fields: Fields, layout: Layout, softmax: str) -> tuple[str, ...]:
    """Which layer is of which kind."""
    count = fields.integer("num_hidden_layers")
    kinds = {layout.lightning: "lightning", layout.softmax: softmax}
    given = fields.values.get(layout.kinds)
    if (
        not isinstance(given, list)
        or len(given) != count
        or not all(type(k) is type(layout.softmax) and k in kinds for k in given)
    ):
        raise fields.fail(layout.kinds, f"a list of {count} of {', '.join(map(repr, kinds))}")
    return tuple(kinds[kind] for kind in given)


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
        layout = config.layout
        slopes = layout.slopes(self.heads) * layout.factor(index, len(config.layers))
        slopes = slopes.to(device=parameters.device, dtype=torch.float32)
        self.lightning = Lightning(index, slopes, scale=1.0)

    def __call__(self, residual: Residual, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.heads * self.dim
        h, projected = residual_linear(residual, self.qkv_gate, silu=3 * width)
        qkv, gate = projected[:, : 3 * width], projected[:, 3 * width :]
        q, k, v = qkv.unflatten(1, (self.heads, 3, self.dim)).unbind(2)
        o = step.batch.attend(self.lightning, q, k, v, step.store)
        return h, gate_linear(o.flatten(1), gate, self.norm, OUTPUT_NORM_EPS, self.out)


class SoftmaxMixer:
    """Grouped-query softmax attention with rotary, over all positions or a sliding window."""

    def __init__(self, config: MiniMaxConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.self_attn"
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
        window = config.window if config.layers[index] == "window" else None
        self.softmax = Softmax(index, self.dim**-0.5, window)

    def __call__(self, residual: Residual, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        h, qkv = residual_linear(residual, self.qkv)
        qk, v = qkv.unflatten(1, (-1, self.dim)).tensor_split((-self.kv_heads,), dim=1)
        q, k = rotary(qk, step.cos, step.sin).tensor_split((self.heads,), dim=1)
        o = step.batch.attend(self.softmax, q, k, v, step.store)
        return h, linear(o.flatten(1), self.out)


class Routed:
    """Top-k of E gated experts, weights renormalised to 1; one expert needs no router."""

    def __init__(self, config: MiniMaxConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.block_sparse_moe"
        self.choice = Choice(config.experts_per_token)
        shape = config.experts, config.hidden
        self.router = parameters.tensor(f"{prefix}.gate.weight", *shape, dtype=config.layout.router)
        self.experts = Experts(
            parameters,
            f"{prefix}.experts",
            ("w1", "w3", "w2"),
            count=config.experts,
            hidden=config.hidden,
            width=config.intermediate,
        )

    def __call__(self, residual: Residual) -> tuple[torch.Tensor, Rows]:
        if len(self.router) == 1:
            h, _ = residual.normed()
            return h, self.experts(h, None, None)
        h, ids, weights = residual_route(residual, self.router, self.choice)
        return h, self.experts(h, ids, weights)


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
        self.experts = [Routed(config, i, parameters) for i in range(count)]
        self.head = (
            self.embedding
            if config.tied
            else parameters.tensor("lm_head.weight", config.vocab_size, config.hidden)
        )
        self.frequencies = rotary_frequencies(
            config.rotary_dim, config.rope_theta, parameters.device
        )

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def drawable(self) -> int:
        """The released weights have rows that no token stands behind, there to round a size up."""
        return TOKENS if self.config.vocab_size == ROWS else self.config.vocab_size

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
                fields += window_fields(i, c.window, c.kv_heads, c.head_dim, self.dtype)
        return fields

    def block_fields(self, block_size: int) -> list[Field]:
        """What one KV block of block_size positions holds."""
        c = self.config
        fields: list[Field] = []
        for i, kind in enumerate(c.layers):
            if kind == "softmax":
                fields += page_fields(i, block_size, c.kv_heads, c.head_dim, self.dtype)
        return fields

    def fold(self, batch: Batch, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        """The last mixer's stream and output, h and mixed [T, D]."""
        cos, sin = rotary_angles(batch.positions, self.frequencies)
        step = Step(batch, store, cos, sin)
        x = F.embedding(batch.ids, self.embedding)
        residual = Residual(x, None, self.norms[0], self.config.eps, post=True)
        for i, mixer in enumerate(self.mixers):
            h, mixed = mixer(residual, step)
            if i + 1 < len(self.mixers):
                residual = self._expand(i, h, mixed)
        return h, mixed

    def _expand(self, i: int, h: torch.Tensor, mixed: torch.Tensor) -> Residual:
        """What follows the mixer of layer i."""
        c = self.config
        alpha, beta = c.alpha_beta[c.layers[i]]
        residual = Residual(h, mixed, self.middle_norms[i], c.eps, alpha, beta, post=True)
        h, expanded = self.experts[i](residual)
        alpha, beta = c.alpha_beta["mlp"]
        return Residual(h, expanded, self.norms[i + 1], c.eps, alpha, beta, post=True)

    def finish(self, h: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Rows of fold() -> terms of their logits."""
        return residual_logits(self._expand(len(self.mixers) - 1, h, mixed), self.head)
