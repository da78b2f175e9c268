"""Host memory for states that leave the device: rows of one size, pinned once and for all.

PyTorch's allocator gives pinned memory out again once the streams that have used it are done with
all that they had to do when it was given back. While states leave one after another that is long
after, and meanwhile the system is asked for more, which takes it milliseconds. Here a row is free
as soon as nobody has it. Its next owner has to write to it behind the transfer that may still go on
there: on the same stream, or on one that waits for it.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

CHUNK_BYTES = 1 << 30  # that are asked of the system at once; it gives powers of two


class HostRows:
    """Rows of `size` bytes; `pinned`: beside a GPU."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        self._pinned = pinned
        self._free: list[tuple[np.ndarray, int]] = []  # chunks of memory, and places in them

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def add(self, count: int) -> None:
        """So many more. Raises RuntimeError where the system gives no more of such memory; those
        that it gave are there."""
        while count:
            most = min(CHUNK_BYTES, 1 << (count * self.size).bit_length() - 1)
            some = max(most // self.size, 1)
            chunk = torch.empty(some * self.size, dtype=torch.uint8, pin_memory=self._pinned)
            self._free += [(chunk.numpy(), i * self.size) for i in range(some)]
            count -= some

    def take(self) -> torch.Tensor | None:
        """A row, [size] uint8, which is free again when nothing shows its memory any more; None:
        all are taken."""
        if not self._free:
            return None
        place = self._free.pop()
        chunk, first = place
        row = chunk[first : first + self.size]
        weakref.finalize(row, self._free.append, place).atexit = False
        return torch.from_numpy(row)  # its memory keeps the array
