"""Ring-linear-2.0 and Ling-linear-2.0 (arXiv 2510.19338): BailingMoeLinearV2ForCausalLM.

Pre-norm residual: x += mixer(norm(x)); x += experts(norm(x)). Every layer_group_size-th layer is
softmax attention, the others are lightning; both norm q and k over each head, then turn them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.fused_linear import Residual, gate_linear, residual_linear
from kernels.join import Rows, join
from kernels.linear import linear
from kernels.logits import residual_logits
from kernels.rotary import norm_rotary, rotary_angles
from kernels.routing import Choice, route
from model.attention import Softmax, page_fields
from model.batch import Batch
from model.config import Fields
from model.experts import Dense, Experts
from model.layers import Step, alibi_slopes, layer_factor, rotary_frequencies
from model.lightning import Lightning, Memory, memory_fields
from model.store import Field, Store
from model.weights import Parameters

NAMES = "gate_proj", "up_proj", "down_proj"
# The published implementations disagree about the layer index in the decay's layer factor.
LAYER_FACTORS: dict[str, Callable[[int, int], float]] = {
    "sglang": layer_factor,  # also vLLM's, AReaL's
    "hf": lambda index, count: layer_factor(index - 1, count),  # the remote code of the releases
    "mlx": lambda index, count: layer_factor(max(index - 1, 0), count),
}


@dataclass(slots=True, frozen=True, kw_only=True)
class BailingConfig:
    """config.json of BailingMoeLinearV2ForCausalLM; softmax[i] says which kind layer i is."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    eps: float
    vocab_size: int
    max_positions: int
    tied: bool
    softmax: tuple[bool, ...]
    norm_groups: int
    layer_factor: str
    dense_layers: int
    intermediate: int
    expert_width: int
    shared_width: int
    experts: int
    experts_per_token: int
    groups: int
    top_groups: int
    normed: bool
    routed_factor: float

    @classmethod
    def parse(cls, fields: Fields) -> BailingConfig:
        """Check and take the fields. Raises ConfigError that names the first bad one."""
        fields.only("hidden_act", "silu")
        fields.only("use_qk_norm", True)
        fields.only("use_bias", False)
        fields.only("use_qkv_bias", False)
        fields.only("using_split_qkv_in_self_attention", False)
        fields.only("linear_silu", False)
        fields.only("use_linear_silu", False)
        fields.only("linear_rope", True)
        rope = fields.rope()
        fields.only("score_function", "sigmoid")
        fields.only("router_dtype", "fp32")
        fields.only("moe_router_enable_expert_bias", True)
        fields.only("num_nextn_predict_layers", 0, None)
        fields.only("use_sliding_window", False, None)
        fields.only("decay_layer_factor", *LAYER_FACTORS)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads")
        if heads % kv_heads:
            raise fields.fail("num_key_value_heads", f"a divisor of {heads}")
        head_dim = fields.optional_integer("head_dim") or hidden // heads
        rotary_dim = fields.optional_integer("rotary_dim")
        if rotary_dim is None:
            rotary_dim = int(head_dim * rope.number("partial_rotary_factor", 1.0, above=0))
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            name = "rotary_dim" if "rotary_dim" in fields.values else "partial_rotary_factor"
            raise fields.fail(name, f"an even number of dimensions up to {head_dim}")
        norm_groups = fields.integer("group_norm_size", 1)
        if heads * head_dim % norm_groups:
            raise fields.fail("group_norm_size", f"a divisor of {heads * head_dim}")
        experts, top = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
        groups = fields.optional_integer("n_group", least=0) or 1
        top_groups = fields.optional_integer("topk_group", least=0) or groups
        if experts % groups or experts // groups < 2:
            raise fields.fail("n_group", f"a divisor of {experts} that leaves two experts a group")
        if top_groups > groups:
            raise fields.fail("topk_group", f"at most {groups}")
        if top > experts // groups * top_groups:
            raise fields.fail("num_experts_per_tok", f"at most {experts // groups * top_groups}")
        expert_width = fields.integer("moe_intermediate_size")
        shared = fields.integer("num_shared_experts", 0, least=0)
        layers, size = fields.integer("num_hidden_layers"), fields.integer("layer_group_size")
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=rope.number("rope_theta", above=0),
            eps=fields.number("rms_norm_eps", above=0),
            vocab_size=fields.integer("vocab_size"),
            max_positions=fields.integer("max_position_embeddings"),
            tied=fields.flag("tie_word_embeddings", False),
            softmax=tuple((i + 1) % size == 0 or i >= layers // size * size for i in range(layers)),
            norm_groups=norm_groups,
            layer_factor=fields.values.get("decay_layer_factor", "sglang"),
            dense_layers=fields.integer("first_k_dense_replace", 0, least=0),
            intermediate=fields.integer("intermediate_size"),
            expert_width=expert_width,
            shared_width=shared
            * (fields.optional_integer("moe_shared_expert_intermediate_size") or expert_width),
            experts=experts,
            experts_per_token=top,
            groups=groups,
            top_groups=top_groups,
            normed=fields.flag("norm_topk_prob", True),
            routed_factor=fields.number("routed_scaling_factor", 1.0),
        )


class QueryKeyNorm:
    """q and k of a layer, normed over each head and turned by their position."""

    def __init__(self, config: BailingConfig, prefix: str, parameters: Parameters) -> None:
        self.eps = config.eps
        self.query = parameters.tensor(f"{prefix}.query_layernorm.weight", config.head_dim)
        self.key = parameters.tensor(f"{prefix}.key_layernorm.weight", config.head_dim)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = norm_rotary(q, step.cos, step.sin, self.query, self.eps)
        return q, norm_rotary(k, step.cos, step.sin, self.key, self.eps)


class LightningMixer:
    """o = groupnorm(q^T S / sqrt(d)) * sigmoid(gate)."""

    def __init__(self, config: BailingConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.attention"
        self.heads, self.dim = config.heads, config.head_dim
        self.groups, self.eps = config.norm_groups, config.eps
        width = self.heads * self.dim
        self.qkv_gate = parameters.rows(
            [(f"{prefix}.query_key_value.weight", 3 * width), (f"{prefix}.g_proj.weight", width)],
            config.hidden,
        )
        self.query_key_norm = QueryKeyNorm(config, prefix, parameters)
        self.norm = parameters.tensor(f"{prefix}.g_norm.weight", width)
        self.out = parameters.matrix(f"{prefix}.dense.weight", config.hidden, width)
        factor = LAYER_FACTORS[config.layer_factor](index, len(config.softmax))
        slopes = alibi_slopes(self.heads) * factor
        slopes = slopes.to(device=parameters.device, dtype=torch.float32)
        self.lightning = Lightning(index, slopes, scale=self.dim**-0.5)

    def __call__(self, residual: Residual, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        x, projected = residual_linear(residual, self.qkv_gate)
        q, k, v, gate = projected.unflatten(1, (4, self.heads, self.dim)).unbind(1)
        q, k = self.query_key_norm(q, k, step)
        o = step.batch.attend(self.lightning, q, k, v, step.store).flatten(1)
        gate = gate.flatten(1)
        return x, gate_linear(o, gate, self.norm, self.eps, self.out, groups=self.groups)


class SoftmaxMixer:
    """Grouped-query softmax attention over all positions."""

    def __init__(self, config: BailingConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.attention"
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = parameters.matrix(f"{prefix}.query_key_value.weight", rows, config.hidden)
        self.query_key_norm = QueryKeyNorm(config, prefix, parameters)
        width = self.heads * self.dim
        self.out = parameters.matrix(f"{prefix}.dense.weight", config.hidden, width)
        self.softmax = Softmax(index, self.dim**-0.5)

    def __call__(self, residual: Residual, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        x, qkv = residual_linear(residual, self.qkv)
        qkv = qkv.unflatten(1, (-1, self.dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = self.query_key_norm(q, k, step)
        o = step.batch.attend(self.softmax, q, k, v, step.store)
        return x, linear(o.flatten(1), self.out)


class Routed:
    """Top-k of the experts of the best groups, and an expert that every token shares."""

    def __init__(self, config: BailingConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.mlp"
        self.choice = Choice(
            config.experts_per_token,
            config.groups,
            config.top_groups,
            normed=config.normed and config.experts_per_token > 1,
            factor=config.routed_factor,
        )
        # both float32: a choice between 256 scores that lie close together
        self.router = parameters.tensor(
            f"{prefix}.gate.weight", config.experts, config.hidden, dtype=torch.float32
        )
        self.bias = parameters.tensor(
            f"{prefix}.gate.expert_bias", config.experts, dtype=torch.float32
        )
        self.experts = Experts(
            parameters,
            f"{prefix}.experts",
            NAMES,
            count=config.experts,
            hidden=config.hidden,
            width=config.expert_width,
        )
        self.shared = None
        if config.shared_width:
            shared = f"{prefix}.shared_experts"
            self.shared = Dense(
                parameters, shared, NAMES, hidden=config.hidden, width=config.shared_width
            )

    def __call__(self, h: torch.Tensor) -> Rows:
        y = self.experts(h, *route(h, self.router, self.bias, self.choice))
        return y if self.shared is None else join(y).add_(self.shared(h))


def feed_forward(config: BailingConfig, index: int, parameters: Parameters) -> Dense:
    """What the first layers have in the place of experts."""
    prefix = f"model.layers.{index}.mlp"
    return Dense(parameters, prefix, NAMES, hidden=config.hidden, width=config.intermediate)


class Bailing:
    """Embedding, layers, final norm and head."""

    ignored = re.compile(r"(?!)")  # nothing of a release is passed over

    def __init__(self, fields: Fields, parameters: Parameters) -> None:
        self.config = config = BailingConfig.parse(fields)
        self.dtype = parameters.dtype
        shape = config.vocab_size, config.hidden
        self.embedding = parameters.tensor("model.word_embeddings.weight", *shape)
        layers = range(len(config.softmax))
        names = [f"model.layers.{i}.input_layernorm.weight" for i in layers]
        self.norms = [parameters.tensor(n, config.hidden) for n in (*names, "model.norm.weight")]
        names = [f"model.layers.{i}.post_attention_layernorm.weight" for i in layers]
        self.middle_norms = [parameters.tensor(name, config.hidden) for name in names]
        self.mixers = [
            (SoftmaxMixer if softmax else LightningMixer)(config, i, parameters)
            for i, softmax in enumerate(config.softmax)
        ]
        self.expand = [
            (feed_forward if i < config.dense_layers else Routed)(config, i, parameters)
            for i in layers
        ]
        self.head = self.embedding if config.tied else parameters.tensor("lm_head.weight", *shape)
        self.frequencies = rotary_frequencies(
            config.rotary_dim, config.rope_theta, parameters.device
        )

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def drawable(self) -> int:
        """How many of the rows no token stands behind is not published: all count."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the positions allow."""
        return self.config.max_positions if any(self.config.softmax) else None

    def slot_fields(self, memory: Memory) -> list[Field]:
        """What one sequence keeps in its slot: states of the lightning layers."""
        c = self.config
        fields: list[Field] = []
        for i, softmax in enumerate(c.softmax):
            if not softmax:
                fields += memory_fields(i, c.heads, c.head_dim, c.head_dim, memory)
        return fields

    def block_fields(self, block_size: int) -> list[Field]:
        """What one KV block of block_size positions holds: keys and values of the others."""
        c = self.config
        fields: list[Field] = []
        for i, softmax in enumerate(c.softmax):
            if softmax:
                fields += page_fields(i, block_size, c.kv_heads, c.head_dim, self.dtype)
        return fields

    def fold(self, batch: Batch, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        """The last mixer's stream and output, x and mixed [T, D]."""
        cos, sin = rotary_angles(batch.positions, self.frequencies)
        step = Step(batch, store, cos, sin)
        x = F.embedding(batch.ids, self.embedding)
        residual = Residual(x, None, self.norms[0], self.config.eps)
        for i, mixer in enumerate(self.mixers):
            x, mixed = mixer(residual, step)
            if i + 1 < len(self.mixers):
                residual = self._expand(i, x, mixed)
        return x, mixed

    def _expand(self, i: int, x: torch.Tensor, mixed: torch.Tensor) -> Residual:
        """What follows the mixer of layer i."""
        eps = self.config.eps
        x, h = Residual(x, mixed, self.middle_norms[i], eps).normed()
        return Residual(x, self.expand[i](h), self.norms[i + 1], eps)

    def finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Rows of fold() -> terms of their logits."""
        return residual_logits(self._expand(len(self.mixers) - 1, x, mixed), self.head)
