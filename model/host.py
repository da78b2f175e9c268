"""Host memory for states that leave the device: rows of one size, pinned once and for all.

PyTorch's allocator gives pinned memory out again once the streams that have used it are done with
all that they had to do when it was given back, and in powers of two. While states leave one after
another that is long after, and meanwhile the system is asked for more, which takes it milliseconds.
Here a row is free as soon as nobody has it, though bytes may still be on their way to or from it:
who writes there next does so behind them on the device, or waits for them.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np
import torch

CHUNK_BYTES = 1 << 30  # that are pinned at once, about


class Crossing:
    """Bytes on their way between device and host: begun some time, over later."""

    def __init__(self) -> None:
        self.done = torch.cuda.Event()
        self.begun = False

    def begin(self, stream: torch.cuda.Stream) -> None:
        """All of it has been launched on this stream."""
        self.done.record(stream)
        self.begun = True

    def wait(self) -> None:
        """Return once it is over."""
        if not self.begun:
            raise RuntimeError("what was saved has not departed")
        self.done.synchronize()


class HostRows:
    """Rows of `size` bytes; `pinned`: beside a GPU."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        self._pinned = pinned
        self._free: deque[tuple[np.ndarray, int]] = deque()  # chunks, and places in them
        self._crossings: dict[int, Crossing] = {}  # the last of each row, by its address

    def __len__(self) -> int:
        """How many are free."""
        return len(self._free)

    def add(self, count: int) -> None:
        """So many more. Raises RuntimeError where the system pins no more; those before are
        there."""
        while count:
            some = min(max(CHUNK_BYTES // self.size, 1), count)
            chunk = _memory(some * self.size, self._pinned)
            self._free += [(chunk, i * self.size) for i in range(some)]
            count -= some

    def take(self, *, idle: bool = False) -> torch.Tensor | None:
        """A row, [size] uint8, which is free again when nothing shows its memory any more; None:
        all are taken. Of those that are free the one that has been longest; idle: wait until
        nothing is on its way to or from it, else the device has to."""
        if not self._free:
            return None
        place = self._free.popleft()
        chunk, first = place
        row = chunk[first : first + self.size]
        weakref.finalize(row, self._free.append, place).atexit = False
        taken = torch.from_numpy(row)  # its memory keeps the array
        crossing = self._crossings.get(taken.data_ptr())
        if idle and crossing is not None:
            crossing.wait()
        return taken

    def note(self, row: torch.Tensor, crossing: Crossing) -> None:
        """What is on its way to or from a row, if it is one of these, the last of all."""
        if self._pinned:
            self._crossings[row.data_ptr()] = crossing


def _memory(size: int, pinned: bool) -> np.ndarray:
    """So many bytes [size] uint8, whole pages that are the system's again when nobody has them."""
    memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    if pinned:
        runtime, address = torch.cuda.cudart(), memory.ctypes.data
        if int(runtime.cudaHostRegister(address, size, 0)):
            raise RuntimeError(f"the system pins no {size} bytes")
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory
