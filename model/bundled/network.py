"""The MiniMax architecture in plain torch, for training: windows, lightning attention, SwiGLU.

Parameter names are the checkpoint's. It has no cache and knows nothing of text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 64
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model; layers 0 and 2 attend in a sliding window, all others are lightning."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int = 64
    vocab_size: int = 272
    sliding_window: int = 64
    rope_theta: float = 1000.0
    alpha: float = 1.0  # the factor of every residual

    @property
    def layer_types(self) -> list[str]:
        windows = (0, 2)
        return [
            "full_attention" if layer in windows else "linear_attention"
            for layer in range(self.num_hidden_layers)
        ]

    def config(self) -> dict[str, Any]:
        """The config.json of the `MiniMaxForCausalLM` layout."""
        sizes = asdict(self)
        theta, alpha = sizes.pop("rope_theta"), sizes.pop("alpha")
        factors = {
            f"{part}_{factor}_factor": value
            for part in ("full_attn", "linear_attn", "mlp")
            for factor, value in (("alpha", alpha), ("beta", 1.0))
        }
        return {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": "minimax",
            **sizes,
            "num_key_value_heads": self.num_attention_heads,
            "layer_types": self.layer_types,
            **factors,
            "hidden_act": "silu",
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "rotary_dim": self.head_dim,
            "postnorm": True,
            "block_size": 256,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "max_position_embeddings": 10_240_000,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": [260, 256],
            "pad_token_id": 256,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": "bfloat16",
        }

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """The shape that a config.json tells of."""
        names = set(cls.__dataclass_fields__) - {"rope_theta", "alpha"}
        return cls(
            **{name: config[name] for name in names},
            rope_theta=config["rope_parameters"]["rope_theta"],
            alpha=config["mlp_alpha_factor"],
        )


def slopes(shape: Shape, layer: int, device: torch.device) -> Tensor:
    """The decay slopes [H] of a layer as transformers computes them; decay is exp(-slope)."""
    heads = shape.num_attention_heads
    rates = torch.arange(1, heads + 1, device=device).mul(-8 / heads).exp2()
    return rates * (1 - layer / (shape.num_hidden_layers - 1 + 1e-5) + 1e-5)


@cache
def decays(shape: Shape, layer: int, chunks: int, device: torch.device) -> tuple[Tensor, ...]:
    """What a layer's decay does to a key seen in the same chunk [H, 1, C, C], to a key by the end
    of its chunk [H, 1, C, 1], to a state between chunks [H, N, N] and to one read in a chunk."""
    slope = slopes(shape, layer, device)[:, None, None]  # [H, 1, 1]
    i = torch.arange(CHUNK, device=device)
    n = torch.arange(chunks, device=device)
    inside = torch.exp(-slope * (i[:, None] - i).clamp(min=0)).tril()[:, None]
    to_end = torch.exp(-slope * (CHUNK - 1 - i)[:, None])[:, None]
    between = torch.exp(-slope * CHUNK * (n[:, None] - 1 - n).clamp(min=0)).tril(-1)
    from_start = torch.exp(-slope * (i + 1)[:, None])[:, None]
    return inside, to_end, between, from_start


def lightning(q: Tensor, k: Tensor, v: Tensor, decay: tuple[Tensor, ...]) -> Tensor:
    """S_t = exp(-slope) S_(t-1) + k_t v_t^T, o_t = q_t^T S_t; q, k, v [B, H, T, D].

    In float32 by chunks, T a multiple of CHUNK; `decay` is what `decays` returns.
    """
    B, H, T, D = q.shape
    N = T // CHUNK
    inside, to_end, between, from_start = decay
    q, k, v = (x.float().reshape(B, H, N, CHUNK, D) for x in (q, k, v))
    o = (q @ k.transpose(-1, -2) * inside) @ v
    added = ((k * to_end).transpose(-1, -2) @ v).reshape(B, H, N, D * D)
    state = (between @ added).reshape(B, H, N, D, D)
    return (o + (q * from_start) @ state).reshape(B, H, T, D)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax over the last `window` positions, itself among them; q, k, v [B, H, T, D].

    By chunks of `window`, T a multiple of it.
    """
    B, H, T, D = q.shape
    N = T // window
    q = q.reshape(B, H, N, window, D)
    k, v = (F.pad(x, (0, 0, window, 0)).reshape(B, H, N + 1, window, D) for x in (k, v))
    k, v = (torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3) for x in (k, v))  # [B, H, N, 2W, D]
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device) - window
    seen = (j <= i) & (j > i - window)  # [W, 2W]
    first = torch.arange(N, device=q.device)[:, None, None] == 0
    seen = seen & ~(first & (j < 0))  # [N, W, 2W]
    scores = (q @ k.transpose(-1, -2)).float() * D**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
    return (weights @ v).reshape(B, H, T, D)


@cache
def angles(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cosines and sines of rotary positions, [length, dim / 2] each."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding over the whole head, halves paired; x [..., T, D]."""
    cos, sin = angles(x.shape[-2], x.shape[-1], theta, x.device)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


class WindowAttention(nn.Module):
    """Softmax attention with rotary positions in a sliding window."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.num_attention_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, self.shape.num_attention_heads, self.shape.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in projections)
        q, k = rotate(q, self.shape.rope_theta), rotate(k, self.shape.rope_theta)
        o = window_attention(q, k, v, self.shape.sliding_window)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class LightningAttention(nn.Module):
    """Linear attention with a fixed decay per head, normed and gated."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        inner = shape.num_attention_heads * shape.head_dim
        self.qkv_proj = nn.Linear(shape.hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(shape.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, shape.hidden_size, bias=False)
        self.norm = RMSNorm(inner)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        heads, dim = self.shape.num_attention_heads, self.shape.head_dim
        qkv = F.silu(self.qkv_proj(x)).view(B, T, heads, 3 * dim).transpose(1, 2)
        q, k, v = qkv.split(dim, dim=-1)
        o = lightning(q, k, v, decays(self.shape, self.layer, T // CHUNK, x.device)).to(x.dtype)
        o = self.norm(o.transpose(1, 2).reshape(B, T, -1))
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * o)


class Expert(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.w2 = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.w3 = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """One expert, which the router's softmax always gives the weight 1."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden_size, 1, bias=False).requires_grad_(False)
        self.experts = nn.ModuleList([Expert(shape)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


class Layer(nn.Module):
    """x = alpha h + Attn(h), h = norm(x); then the same with the mixture."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.alpha = shape.alpha
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)
        windowed = shape.layer_types[layer] == "full_attention"
        self.self_attn = WindowAttention(shape) if windowed else LightningAttention(shape, layer)
        self.block_sparse_moe = Mixture(shape)

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        x = self.alpha * h + self.self_attn(h)
        h = self.post_attention_layernorm(x)
        return self.alpha * h + self.block_sparse_moe(h)


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size)


class Network(nn.Module):
    """Token ids [B, T] to float32 logits [B, T, vocab_size]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2 and weight.requires_grad:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.normal_(self.model.embed_tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        ids = F.pad(ids, (0, -length % max(CHUNK, self.shape.sliding_window)))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return F.linear(self.model.norm(x[:, :length]).float(), self.lm_head.weight.float())
