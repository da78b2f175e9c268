"""Sampling: logits to ids for a whole batch on the device, and what comes of them on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kernels.sampling import draw
from model.chunk import Chunk, Sampled, Sampling
from model.sequences import Sequences
from model.transfer import upload

PROMPT = 1 << 30  # in Seen: this id stands in the prompt; the bits below count generated ones
MASK64 = (1 << 64) - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SPLITMIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
COLDEST = 1e-5  # below this temperature the best token is all that float32 would leave


def noise_keys(chunks: Sequence[Chunk]) -> np.ndarray:
    """64 bits (int64) for each chunk, a function of its sampling's seed and of how many tokens it
    has generated alone (splitmix64, two rounds); 0 where there is no sampling."""
    keys = _counted(_seeded([c.sampling for c in chunks]), [c.generated for c in chunks])
    return np.where([c.sampling is not None for c in chunks], keys, 0)


def _seeded(wanted: Sequence[Sampling | None]) -> np.ndarray:
    """The first round, of the seeds."""
    seeds = np.array([s.seed & MASK64 if s else 0 for s in wanted], dtype=np.uint64)
    return _mixed(seeds * GOLDEN + np.uint64(0x1234567))


def _counted(seeded: np.ndarray, generated: Sequence[int]) -> np.ndarray:
    """The second round, of how many tokens were generated."""
    return _mixed(seeded + np.array(generated, dtype=np.uint64)).view(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A round of splitmix64."""
    x = x + GOLDEN
    for shift, factor in SPLITMIX:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))


def warmth(sampling: Sampling) -> float:
    """The temperature, 0 where it is as good as that."""
    return sampling.temperature if sampling.temperature >= COLDEST else 0.0


class Wishes:
    """How the sequence in each slot asks for its tokens, as arrays: worked out when another
    Sampling comes to a slot, for a Sampling never changes.

    temperatures: warmth(), 0 where nothing is asked for.
    """

    def __init__(self, slots: int) -> None:
        self.temperatures = np.zeros(slots, dtype=np.float32)
        self._seeded = np.zeros(slots, dtype=np.uint64)
        self._plain = np.ones(slots, dtype=bool)
        self._known: list[Sampling | None] = [None] * slots

    def take(self, chunks: Sequence[Chunk]) -> None:
        """Learn what chunks ask for that their slots did not ask for before."""
        known = self._known
        new = [chunk for chunk in chunks if chunk.sampling is not known[chunk.slot]]
        if not new:
            return
        self._seeded[[chunk.slot for chunk in new]] = _seeded([chunk.sampling for chunk in new])
        for chunk in new:
            slot, sampling = chunk.slot, chunk.sampling
            known[slot] = sampling
            self.temperatures[slot] = warmth(sampling) if sampling else 0.0
            self._plain[slot] = sampling is None or _plain(sampling)

    def keys(self, slots: np.ndarray, generated: Sequence[int]) -> np.ndarray:
        """noise_keys() of slots that have generated so many; any where nothing is asked for."""
        return _counted(self._seeded[slots], generated)

    def plain(self, chunks: Sequence[Chunk]) -> bool:
        """Whether tokens are drawn from the logits as they are: kernels.sampling.draw does it. Of
        chunks that were taken."""
        if any([chunk.suppress for chunk in chunks]):
            return False
        return bool(self._plain[[chunk.slot for chunk in chunks]].all())


class Seen:
    """Which ids each penalised sequence has seen: int32 [V] a slot, made when its slot begins."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.rows: dict[int, torch.Tensor] = {}

    def record(self, chunks: Sequence[Chunk], sequences: Sequences) -> None:
        """Remember the tokens of penalised chunks; forget what recycled slots had seen."""
        generated: list[Chunk] = []
        for chunk in chunks:
            if chunk.start == 0:
                self.rows.pop(chunk.slot, None)
            if not chunk.penalised:
                continue
            row = self.rows.get(chunk.slot)
            if row is None:
                row = torch.zeros(self.vocab_size, dtype=torch.int32, device=self.device)
                self.rows[chunk.slot] = row
            if len(chunk.before):
                row[upload(chunk.before, self.device, np.int64)] |= PROMPT
            if chunk.prompt:
                row[upload(chunk.tokens, self.device, np.int64)] |= PROMPT
            else:
                generated.append(chunk)
        if generated:
            self._count(generated, sequences)

    def _count(self, chunks: Sequence[Chunk], sequences: Sequences) -> None:
        """Count generated tokens, those of all chunks in one transfer."""
        lengths = [len(chunk.tokens) for chunk in chunks]
        tokens = np.concatenate([np.asarray(chunk.tokens, dtype=np.int64) for chunk in chunks])
        slots = np.repeat(np.array([chunk.slot for chunk in chunks], dtype=np.int64), lengths)
        ids, slots_ = upload(np.stack((tokens, slots)), self.device).unbind()
        ids = sequences.ids(ids, sequences.rows(slots_))
        ones = torch.ones_like(ids, dtype=torch.int32)
        for chunk, part in zip(chunks, ids.split(lengths), strict=True):
            self.rows[chunk.slot].index_add_(0, part, ones[: len(part)])


def sample(logits: torch.Tensor, chunks: Sequence[Chunk], seen: Seen) -> torch.Tensor:
    """logits [R, V] float32, changed in place; chunks: the R that ask for a token.

    Returns float64 [R, 2 + 2 K] on the device: id (-1 where logits are not finite), its
    log-probability, then the K best (log-probability, id) pairs, K the most that a row asks for.
    """
    device = logits.device
    wanted = [c.sampling for c in chunks if c.sampling is not None]
    assert len(wanted) == len(logits)
    asking = [i for i, s in enumerate(wanted) if s.logprobs is not None]
    best = max((wanted[i].logprobs or 0 for i in asking), default=0)
    if asking:
        asked = upload(asking, device, np.int64)
        log_probabilities = logits[asked].log_softmax(-1)

    _bias(logits, chunks)
    penalised = [i for i, s in enumerate(wanted) if s.penalised]
    if penalised:
        table = torch.stack([seen.rows[chunks[i].slot] for i in penalised])
        rows = upload(penalised, device, np.int64)
        logits[rows] = _penalise(logits[rows], table, [wanted[i] for i in penalised])

    temperatures = upload([warmth(s) for s in wanted], device, np.float32)
    keys = upload(noise_keys(chunks), device)
    ids = draw(logits[None], temperatures, keys)
    filtered = [i for i, s in enumerate(wanted) if warmth(s) and _filtered(s)]
    if filtered:
        rows = upload(filtered, device, np.int64)
        some = logits if len(filtered) == len(logits) else logits[rows]
        drawn = _draw_filtered(
            (some - some.amax(1, keepdim=True)) / temperatures[rows, None],
            uniform(keys[rows]),
            [wanted[i] for i in filtered],
        )
        ids.index_copy_(0, rows, torch.where(ids[rows] < 0, ids[rows], drawn))

    result = torch.zeros(len(logits), 2 + 2 * best, dtype=torch.float64, device=device)
    result[:, 0] = ids
    if asking:
        of_drawn = log_probabilities.gather(1, ids[asked, None].clamp(min=0))
        result[asked, 1] = of_drawn[:, 0].double()
        values, best_ids = log_probabilities.topk(best, dim=-1)
        result[asked, 2 : 2 + best] = values.double()
        result[asked, 2 + best :] = best_ids.double()
    return result


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """keys [R] int64 -> numbers in [0, 1 - 2^-32], float64: their upper halves."""
    return ((keys >> 32) & 0xFFFFFFFF).double() / 2.0**32


def read(result: torch.Tensor, chunks: Sequence[Chunk]) -> list[Sampled]:
    """The rows of sample() once they are on the host; ids alone, [R] int64, do too."""
    if result.ndim == 1:
        return [Sampled(id) for id in result.tolist()]
    best = (result.shape[1] - 2) // 2
    samples = []
    for row, chunk in zip(result.tolist(), chunks, strict=True):
        sampled = Sampled(int(row[0]))
        asked = chunk.sampling.logprobs if chunk.sampling is not None else None
        if asked is not None:
            sampled.logprob = row[1]
            pairs = zip(row[2 : 2 + best], row[2 + best :], strict=True)
            sampled.top = [(int(i), value) for value, i in pairs][:asked]
        samples.append(sampled)
    return samples


def _column(values: list[float], device: torch.device) -> torch.Tensor:
    return upload(values, device, np.float32)[:, None]


def _filtered(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def _plain(s: Sampling) -> bool:
    return not (s.logit_bias or s.penalised or s.logprobs is not None or _filtered(s))


def _bias(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    """Add logit_bias and forbid suppressed ids, all rows in one scatter."""
    amounts: dict[tuple[int, int], float] = {}
    for i, chunk in enumerate(chunks):
        assert chunk.sampling is not None
        amounts |= {(i, token): value for token, value in chunk.sampling.logit_bias.items()}
        amounts |= {(i, token): -math.inf for token in chunk.suppress}
    if amounts:
        rows, ids = upload(np.array([*zip(*amounts, strict=True)]), logits.device).unbind()
        added = upload(list(amounts.values()), logits.device, np.float32)
        logits[rows, ids] = logits[rows, ids] + added  # no place twice: nothing has to be sorted


def _penalise(logits: torch.Tensor, table: torch.Tensor, wanted: list[Sampling]) -> torch.Tensor:
    """Repetition (CTRL, section 4.1), then presence and frequency (OpenAI) penalties."""
    device = logits.device
    counts = table & (PROMPT - 1)
    repetition = _column([s.repetition_penalty for s in wanted], device)
    presence = _column([s.presence_penalty for s in wanted], device)
    frequency = _column([s.frequency_penalty for s in wanted], device)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(table > 0, repeated, logits)
    return logits - presence * (counts > 0) - frequency * counts


def _invert(probabilities: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulative sum passes noise [R] of its total, [R, 1] int64.

    Both are float64: noise of at most 1 - 2^-32 stays below the total, so what is found has mass.
    Only in a row of NaN nothing is found; its index stays inside the row all the same.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True)
    return found.clamp_(max=probabilities.shape[1] - 1)


def _draw_filtered(
    logits: torch.Tensor, noise: torch.Tensor, wanted: list[Sampling]
) -> torch.Tensor:
    """Draw among the top_k best, those of at least min_p times the best's probability, and the
    fewest that hold top_p of what is left."""
    device, vocab = logits.device, logits.shape[1]
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    top_k = _column([min(s.top_k or vocab, vocab) for s in wanted], device)
    log_min_p = _column([math.log(s.min_p) if s.min_p > 0 else -math.inf for s in wanted], device)
    top_p = _column([s.top_p for s in wanted], device)
    ranks = torch.arange(vocab, device=device)
    kept = (ranks < top_k) & (values >= values[:, :1] + log_min_p)
    probabilities = values.masked_fill(~kept, -math.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (ranks > 0), 0.0)
    return order.gather(1, _invert(probabilities, noise))[:, 0]
