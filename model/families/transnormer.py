"""TransNormerLLM (arXiv 2307.14995): lightning layers only, so a sequence keeps a constant state.

Pre-norm residual: x += mixer(norm(x)); x += glu(norm(x)). Norms have no weights, the gated unit no
activation, and the embedding is the head.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.fused_linear import Residual, gate_linear, residual_linear
from kernels.linear import linear
from kernels.logits import residual_logits
from kernels.lrpe import lrpe
from model.batch import Batch
from model.config import Fields
from model.layers import alibi_slopes, layer_factor
from model.lightning import Lightning, Memory, memory_fields
from model.store import Field, Store
from model.weights import Parameters

EPS = 1e-6  # of SimpleRMSNorm; no field of config.json sets it


@dataclass(slots=True, frozen=True, kw_only=True)
class TransNormerConfig:
    """config.json of TransnormerForCausalLM; lrpe[i] says whether layer i has LRPE."""

    dim: int
    hidden: int
    heads: int
    head_dim: int
    glu: int
    vocab_size: int
    lrpe: tuple[bool, ...]
    embedding_scale: float
    tied: bool

    @classmethod
    def parse(cls, fields: Fields) -> TransNormerConfig:
        """Check and take the fields. Raises ConfigError that names the first bad one."""
        fields.only("norm_type", "simplermsnorm")
        fields.only("linear_act_fun", "swish", "silu")
        fields.only("glu_act", "none")
        fields.only("bias", False)
        fields.only("gate_dim", None)
        fields.without("decay_layer_factor", "only one is published for this architecture")
        dim = fields.integer("decoder_embed_dim")
        hidden = fields.integer("hidden_dim")
        heads = fields.integer("decoder_attention_heads")
        if hidden % heads:
            raise fields.fail("hidden_dim", f"a multiple of {heads}")
        count = fields.integer("decoder_layers")
        lrpe_list = fields.values.get("linear_use_lrpe_list")
        if (
            not isinstance(lrpe_list, list)
            or len(lrpe_list) != count
            or not all(type(use) is int and use in (0, 1) for use in lrpe_list)
        ):
            raise fields.fail("linear_use_lrpe_list", f"a list of {count} of 0, 1")
        unscaled = fields.flag("no_scale_embedding", False)
        return cls(
            dim=dim,
            hidden=hidden,
            heads=heads,
            head_dim=hidden // heads,
            glu=dim if fields.values.get("glu_dim") == -1 else fields.integer("glu_dim"),
            vocab_size=fields.integer("vocab_size"),
            lrpe=tuple(map(bool, lrpe_list)),
            embedding_scale=1.0 if unscaled else math.sqrt(dim),
            tied=fields.flag("tie_word_embeddings", True),
        )

    def key_dim(self, index: int) -> int:
        """Width of a key: LRPE doubles it."""
        return self.head_dim * (2 if self.lrpe[index] else 1)


class LightningMixer:
    """o = norm(q^T S) * u: silu on q and k, LRPE in the layers that have it, no scale."""

    def __init__(self, config: TransNormerConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.token_mixer"
        self.heads, self.dim, self.width = config.heads, config.head_dim, config.hidden
        self.qkvu = parameters.matrix(f"{prefix}.qkvu_proj.weight", 4 * self.width, config.dim)
        self.out = parameters.matrix(f"{prefix}.out_proj.weight", config.dim, self.width)
        self.theta = None
        if config.lrpe[index]:  # angles: rounded to 16 bits they would be others after some tokens
            self.theta = parameters.tensor(
                f"{prefix}.lrpe.theta", self.heads, 1, self.dim, dtype=torch.float32
            )
        slopes = alibi_slopes(self.heads) * layer_factor(index, len(config.lrpe))
        slopes = slopes.to(device=parameters.device, dtype=torch.float32)
        self.lightning = Lightning(index, slopes, scale=1.0)

    def __call__(
        self, residual: Residual, batch: Batch, store: Store
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, projected = residual_linear(residual, self.qkvu, silu=2 * self.width)
        qk = projected[:, : 2 * self.width].unflatten(1, (2 * self.heads, self.dim))
        if self.theta is not None:
            qk = lrpe(qk, self.theta.squeeze(1), batch.positions)
        q, k = qk.chunk(2, dim=1)
        v, u = projected[:, 2 * self.width :].chunk(2, dim=1)
        v = v.unflatten(1, (self.heads, self.dim))
        o = batch.attend(self.lightning, q, k, v, store)
        return x, gate_linear(o.flatten(1), u, None, EPS, self.out, sigmoid=False)


class GatedUnit:
    """l3(l1(h) * l2(h))."""

    def __init__(self, config: TransNormerConfig, index: int, parameters: Parameters) -> None:
        prefix = f"model.layers.{index}.channel_mixer"
        names = [(f"{prefix}.l1.weight", config.glu), (f"{prefix}.l2.weight", config.glu)]
        self.both = parameters.rows(names, config.dim)
        self.out = parameters.matrix(f"{prefix}.l3.weight", config.dim, config.glu)

    def __call__(self, residual: Residual) -> tuple[torch.Tensor, torch.Tensor]:
        x, gated = residual_linear(residual, self.both, pair="mul")
        return x, linear(gated, self.out)


class TransNormer:
    """Embedding, layers, final norm and head."""

    def __init__(self, fields: Fields, parameters: Parameters) -> None:
        self.config = config = TransNormerConfig.parse(fields)
        shape = config.vocab_size, config.dim
        self.embedding = parameters.tensor("model.embed_tokens.weight", *shape)
        layers = range(len(config.lrpe))
        self.mixers = [LightningMixer(config, i, parameters) for i in layers]
        self.units = [GatedUnit(config, i, parameters) for i in layers]
        self.head = self.embedding if config.tied else parameters.tensor("lm_head.weight", *shape)
        # some releases write the tied head a second time
        self.ignored = re.compile(r"lm_head\.weight" if config.tied else r"(?!)")

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.vocab_size

    @property
    def drawable(self) -> int:
        """Every row is a token's."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Nothing bounds a sequence."""
        return None

    def slot_fields(self, memory: Memory) -> list[Field]:
        """What one sequence keeps in its slot."""
        c = self.config
        fields: list[Field] = []
        for i in range(len(c.lrpe)):
            fields += memory_fields(i, c.heads, c.key_dim(i), c.head_dim, memory)
        return fields

    def block_fields(self, block_size: int) -> list[Field]:
        """No keys and values are kept."""
        return []

    def fold(self, batch: Batch, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        """The last mixer's stream and output, x and mixed [T, D]."""
        x = F.embedding(batch.ids, self.embedding)
        residual = Residual(x, None, None, EPS, alpha=self.config.embedding_scale)
        for i, mixer in enumerate(self.mixers):
            x, mixed = mixer(residual, batch, store)
            if i + 1 < len(self.mixers):
                residual = self._expand(i, x, mixed)
        return x, mixed

    def _expand(self, i: int, x: torch.Tensor, mixed: torch.Tensor) -> Residual:
        """What follows the mixer of layer i."""
        return Residual(*self.units[i](Residual(x, mixed, None, EPS)), None, EPS)

    def finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Rows of fold() -> terms of their logits."""
        return residual_logits(self._expand(len(self.mixers) - 1, x, mixed), self.head)
