"""Weights: safetensors files streamed into parameters, each by its name in the checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open


class WeightsError(ValueError):
    """A checkpoint's tensors are not those that its config.json asks for."""


class Parameters:
    """Allocates parameters and remembers which checkpoint tensor fills which of them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.places: dict[str, torch.Tensor] = {}

    def empty(self, *shape: int) -> torch.Tensor:
        """A parameter whose parts the caller enters in `places`."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A parameter that one checkpoint tensor fills."""
        parameter = self.empty(*shape)
        self.places[name] = parameter
        return parameter

    def rows(self, names_and_rows: Iterable[tuple[str, int]], columns: int) -> torch.Tensor:
        """One matrix [sum of rows, columns] of several checkpoint tensors: one GEMM does."""
        parts = list(names_and_rows)
        parameter = self.empty(sum(n for _, n in parts), columns)
        for (name, _), view in zip(parts, parameter.split([n for _, n in parts]), strict=True):
            self.places[name] = view
        return parameter

    def fill(self, directory: Path, *, ignore: re.Pattern[str]) -> None:
        """Copy every tensor of the checkpoint to its place, one at a time.

        Raises WeightsError that names all missing, left-over and misshapen tensors. Names that
        `ignore` matches whole are passed over.
        """
        missing = dict(self.places)
        wrong: list[str] = []
        for path in weight_files(directory):
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if ignore.fullmatch(name):
                        continue
                    place = missing.pop(name, None)
                    if place is None:
                        wrong.append(f"left over: {name}")
                        continue
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != tuple(place.shape):
                        wrong.append(f"{name}: shape {shape}, {tuple(place.shape)} is due")
                        continue
                    place.copy_(file.get_tensor(name))
        wrong += [f"missing: {name}" for name in missing]
        if wrong:
            shown = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if wrong[20:] else "")
            raise WeightsError(f"{directory}: {len(wrong)} wrong tensors: {shown}")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those of the index where there is one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise WeightsError(f"{index} names a file outside its directory")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{directory}: no *.safetensors file")
    for path in files:
        if not path.is_file():
            raise WeightsError(f"{directory}: {path.name} is named in the index and is not there")
    return files


def fingerprint(directory: Path) -> str:
    """SHA-256 over config.json and each weight file's size, header and evenly spaced samples.

    Names a checkpoint, so that states are never restored into another model.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        digest.update(path.name.encode())
        for block in _samples(path):
            digest.update(block)
    return digest.hexdigest()


def _samples(path: Path, size: int = 1 << 20, count: int = 64) -> Iterator[bytes]:
    length = path.stat().st_size
    yield str(length).encode()
    with path.open("rb") as file:
        for offset in sorted({length * i // count for i in range(count)}):
            file.seek(offset)
            yield file.read(size)
