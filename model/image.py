"""Images: states on the host as named tensors and back; what a state does not use becomes zero."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from model.chunk import Image, Layout, Tensor
from model.store import Field, Saved, Store

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def layout(fields: list[Field]) -> tuple[Layout, ...]:
    """The fields as the server knows them."""
    return tuple(Layout(field.name, NAMES[field.dtype], field.shape) for field in fields)


@torch.inference_mode()
def tensors(saved: Saved, store: Store, *, position: int, block_size: int) -> list[Tensor]:
    """Those of an image of a state of `position` tokens; waits until its bytes are there."""
    saved.wait()
    made = []
    rows = _views(saved.slot, store.slot_fields)
    for field in store.slot_fields:
        data = _cleared(rows[field.name], field, position, rows)
        made.append(_tensor(field, data, field.shape))
    blocks = _views(saved.blocks, store.block_fields)
    for field in store.block_fields:
        data = blocks[field.name]
        if block_size and position % block_size and field.axis is not None:
            data = data.clone()
            data[-1].narrow(field.axis, position % block_size, -position % block_size).zero_()
        made.append(_tensor(field, data, (len(data), *field.shape)))
    return made


def read(image: Image, store: Store) -> Saved:
    """A state on the host from an image whose tensors have the store's layouts."""
    given = {tensor.name: tensor for tensor in image.tensors}
    names = [field.name for field in (*store.slot_fields, *store.block_fields)]
    assert len(names) == len(given) and given.keys() == set(names), "an image of another model"
    counts = {given[field.name].shape[0] for field in store.block_fields}
    slot, blocks = store.host(counts.pop() if counts else 0)
    slot.zero_()
    blocks.zero_()
    for memory, fields in ((slot, store.slot_fields), (blocks, store.block_fields)):
        for name, view in _views(memory, fields).items():
            data = np.frombuffer(given[name].data, dtype=np.uint8)
            view.copy_(torch.from_numpy(data.copy()).view(view.dtype).view(view.shape))
    return Saved(slot=slot, blocks=blocks)


def _views(memory: torch.Tensor, fields: list[Field]) -> dict[str, torch.Tensor]:
    """memory [..., bytes] of rows as its fields [..., *shape]."""
    views = {}
    offset = 0
    for field in fields:
        size = prod(field.shape) * field.dtype.itemsize
        view = memory[..., offset : offset + size].view(field.dtype)
        views[field.name] = view.unflatten(-1, field.shape)
        offset += field.bytes
    return views


def _cleared(
    data: torch.Tensor, field: Field, position: int, rows: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The field with zeros in rows that the state does not use: they are whoever's came before."""
    if field.axis is None:
        return data
    size = field.shape[field.axis]
    if field.since is None:  # a window: the next position takes the place of its first
        first = max(0, position - size + 1)
    else:
        first = max(0, position - size, int(rows[field.since].flatten()[0]))
    used = {at % size for at in range(first, position)}
    unused = [row for row in range(size) if row not in used]
    return data.index_fill(field.axis, torch.tensor(unused, dtype=torch.int64), 0)


def _tensor(field: Field, data: torch.Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = data.contiguous().view(-1).view(torch.uint8).numpy()
    return Tensor(field.name, NAMES[field.dtype], shape, flat.data)
