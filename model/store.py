"""Store: the device memory that outlives a step. Slots with states and windows, and KV blocks.

A slot is one contiguous row of bytes, so that a state is copied out and in by one transfer;
layers see strided views of it. KV blocks are laid out likewise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from model.host import Crossing, HostRows
from model.transfer import upload

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; vector loads and copies want aligned fields
PIECE_BYTES = 16 << 20  # of device memory that saving or restoring blocks takes
QUEUED_BYTES = 256 << 20  # of device memory that states may take which have not departed


@dataclass(slots=True, frozen=True)
class Field:
    """One tensor that every slot (or block) holds: its name, shape and dtype.

    axis:  the axis along which it keeps one row a position, modulo its size; None: it is used whole
           from the first token on. Rows that no position has written are nobody's.
    since: the field of the slot, int64 [H, ...], whose first number is the first position in use.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None = None
    since: str | None = None

    @property
    def bytes(self) -> int:
        """Size in bytes, rounded up to the alignment."""
        return -(-prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def row_bytes(fields: list[Field]) -> int:
    """Bytes of one row that holds all fields."""
    return sum(field.bytes for field in fields)


class Rows:
    """`count` rows of bytes, each holding every field; views[name] is [count, *shape]."""

    def __init__(self, fields: list[Field], count: int, device: torch.device) -> None:
        self.count = count
        self.bytes = row_bytes(fields)
        self.memory = torch.empty(count, self.bytes, dtype=torch.uint8, device=device)
        self.views: dict[str, torch.Tensor] = {}
        offset = 0
        for field in fields:
            size = prod(field.shape) * field.dtype.itemsize
            view = self.memory[:, offset : offset + size].view(field.dtype)
            self.views[field.name] = view.unflatten(1, field.shape)
            offset += field.bytes
        self.poison()

    def poison(self) -> None:
        """Fill fields with NaN, integers with a position far beyond any: whoever reads what nobody
        wrote is found out."""
        for view in self.views.values():
            view.fill_(float("nan") if view.is_floating_point() else 1 << 60)


@dataclass(slots=True, frozen=True)
class Saved:
    """A state on the host: one slot's bytes and those of its blocks, and the tokens it has seen.

    `crossing` brings them there; None: they are there.
    """

    slot: torch.Tensor
    blocks: torch.Tensor
    seen: torch.Tensor | None = None
    crossing: Crossing | None = None

    def wait(self) -> None:
        """Return once the bytes are there."""
        if self.crossing is not None:
            self.crossing.wait()


class Store:
    """All slots and KV blocks of a model.

    slot_fields are per slot, block_fields per block of block_size positions. On CUDA states leave
    for pinned host memory on a stream of their own: a step after a save waits for copies on the
    device only. To begin a transfer takes the host as long as several launches: that of a slot is
    left to depart(), for a moment at which the device has enough to do. Blocks are sent at once.
    """

    def __init__(
        self,
        slot_fields: list[Field],
        block_fields: list[Field],
        *,
        slots: int,
        blocks: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.slot_fields = slot_fields
        self.block_fields = block_fields
        self.slots = Rows(slot_fields, slots, device)
        self.blocks = Rows(block_fields, blocks, device)
        self._leaving = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._crossing: Crossing | None = None  # of what has been saved and not departed
        self._rows = HostRows(self.slots.bytes, pinned=device.type == "cuda")
        self._queued: list[tuple[torch.Tensor, torch.Tensor]] = []  # to the host, from a copy
        self._no_blocks = torch.empty(0, self.blocks.bytes, dtype=torch.uint8)

    def save(self, slot: int, blocks: tuple[int, ...], seen: torch.Tensor | None) -> Saved:
        """Copy a slot and blocks to host memory, bit for bit: on CUDA once it has departed. It
        needs as much of the device for a while; where that has no memory left, the steps after it
        wait for the transfer instead."""
        host, host_blocks = self._host(len(blocks))
        row = self.slots.memory[slot]
        if self._leaving is not None and self._crossing is None:
            self._crossing = Crossing()
        crossing = self._crossing
        try:
            self._leave(host, self._aside(row))
            for rows, index in self._pieces(blocks):
                self._leave(host_blocks[rows], self.blocks.memory[index])
                self._send()  # the device has room for one piece
        except torch.OutOfMemoryError:
            rest = [self.blocks.memory[block] for block in blocks]
            self._leave_at_once([host, *host_blocks], [row, *rest])
        kept = None if seen is None else self._leave_seen(seen)
        if crossing is not None:
            self._rows.note(host, crossing)
        if len(self._queued) * self.slots.bytes > QUEUED_BYTES:
            self.depart()
        return Saved(slot=host, blocks=host_blocks, seen=kept, crossing=crossing)

    @torch.inference_mode()
    def depart(self) -> None:
        """Begin the transfer of all that has been saved and has not departed."""
        if self._crossing is not None and self._leaving is not None:
            self._send()
            self._crossing.begin(self._leaving)
            self._crossing = None

    def host(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Host memory for the bytes of a slot and of so many blocks, to which the host may write;
        pinned beside a GPU, as far as the system lets it."""
        self.depart()  # or nobody could wait for what leaves
        return self._host(blocks, idle=True)

    def reserve(self, size: int) -> None:
        """Pin host memory now for as many slots as so many bytes hold: else the system takes
        milliseconds for each that is saved, and steps wait for that."""
        if self._leaving is None or not self.slots.bytes or self.blocks.bytes:
            return  # beside KV blocks a state has no one size that could be held ready
        try:
            self._rows.add(size // self.slots.bytes)
        except RuntimeError as error:
            self._no_pinned([self.slots.bytes], error)

    def restore(self, saved: Saved, slot: int, blocks: tuple[int, ...]) -> None:
        """Copy a saved state into a slot and blocks, as many blocks as were saved."""
        if len(blocks) != len(saved.blocks):
            raise ValueError(f"{len(saved.blocks)} blocks were saved, {len(blocks)} are given")
        if saved.crossing is not None:
            if not saved.crossing.begun:
                self.depart()
            torch.cuda.current_stream(self.device).wait_event(saved.crossing.done)
        self.slots.memory[slot].copy_(saved.slot, non_blocking=True)
        if self._leaving is not None:
            crossing = Crossing()
            crossing.begin(torch.cuda.current_stream(self.device))
            self._rows.note(saved.slot, crossing)
        try:
            for rows, index in self._pieces(blocks):
                self.blocks.memory[index] = saved.blocks[rows].to(self.device, non_blocking=True)
        except torch.OutOfMemoryError:
            for at, block in enumerate(blocks):
                self.blocks.memory[block].copy_(saved.blocks[at], non_blocking=True)

    def _host(self, blocks: int, *, idle: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory as of host(), for whoever comes behind what the device does there; idle: for who
        does not, once nothing is on its way to or from it."""
        slot = None if blocks else self._rows.take(idle=idle)
        if slot is None:
            slot = self._on_host((self.slots.bytes,), torch.uint8)
        if not blocks:
            return slot, self._no_blocks
        return slot, self._on_host((blocks, self.blocks.bytes), torch.uint8)

    def _on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cuda":
            try:
                return torch.empty(shape, dtype=dtype, pin_memory=True)
            except RuntimeError as error:  # slower, and all there is
                self._no_pinned(shape, error)
        return torch.empty(shape, dtype=dtype)

    def _no_pinned(self, shape: Sequence[int], error: RuntimeError) -> None:
        log.warning("no pinned memory for %s: %s", list(shape), str(error).split("\n")[0])

    def _aside(self, row: torch.Tensor) -> torch.Tensor:
        """A copy on the device, where the transfer does not take place at once."""
        return row if self._leaving is None else row.clone()

    def _leave_seen(self, seen: torch.Tensor) -> torch.Tensor:
        host = self._on_host(tuple(seen.shape), seen.dtype)
        try:
            self._leave(host, self._aside(seen))
        except torch.OutOfMemoryError:
            self._leave_at_once([host], [seen])
        return host

    def _leave(self, host: torch.Tensor, part: torch.Tensor) -> None:
        """Copy to the host, beside a GPU once it is sent: part is itself a copy, so that the slot
        or the blocks may change meanwhile."""
        if self._leaving is None:
            host.copy_(part)
        else:
            self._queued.append((host, part))

    def _send(self) -> None:
        """Begin to copy what is queued, behind all that was launched."""
        if self._leaving is None:
            return
        self._leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._leaving):
            for host, part in self._queued:
                host.copy_(part, non_blocking=True)
                part.record_stream(self._leaving)
        self._queued.clear()

    def _leave_at_once(self, hosts: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        """Copy to the host what may change after: what comes after waits for it."""
        if self._leaving is not None:  # a state may still leave for the same memory
            torch.cuda.current_stream(self.device).wait_stream(self._leaving)
        for host, part in zip(hosts, parts, strict=True):
            host.copy_(part, non_blocking=True)

    def _pieces(self, blocks: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the host copy, and the blocks they belong to, as many as PIECE_BYTES holds: the
        device has no room for a second copy of all blocks of a long sequence."""
        count = max(PIECE_BYTES // max(self.blocks.bytes, 1), 1)
        for i in range(0, len(blocks), count):
            part = upload(blocks[i : i + count], self.device, np.int64)
            yield slice(i, i + len(part)), part

    def move(self, source: int, target: int, blocks: list[tuple[int, int]]) -> None:
        """Copy a slot to another and each block to its pair, on the device."""
        self.slots.memory[target].copy_(self.slots.memory[source])
        for from_block, to_block in blocks:
            if from_block != to_block:
                self.blocks.memory[to_block].copy_(self.blocks.memory[from_block])
