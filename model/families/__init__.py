"""Families of models, one file an architecture, chosen by the name in config.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Protocol

import torch

from model.batch import Batch
from model.config import ConfigError, Fields
from model.families.bailing import Bailing
from model.families.minimax import MiniMax
from model.families.transnormer import TransNormer
from model.lightning import Memory
from model.store import Field, Store
from model.weights import Parameters


class Family(Protocol):
    """What the runner asks of a model."""

    @property
    def ignored(self) -> re.Pattern[str]: ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def drawable(self) -> int:
        """Ids from here on are padding of the vocabulary: never sampled, of probability zero."""
        ...

    @property
    def max_positions(self) -> int | None: ...

    def slot_fields(self, memory: Memory) -> list[Field]: ...

    def block_fields(self, block_size: int) -> list[Field]: ...

    def fold(self, batch: Batch, store: Store) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the batch into the store: the stream and what the last mixer adds to it, [T, D]
        both. What follows is row by row: only the rows that are asked for."""
        ...

    def finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """R rows of what fold() leaves -> their logits, as terms [S, R, V] float32 of which they
        are the sum (kernels/logits.py)."""
        ...


FAMILIES: dict[str, Callable[[Fields, Parameters], Family]] = {
    "MiniMaxForCausalLM": MiniMax,
    "MiniMaxText01ForCausalLM": MiniMax,
    "MiniMaxM1ForCausalLM": MiniMax,
    "TransnormerForCausalLM": TransNormer,
    "BailingMoeLinearV2ForCausalLM": Bailing,
}


def build(fields: Fields, parameters: Parameters) -> Family:
    """The model that config.json names, its parameters allocated and not yet filled."""
    family = FAMILIES.get(fields.architecture)
    if family is None:
        raise ConfigError(
            f"{fields.source}: architecture {fields.architecture!r} is not served; "
            f"served are {', '.join(FAMILIES)}"
        )
    method = fields.values.get("quantization_config")
    if method is not None:
        raise ConfigError(
            f"{fields.source}: quantization_config is {method!r}: a checkpoint that is quantised "
            "already is not served, one in floats is, quantised by --quantization as it loads"
        )
    return family(fields, parameters)


def forward(model: Family, batch: Batch, store: Store) -> torch.Tensor:
    """Fold the batch into the store; terms [S, R, V] of the logits of the rows to sample."""
    return model.finish(*batch.sampled(*model.fold(batch, store)))


def drawable(model: Family, terms: torch.Tensor) -> torch.Tensor:
    """The terms with -inf, in place, for ids that no token stands behind: drawing and
    log-probabilities alike know of tokens alone."""
    terms[0, :, model.drawable :] = -math.inf
    return terms


def added(terms: torch.Tensor) -> torch.Tensor:
    """terms [S, R, V] -> logits [R, V]; those themselves where there is one term."""
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
