"""Small arrays on their way to the device, without the host waiting for what the device does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def upload(
    values: np.ndarray | Sequence[int] | Sequence[float],
    device: torch.device,
    dtype: type[np.generic] | None = None,
) -> torch.Tensor:
    """A tensor on the device, of `dtype` or that of the array; beside a GPU by pinned memory."""
    host = torch.from_numpy(np.array(values, dtype=dtype))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
