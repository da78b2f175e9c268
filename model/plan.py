"""Plan: what a model takes and how many sequences fit on given GPUs, from config.json alone.

The model is built on torch's meta device, which allocates nothing: parameters, slots and KV blocks
are counted from the declarations that a real run allocates by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.quantize import Quantized
from model.config import ConfigError, Fields
from model.families import build
from model.lightning import Memory
from model.runner import BLOCK_SIZE, DTYPES, RING, divide, sampling_bytes
from model.store import Field, row_bytes
from model.weights import QUANTIZATIONS, Parameters

GPUS = {  # bytes of memory, about as CUDA reports them
    "a100-40gb": 42_400_000_000,
    "a100": 85_000_000_000,
    "h100": 85_000_000_000,
    "h200": 150_100_000_000,
    "b200": 191_500_000_000,
    "gh200": 101_500_000_000,
    "h20": 102_100_000_000,
    "l4": 23_600_000_000,
    "l40s": 47_700_000_000,
    "rtx4090": 25_300_000_000,
    "rtx5090": 33_700_000_000,
    "rtx6000ada": 50_900_000_000,
    "rtxpro6000": 101_900_000_000,
}
CONTEXT_BYTES = 600_000_000  # what CUDA and its libraries take of a GPU before anything else
FULL_KV_HEADS = 8  # of a full-attention peer, where the model has no softmax layer to go by
COUNTS = tuple(2**i for i in range(11))  # of GPUs
CONTEXTS = (1024, 8192, 32_768, 131_072, 1 << 20, 1 << 22)


@dataclass(slots=True, frozen=True, kw_only=True)
class Footprint:
    """What a model takes, in bytes.

    weights:     by quantization.
    slot:        one sequence's state and windows, whatever its length.
    block:       one KV block of BLOCK_SIZE positions; 0 without full softmax layers.
    full_token:  KV of a token in a full-attention model of the same shape: as many layers, heads
                 of the same width, as many KV heads.
    row:         activations of one row of a step, about.
    """

    architecture: str
    layers: int
    weights: dict[str, int]
    slot: int
    block: int
    kv_heads: int
    full_token: int
    row: int
    vocab_size: int
    max_positions: int | None
    block_size: int = BLOCK_SIZE

    @property
    def pays_off(self) -> int | None:
        """From how many tokens on a sequence takes less than with full attention; None: never."""
        saved = self.full_token - self.block // self.block_size
        return -(-self.slot // saved) if saved > 0 else None

    def sequence(self, positions: int) -> int:
        """A sequence of so many tokens."""
        return self.slot + -(-positions // BLOCK_SIZE) * self.block


def footprint(
    fields: Fields,
    *,
    dtype: str = "bfloat16",
    state_dtype: str = "float32",
    ring: int | None = None,
) -> Footprint:
    """What the model of a config.json takes. Raises ConfigError when it is not served.

    Without a word on the ring, it is that of a run on CUDA.
    """
    ring = RING if ring is None else ring
    kind = DTYPES[dtype]
    parameters = Parameters(torch.device("meta"), kind)
    model = build(fields, parameters)
    slot_fields = model.slot_fields(Memory(DTYPES[state_dtype], ring, kind))
    block_fields = model.block_fields(BLOCK_SIZE)
    kv_heads, head_dim = _heads(slot_fields, block_fields)
    layers = len({field.name.rpartition(".")[2] for field in slot_fields + block_fields})
    top = fields.values.get("num_experts_per_tok")
    return Footprint(
        architecture=fields.architecture,
        layers=layers,
        weights={name: _weights(parameters, codes) for name, codes in QUANTIZATIONS.items()},
        slot=row_bytes(slot_fields),
        block=row_bytes(block_fields),
        kv_heads=kv_heads,
        full_token=layers * 2 * kv_heads * head_dim * kind.itemsize,
        row=_row(parameters, top if type(top) is int else 1),
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
    )


def _weights(parameters: Parameters, codes: torch.dtype | None) -> int:
    """Bytes of all parameters, those of linear layers as codes of a dtype and scales."""
    total = parameters.nbytes
    if codes is not None:
        for weight in parameters.linear:
            made = Quantized.empty(tuple(weight.shape), codes, parameters.device)
            total += made.nbytes - weight.nbytes
    return total


def _heads(slot_fields: list[Field], block_fields: list[Field]) -> tuple[int, int]:
    """KV heads and their width in a softmax layer of the model's shape."""
    for field in block_fields + slot_fields:
        if field.name.startswith("keys.") and len(field.shape) == 3:  # [positions, heads, width]
            return field.shape[1], field.shape[2]
    states = [field for field in slot_fields if field.name.startswith("state.")]
    heads, _, width = states[-1].shape
    return min(heads, FULL_KV_HEADS), width


def _row(parameters: Parameters, top: int) -> int:
    """Bytes that one row takes between layers: in and out of the widest matrix, twice."""
    widths = [
        (top if tensor.ndim == 3 else 1) * (tensor.shape[-1] + tensor.shape[-2])
        for tensor in parameters.linear
    ]
    return max(widths, default=0) * parameters.dtype.itemsize * 2


@dataclass(slots=True, frozen=True, kw_only=True)
class Row:
    """Sequences of one length: bytes of one, and how many fit. Beside full attention."""

    context: int
    bytes: int
    sequences: int
    full_bytes: int
    full_sequences: int


@dataclass(slots=True, frozen=True, kw_only=True)
class Plan:
    """A model on GPUs. Bytes of weights, workspace and budget are of one GPU.

    An even split over several GPUs is assumed: of weights and states as it is, of KV blocks down
    to one KV head a GPU.
    """

    footprint: Footprint
    quantization: str
    gpus: int
    gpu_bytes: int
    weights: int
    workspace: int
    budget: int
    slot: int
    block: int
    max_running: int
    slots: int
    blocks: int
    rows: list[Row]
    longest: int | None
    full_longest: int
    gpus_needed: int | None

    @property
    def fits(self) -> bool:
        """Whether one sequence fits at all."""
        return self.slots > 0


def plan(
    footprint: Footprint,
    *,
    gpu_bytes: int,
    gpus: int = 1,
    quantization: str = "none",
    max_running: int = 256,
    memory_fraction: float = 0.9,
    step_tokens: int = 8192,
    contexts: tuple[int, ...] = CONTEXTS,
) -> Plan:
    """What of the model fits on the GPUs.

    `longest` is the longest context that max_running sequences have at once, None when nothing
    bounds it; `gpus_needed` the least power of two of GPUs that hold one sequence, None when none
    of COUNTS does.
    """
    f = footprint
    workspace = CONTEXT_BYTES + step_tokens * f.row + sampling_bytes(max_running, f.vocab_size)
    usable = int(gpu_bytes * memory_fraction) - workspace

    def share(count: int) -> tuple[int, int, int, int]:
        """Of one of so many GPUs: weights, slot, block, and what is left for slots and blocks."""
        weights = -(-f.weights[quantization] // count)
        block = -(-f.block // min(count, f.kv_heads))
        return weights, -(-f.slot // count), block, usable - weights

    weights, slot, block, budget = share(gpus)
    full_token = -(-f.full_token // min(gpus, f.kv_heads))
    rows = [
        Row(
            context=context,
            bytes=f.sequence(context),
            sequences=_sequences(budget, slot, block, context),
            full_bytes=f.full_token * context,
            full_sequences=max(budget, 0) // (full_token * context),
        )
        for context in contexts
        if f.max_positions is None or context <= f.max_positions
    ]
    slots, blocks = _divided(budget, slot, block, max_running)
    longest = None
    if block:
        longest = blocks // max_running * BLOCK_SIZE if slots == max_running else 0
        longest = min(longest, f.max_positions or longest)
    elif slots < max_running:
        longest = 0
    return Plan(
        footprint=f,
        quantization=quantization,
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        weights=weights,
        workspace=workspace,
        budget=budget,
        slot=slot,
        block=block,
        max_running=max_running,
        slots=slots,
        blocks=blocks,
        rows=rows,
        longest=longest,
        full_longest=max(budget, 0) // max_running // full_token,
        gpus_needed=next((n for n in COUNTS if _fits(*share(n)[1:])), None),
    )


def _fits(slot: int, block: int, budget: int) -> bool:
    return _divided(budget, slot, block, 1) != (0, 0)


def _divided(budget: int, slot: int, block: int, max_running: int) -> tuple[int, int]:
    """Slots and blocks as a run divides the budget; none where one sequence is too much."""
    try:
        return divide(budget, slot, block, max_running)
    except ConfigError:
        return 0, 0


def _sequences(budget: int, slot: int, block: int, context: int) -> int:
    """How many sequences of one length a run holds at once, told to run so many."""
    each = -(-context // BLOCK_SIZE)
    most = max(budget, 0) // (slot + each * block)
    slots, blocks = _divided(budget, slot, block, max(most, 1))
    return min(slots, blocks // each) if block else min(slots, most)
