"""Weights: safetensors files streamed into parameters, each by its name in the checkpoint.

A shard is mapped, its tensors are copied from the mapping to the device in pieces, and it is closed
before the next one is opened: host memory holds one shard at most, and a piece. Weights that are
quantised become so piece by piece on their way: the device never holds them whole as they were.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernels.quantize import Quantized, Weight
from model.index import indexed_files
from model.names import folded
from model.progress import Progress

PIECE_BYTES = 256 << 20  # of a tensor that are copied at a time
FLOATS = ("F64", "F32", "F16", "BF16")
QUANTIZATIONS = {"none": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class WeightsError(ValueError):
    """A checkpoint's tensors are not those that its config.json asks for."""


class Parameters:
    """Allocates parameters and remembers which checkpoint tensor fills which of them.

    places:  by name in the checkpoint, the parameter (or the part of one) that a tensor fills.
    tensors: every parameter as it was allocated.
    linear:  those of them that a linear layer multiplies by, [..., outputs, inputs]: the ones that
             are quantised where QUANTIZATIONS has a dtype for it. Norms, routers, decays, embedding
             and head never are.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, quantization: str = "none"
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.codes = QUANTIZATIONS[quantization]
        self.places: dict[str, Weight] = {}
        self.tensors: list[Weight] = []
        self.linear: list[Weight] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.nbytes for parameter in self.tensors)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A parameter, of the model's dtype or another, whose parts the caller enters in
        `places`."""
        parameter = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        self.tensors.append(parameter)
        return parameter

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A parameter that one checkpoint tensor fills."""
        parameter = self.empty(*shape, dtype=dtype)
        self.places[name] = parameter
        return parameter

    def matrix(self, name: str, rows: int, columns: int) -> Weight:
        """A linear layer's weight that one checkpoint tensor fills."""
        return self.rows([(name, rows)], columns)

    def rows(self, names_and_rows: Iterable[tuple[str, int]], columns: int) -> Weight:
        """One matrix [sum of rows, columns] of several checkpoint tensors: one GEMM does."""
        parts = list(names_and_rows)
        parameter = self.matrices(sum(n for _, n in parts), columns)
        for (name, _), view in zip(parts, parameter.split([n for _, n in parts]), strict=True):
            self.places[name] = view
        return parameter

    def matrices(self, *shape: int) -> Weight:
        """Weights of linear layers, as those of all experts, whose parts the caller enters in
        `places`."""
        if self.codes is None:
            parameter: Weight = self.empty(*shape)
        else:
            parameter = Quantized.empty(shape, self.codes, self.device)
            self.tensors.append(parameter)
        self.linear.append(parameter)
        return parameter

    @torch.no_grad()
    def randomize(self, seed: int) -> None:
        """Fill every place with numbers made on the device, the same ones however they are kept:
        vectors with ones, matrices with normal numbers that keep the size of what they multiply."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for place in self.places.values():
            if place.ndim < 2:
                place.copy_(torch.ones(place.shape, device=self.device))
                continue
            for rows in _pieces(place):
                part = place[rows]
                drawn = torch.randn(part.shape, generator=generator, device=self.device)
                part.copy_(drawn.mul_(part.shape[-1] ** -0.5))

    def fill(self, directory: Path, *, ignore: re.Pattern[str]) -> None:
        """Copy every tensor of the checkpoint to its place, shard by shard.

        Raises WeightsError that names all missing, left-over, doubled and misshapen tensors. Names
        that `ignore` matches whole are passed over.
        """
        missing = dict(self.places)
        left_over: list[str] = []
        wrong: list[str] = []
        paths = weight_files(directory)
        ends = list(accumulate(path.stat().st_size for path in paths))
        with Progress(desc="weights", total=ends[-1], unit="B", unit_scale=True) as progress:
            for path, end in zip(paths, ends, strict=True):
                with shard(path) as file:
                    for name in file.offset_keys():
                        if ignore.fullmatch(name):
                            continue
                        place = missing.pop(name, None)
                        if place is None and name in self.places:
                            wrong.append(f"{name}: twice, again in {path.name}")
                        elif place is None:
                            left_over.append(name)
                        elif fault := _fault(file, name, place):
                            wrong.append(fault)
                        else:
                            _copy(file, name, place, progress)
                progress.update(end - progress.n)  # the header, and what was passed over
        wrong += [f"left over: {name}" for name in folded(left_over)]
        wrong += [f"missing: {name}" for name in folded(missing)]
        if wrong:
            raise WeightsError(f"{directory}: wrong tensors: {'; '.join(wrong)}")


def shard(path: Path) -> Any:
    """A safetensors file, opened: mapped, or where that cannot be, read as its tensors are."""
    try:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except OSError:
            return safe_open(path, framework="pt", device="cpu", backend="pread")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no whole safetensors file: {error}") from error


def _fault(file: Any, name: str, place: Weight) -> str | None:
    """Why a tensor of a shard does not fit its place; None if it does."""
    source = file.get_slice(name)
    shape, kind = tuple(source.get_shape()), source.get_dtype()
    if shape != tuple(place.shape):
        return f"{name}: shape {shape}, {tuple(place.shape)} is due"
    if kind not in FLOATS:
        return f"{name}: dtype {kind}, one of {', '.join(FLOATS)} is due"
    return None


def _pieces(place: Weight) -> Iterator[slice]:
    """As many rows of a place at a time as make a piece, of float32."""
    count = len(place)
    step = max(count * PIECE_BYTES // max(place.numel() * 4, 1), 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _copy(file: Any, name: str, place: Weight, progress: Progress) -> None:
    """Copy a tensor of a shard to its place, piece by piece."""
    if not place.ndim:
        place.copy_(file.get_tensor(name))
        return
    source = file.get_slice(name)
    for rows in _pieces(place):
        piece = source[rows]
        place[rows].copy_(piece)
        progress.update(piece.nbytes)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, those of the index where there is one."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [directory / name for name in indexed_files(index)]
        except ValueError as error:
            raise WeightsError(str(error)) from error
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = any(directory.glob("pytorch_model*.bin"))
        hint = "; `steadystate convert` makes them of the pickles there" if pickles else ""
        raise WeightsError(f"{directory}: no *.safetensors file{hint}")
    for path in files:
        if not path.is_file():
            raise WeightsError(f"{directory}: {path.name} is named in the index and is not there")
    return files


def fingerprint(directory: Path, *settings: str) -> str:
    """SHA-256 over config.json, settings that change what is made of it, and each weight file's
    size, header and evenly spaced samples.

    Names a checkpoint, so that states are never restored into another model.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    digest.update("\0".join(settings).encode())
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
