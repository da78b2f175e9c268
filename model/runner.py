"""The runner: loads a checkpoint, sizes its memory, warms up, and runs steps."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kernels.exchange import send
from model import image
from model.batch import Batch
from model.chunk import Capacity, Chunk, Copy, OutOfDeviceMemory, Sampled, Sampling
from model.config import ConfigError, Fields
from model.families import Family, added, build, drawable
from model.graphs import DecodeGraphs, EndGraphs, Graphs, Replayed
from model.lightning import Memory
from model.pieces import PiecewiseGraphs
from model.sampling import Seen, read, sample
from model.sequences import Sequences
from model.store import Field, Saved, Store, row_bytes
from model.transfer import upload
from model.weights import Parameters, fingerprint

BLOCK_SIZE = 64  # positions of a KV block
CPU_STATE_BYTES = 4_000_000_000
CAPTURED = 512  # sequences of the largest step that is a CUDA graph
RING = 16  # tokens beside a state on CUDA: a step then writes a fifteenth of it
GB = 1_000_000_000
FP8 = (8, 9)  # compute capability from which on a card multiplies fp8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True, frozen=True, eq=False)
class Launched:
    """A step under way: its chunks, which of them ask, what these or all of them draw (on the host
    once `done`).

    Without `done` the step is over.
    """

    chunks: list[Chunk]
    asking: list[int]
    drawn: torch.Tensor | None
    done: torch.cuda.Event | None


class ModelRunner:
    """A model with its store. Step and copy run in the order in which they are called."""

    def __init__(
        self,
        model: Family,
        store: Store,
        capacity: Capacity,
        *,
        max_step_tokens: int,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.capacity = capacity
        self.max_step_tokens = max_step_tokens
        self.seconds = seconds or {}
        self.seen = Seen(model.vocab_size, store.device)
        self.saved: dict[str, Saved] = {}
        most = -(-(capacity.max_model_len or 0) // BLOCK_SIZE) if capacity.blocks else 0
        self.sequences = Sequences(store.slots.count, most, store.device)
        self.overlaps = store.device.type == "cuda"
        self.graphs: DecodeGraphs | None = None
        self.pieces: PiecewiseGraphs | None = None
        self.ends: EndGraphs | None = None
        self.parameters: Parameters | None = None

    def step(self, chunks: list[Chunk]) -> list[Sampled | None]:
        """Launch a step and collect it."""
        return self.collect(self.launch(chunks))

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Launched:
        """Begin to fold each chunk into its slot and draw the tokens that are asked for.

        Raises OutOfDeviceMemory; the slots of these chunks then hold garbage, others are as before.
        """
        graphs = self.graphs if self.graphs is not None and self.graphs.serve(chunks) else None
        asking, ordered = self._ordered(chunks, whole=graphs is not None)
        try:
            self.sequences.keep(chunks)
            self.seen.record(chunks, self.sequences)
            drawn = self._run(ordered) if graphs is None else self._replay(graphs, ordered)
            self.store.depart()  # the device has a step to do, which takes it longer
            return Launched(chunks, asking, *self._leave(drawn))
        except torch.OutOfMemoryError as error:
            self.store.depart()  # what is to leave takes memory until then
            torch.cuda.empty_cache()
            raise OutOfDeviceMemory(str(error).split(".")[0]) from error

    @staticmethod
    def _ordered(chunks: list[Chunk], *, whole: bool) -> tuple[list[int], list[Chunk]]:
        """Which chunks ask, in the order in which they are computed, and what is computed: chunks
        as they are, or their parts, those of one token first."""
        parts = list(enumerate(chunks))
        if not whole:
            parts = [(i, part) for i, chunk in parts for part in chunk.parts]
            parts.sort(key=lambda part: len(part[1].tokens) > 1)
        asking = [i for i, part in parts if part.sampling is not None]
        return asking, [part for _, part in parts]

    def collect(self, launched: Launched) -> list[Sampled | None]:
        """The tokens of a step, in the order of its chunks, once they are there."""
        self.store.depart()
        if launched.done is not None:
            launched.done.synchronize()
        results: list[Sampled | None] = [None] * len(launched.chunks)
        if launched.drawn is not None and launched.asking:
            drawn, asking = launched.drawn, launched.asking
            if len(drawn) > len(asking):  # a graph draws for every chunk, in their order
                drawn = drawn[asking]
            chunks = [launched.chunks[i] for i in asking]
            for i, sampled in zip(asking, read(drawn, chunks), strict=True):
                results[i] = sampled
        return results

    def _replay(self, graphs: DecodeGraphs, chunks: list[Chunk]) -> torch.Tensor | None:
        """A step of one token of each sequence, by a graph. What it draws lies on the host if that
        is for all rows, else on the device for those that ask."""
        return self._draw(graphs, graphs.replay(chunks), chunks)

    def _run(self, chunks: list[Chunk]) -> torch.Tensor | None:
        """Any step, by graphs as far as they go. What it draws is for those that ask."""
        asking = [chunk for chunk in chunks if chunk.sampling is not None]
        pieces, ends, n = self.pieces, self.ends, len(asking)
        if pieces is not None and pieces.short(chunks):
            pieces.fold_short(chunks)
            batch, folded = None, pieces.asked
        else:
            batch = Batch.pack(chunks, self.sequences)
            if pieces is not None and pieces.serve(batch):
                folded = pieces.fold(batch)
            else:
                folded = self.model.fold(batch, self.store)
        if not asking:
            return None
        if ends is not None and ends.serve(n):
            if batch is not None:
                ends.gather(folded, batch.sample_rows)
            return self._draw(ends, ends.replay(asking), asking)
        rows = [x[:n] for x in folded] if batch is None else batch.sampled(*folded)
        return self._sample(drawable(self.model, self.model.finish(*rows)), asking)

    def _draw(self, graphs: Graphs, replayed: Replayed, chunks: list[Chunk]) -> torch.Tensor:
        """What a graph has drawn, or what comes of its logits where a chunk asks for more."""
        if graphs.wishes.plain(chunks):
            return replayed.ids
        return self._sample(replayed.terms, chunks)

    def _sample(self, terms: torch.Tensor, chunks: list[Chunk]) -> torch.Tensor:
        """Draw as chunks ask, from the terms of their logits: for those that ask."""
        logits = added(terms)
        asking = [chunk for chunk in chunks if chunk.sampling is not None]
        if len(asking) < len(chunks):
            places = [i for i, chunk in enumerate(chunks) if chunk.sampling is not None]
            logits = logits[upload(places, self.store.device, np.int64)]
        drawn = sample(logits, asking, self.seen)
        self._remember(asking, drawn)
        return drawn

    def _remember(self, asking: list[Chunk], drawn: torch.Tensor) -> None:
        slots = upload([chunk.slot for chunk in asking], self.store.device, np.int32)
        self.sequences.drawn(self.sequences.rows(slots), drawn[:, 0].long())

    def _leave(
        self, drawn: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.cuda.Event | None]:
        """What a step has drawn, on the host, and when it is there: until then a kernel may write
        that memory, of which the allocator does not know. A graph has told it."""
        if self.store.device.type != "cuda":
            return drawn, None
        host = drawn
        if drawn is not None and drawn.is_cuda:
            host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            send(drawn, host)
        done = torch.cuda.Event()
        done.record()
        return host, done

    @torch.inference_mode()
    def copy(self, copies: list[Copy]) -> None:
        """Save, restore, move or forget states, in order."""
        for item in copies:
            source, target = item.source, item.target
            seen = None if item.bare or source.slot is None else self.seen.rows.get(source.slot)
            if target is not None and target.slot is not None:
                self.sequences.forget(target.slot)
            if target is None:
                assert source.key is not None, "a slot is given back, not forgotten"
                self.saved.pop(source.key, None)
            elif source.slot is not None and target.key is not None:
                self.saved[target.key] = self.store.save(source.slot, source.blocks, seen)
            elif source.key is not None and target.slot is not None:
                saved = self.saved[source.key]
                self.store.restore(saved, target.slot, target.blocks)
                self._set_seen(target.slot, None if item.bare else saved.seen)
            elif source.slot is not None and target.slot is not None:
                pairs = list(zip(source.blocks, target.blocks, strict=True))
                self.store.move(source.slot, target.slot, pairs)
                self._set_seen(target.slot, seen)
            elif source.key is not None and target.image is not None:
                self.store.depart()
                target.image.fill(
                    partial(
                        image.tensors,
                        self.saved[source.key],
                        self.store,
                        position=source.position,
                        block_size=self.capacity.block_size,
                    )
                )
            elif source.image is not None and target.key is not None:
                self.saved[target.key] = image.read(source.image, self.store)
            else:
                raise ValueError(f"cannot copy {source} to {target}")

    def _set_seen(self, slot: int, row: torch.Tensor | None) -> None:
        self.seen.rows.pop(slot, None)
        if row is not None:
            self.seen.rows[slot] = row.to(self.store.device, non_blocking=True, copy=True)

    def device_memory(self) -> int:
        """Bytes of device memory that the process has reserved; on the CPU, resident bytes."""
        if self.store.device.type == "cuda":
            return torch.cuda.memory_reserved(self.store.device)
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if _PROC.exists() else 0
        return pages * resource.getpagesize()

    def device_room(self) -> tuple[int, int]:
        """Bytes free and in all, whoever holds the rest; on the CPU, of the host's memory."""
        if self.store.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.store.device)
            return free, total
        if not _MEMORY.exists():
            return 0, 0
        lines = (line.split() for line in _MEMORY.read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}  # in kB
        return sizes["MemAvailable:"], sizes["MemTotal:"]

    def warm_up(self, tokens: int) -> None:
        """Run every kind of step once, so that no kernel compiles or is loaded under a request.

        Chunks of all sizes up to `tokens`, so that the allocator has reached its working size. Uses
        slots 0 and 1 (and the first blocks), which nobody owns yet.
        """
        blocks = range(-(-tokens // BLOCK_SIZE)) if self.capacity.blocks else ()
        draw = Sampling(temperature=1.0, top_k=2, logprobs=1)
        ladder = {tokens, 1, min(tokens, 100), *(2**i for i in range(1, tokens.bit_length()))}
        for n in sorted(ladder, reverse=True):
            zeros = [0] * n
            self.step([Chunk(tokens=zeros, start=0, slot=0, blocks=blocks, sampling=draw)])
        self.step([Chunk(tokens=[0], start=1, slot=0, blocks=blocks, sampling=Sampling())])
        steered = Chunk(
            tokens=[0],
            start=1,
            slot=0,
            blocks=blocks,
            sampling=Sampling(logit_bias={0: 1.0}, presence_penalty=1.0),
            prompt=False,
            penalised=True,
            before=[0],
        )
        self.step([steered])
        self.seen.rows.clear()
        if tokens > 2:  # a prompt that goes on: its state may be copied first
            rest = [0] * (min(tokens, 512) - 1)
            self.step([Chunk(tokens=rest, start=1, slot=0, blocks=blocks)])
        if tokens >= 3:  # a prompt whose last token is computed apart
            self.step([Chunk(tokens=[0] * 3, start=0, slot=0, blocks=blocks[:1], apart=True)])
        if self.capacity.slots > 1 and tokens >= 3:
            one = Chunk(tokens=[0], start=2, slot=0, blocks=blocks[:1], sampling=draw)
            two = Chunk(tokens=[0, 0], start=0, slot=1, blocks=blocks[1:2] or blocks, sampling=draw)
            self.step([one, two])
        if blocks and tokens >= 3:
            # a short chunk behind many tokens: attention in pieces, which are joined
            self.step([Chunk(tokens=[0, 0], start=tokens - 2, slot=0, blocks=blocks)])


_PROC = Path("/proc/self/statm")
_MEMORY = Path("/proc/meminfo")


def load_runner(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_running: int = 256,
    memory_fraction: float = 0.9,
    state_memory_gb: float | None = None,
    max_model_len: int | None = None,
    max_step_tokens: int | None = None,
    host_bytes: int = 0,
    quantization: str = "none",
    state_dtype: str = "float32",
    ring: int | None = None,
    decay_layer_factor: str = "auto",
    seed: int | None = None,
) -> ModelRunner:
    """Load the checkpoint in `path` and make it ready to serve.

    With a seed its weights are not read but drawn: config.json is all that has to be there.
    host_bytes of pinned memory are taken beforehand, for states that leave the device.
    quantization is of the weights of linear layers: see model.weights.QUANTIZATIONS. state_dtype
    and ring are of the lightning layers' memory: see model.lightning.Memory. Without a word on the
    ring, decoding keeps RING tokens on CUDA and none elsewhere. decay_layer_factor stands in for
    the field of that name in config.json: see docs/decay.md.
    Raises ConfigError or WeightsError naming what is wrong with the checkpoint or the bounds.
    """
    seconds: dict[str, float] = {}
    where = _device(device)
    _check(quantization, where)
    kind = DTYPES.get(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
    if threads is not None:
        torch.set_num_threads(threads)
    if kind == torch.float32:
        torch.backends.cuda.matmul.allow_tf32 = False
    ring = (RING if where.type == "cuda" else 0) if ring is None else ring
    step_tokens = max_step_tokens or (8192 if where.type == "cuda" else 2048)

    with _phase(seconds, "load"):
        fields = Fields.read(path)
        if decay_layer_factor != "auto":
            fields = fields.but(decay_layer_factor=decay_layer_factor)
        parameters = Parameters(where, kind, quantization)
        model = build(fields, parameters)
        if seed is None:
            parameters.fill(path, ignore=model.ignored)
            name = fingerprint(path, decay_layer_factor, quantization)
        else:
            parameters.randomize(seed)
            name = f"random-{seed}-{quantization}"

    with _phase(seconds, "memory"):
        memory = Memory(DTYPES[state_dtype], ring, kind)
        slot_fields = model.slot_fields(memory)
        slot_bytes = row_bytes(slot_fields)
        block_bytes = row_bytes(model.block_fields(BLOCK_SIZE))
        if state_memory_gb is not None:
            budget = int(state_memory_gb * GB)
        elif where.type == "cuda":
            budget = _cuda_budget(
                model, slot_fields, where, step_tokens, max_running, memory_fraction
            )
        else:
            budget = CPU_STATE_BYTES
        slots, blocks = divide(budget, slot_bytes, block_bytes, max_running)
        length = longest(max_model_len, blocks, model.max_positions)
        store = Store(
            slot_fields,
            model.block_fields(BLOCK_SIZE),
            slots=slots,
            blocks=blocks,
            device=where,
        )
    capacity = Capacity(
        slots=slots,
        state_bytes=slot_bytes,
        blocks=blocks,
        block_size=BLOCK_SIZE if blocks else 0,
        block_bytes=block_bytes,
        rollback=memory.rollback,
        pinned=where.type == "cuda",
        max_model_len=length,
        vocab_size=model.vocab_size,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        dtype=str(kind).removeprefix("torch."),
        fingerprint=name,
        slot_layout=image.layout(slot_fields),
        block_layout=image.layout(model.block_fields(BLOCK_SIZE)) if blocks else (),
    )
    runner = ModelRunner(model, store, capacity, max_step_tokens=step_tokens, seconds=seconds)
    runner.parameters = parameters
    tokens = min(step_tokens, length or step_tokens)
    with _phase(seconds, "warm_up"):
        runner.warm_up(tokens)
    if where.type == "cuda":
        with _phase(seconds, "graphs"):
            most, pool = min(slots, CAPTURED), torch.cuda.graph_pool_handle()
            runner.graphs = DecodeGraphs(model, store, runner.sequences, most)
            runner.graphs.capture(pool)
            runner.pieces = PiecewiseGraphs(model, store, runner.sequences, step_tokens)
            runner.pieces.capture()
            wishes, asked = runner.graphs.wishes, [x[:most] for x in runner.pieces.asked]
            runner.ends = EndGraphs(model, wishes, runner.sequences, asked)
            runner.ends.capture(pool)
            # again: capturing has emptied the allocator's cache; what is served by graphs from here
            # on was compiled without them by the first time
            runner.warm_up(tokens)
        with _phase(seconds, "host"):
            store.reserve(host_bytes)  # last: capturing gives pinned memory back to the system
    store.slots.poison()
    return runner


def divide(budget: int, slot_bytes: int, block_bytes: int, max_running: int) -> tuple[int, int]:
    """How many slots and KV blocks a budget in bytes holds.

    A hybrid's slots take at most half of it, its blocks the rest. Raises ConfigError when not even
    one sequence fits.
    """
    share = budget if block_bytes == 0 else budget // 2
    slots = min(max_running, share // slot_bytes) if slot_bytes else max_running
    blocks = (budget - slots * slot_bytes) // block_bytes if block_bytes else 0
    if slots < 1 or (block_bytes and blocks < 1):
        raise ConfigError(
            f"state memory of {budget} bytes is too little: a sequence needs a slot of {slot_bytes}"
            f" bytes{f' and blocks of {block_bytes}' if block_bytes else ''}"
        )
    return slots, blocks


def sampling_bytes(max_running: int, vocab_size: int) -> int:
    """When every running sequence asks for a token at once: logits, and copies while sampling; and
    the two terms of the logits that the largest graph leaves, of whole steps and of ends."""
    return (8 * max_running + 4 * min(max_running, CAPTURED)) * vocab_size * 4


def longest(asked: int | None, blocks: int, positions: int | None) -> int | None:
    """The bound on a sequence's tokens: what was asked for, what the KV blocks hold, what the
    positions allow; None when nothing bounds it. ConfigError when more is asked than fits."""
    bounds = [n for n in (blocks * BLOCK_SIZE or None, positions) if n is not None]
    if asked is not None and bounds and asked > min(bounds):
        raise ConfigError(
            f"max_model_len is {asked}, at most {min(bounds)} fit:"
            f" {blocks} KV blocks of {BLOCK_SIZE} positions, {positions} positions in config.json"
        )
    return asked if asked is not None else min(bounds, default=None)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' and no CUDA device is there")
    return torch.device("cuda:0") if name == "cuda" else torch.device(name)


def _check(quantization: str, device: torch.device) -> None:
    """ConfigError where the device has no products of what the weights are quantised to."""
    if quantization == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(
                "quantization is 'fp8', and {} (sm_{}{}) has no products of fp8, which begin with "
                "sm_{}{}; 'int8' it has".format(name, *capability, *FP8)
            )


def _cuda_budget(
    model: Family,
    slot_fields: list[Field],
    device: torch.device,
    step_tokens: int,
    max_running: int,
    fraction: float,
) -> int:
    """Bytes that `fraction` of the device leaves beside the weights and the largest step's peak."""
    hybrid = bool(model.block_fields(BLOCK_SIZE))
    blocks = -(-step_tokens // BLOCK_SIZE) if hybrid else 0
    store = Store(
        slot_fields,
        model.block_fields(BLOCK_SIZE),
        slots=min(max_running, 2),
        blocks=blocks,
        device=device,
    )
    capacity = Capacity(
        slots=min(max_running, 2), state_bytes=0, blocks=blocks, max_model_len=blocks * BLOCK_SIZE
    )
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ModelRunner(model, store, capacity, max_step_tokens=step_tokens).warm_up(step_tokens)
    activations = torch.cuda.max_memory_allocated(device) - before
    del store
    torch.cuda.empty_cache()
    activations += sampling_bytes(max_running, model.vocab_size)
    free, total = torch.cuda.mem_get_info(device)
    return int(free - activations - total * (1 - fraction))


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    seconds[name] = time.monotonic() - begin
