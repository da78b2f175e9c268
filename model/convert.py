"""Convert: the weights of a release in pickles become safetensors, a shard at a time.

A pickle can run code where it is loaded. PyTorch's restricted loader takes tensors alone from it;
what that refuses is refused here.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.index import indexed_files
from model.progress import Progress
from model.weights import WeightsError, weight_files

INDEX = "pytorch_model.bin.index.json"
UNPICKLER = re.compile(r"WeightsUnpickler error: (.+?)(?:\. |\n|$)")


def convert_weights(source: Path, target: Path) -> list[str]:
    """Write the weights in `source` to `target` as safetensors; the names of the files written.

    Safetensors in `source` are copied. Raises WeightsError when there are none, or when a file does
    not load safely.
    """
    pickles = _pickles(source)
    if not pickles:
        return _copy(source, target)
    written: dict[str, str] = {}  # tensor -> file
    size = 0
    total = sum(path.stat().st_size for path in pickles)
    with Progress(desc="weights", total=total, unit="B", unit_scale=True) as progress:
        for path in pickles:
            tensors = _load(path)
            twice = next((name for name in tensors if name in written), None)
            if twice is not None:
                raise WeightsError(f"{path}: {twice} is in {written[twice]} too")
            # pytorch_model-00001-of-00002.bin, model-00001-of-00002.safetensors
            name = f"{path.stem.removeprefix('pytorch_')}.safetensors"
            save_file(tensors, target / name, metadata={"format": "pt"})
            written |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
            progress.update(path.stat().st_size)
    files = sorted(set(written.values()))
    if not files:
        raise WeightsError(
            f"{source}: there are no tensors in {', '.join(p.name for p in pickles)}"
        )
    if files != ["model.safetensors"]:
        index = {"metadata": {"total_size": size}, "weight_map": written}
        text = json.dumps(index, indent=2) + "\n"
        (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return files


def _pickles(source: Path) -> list[Path]:
    """The files of the index where there is one, else all that are named like weights."""
    index = source / INDEX
    if not index.is_file():
        return sorted(source.glob("pytorch_model*.bin"))
    try:
        names = indexed_files(index)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    for name in names:
        if not (source / name).is_file():
            raise WeightsError(f"{index} names {name!r}, which is not in its directory")
    return [source / name for name in names]


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickle. Of those that share their memory the first stays: a tied head."""
    try:
        # files in the old format cannot be mapped: they are read whole
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # whatever is wrong with it, it does not load
        refusal = UNPICKLER.search(str(error))  # what PyTorch says around it is how to load it
        reason = refusal[1] if refusal else str(error).strip().partition("\n")[0]
        reason = reason or type(error).__name__
        raise WeightsError(f"{path} does not load safely: {reason}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds a {type(found).__name__}, tensors by name are due")
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise WeightsError(f"{path}: {name!r} is a {kind}, a tensor by its name is due")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise WeightsError(f"{path}: {name} is sparse, quantised or empty, numbers are due")
        memory = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        key = *memory, tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        whole = tensor.nbytes == tensor.untyped_storage().nbytes() and tensor.is_contiguous()
        tensors[name] = tensor.detach() if whole else tensor.detach().clone().contiguous()
    return tensors


def _copy(source: Path, target: Path) -> list[str]:
    files = weight_files(source)
    index = source / "model.safetensors.index.json"
    for path in [*files, index] if index.is_file() else files:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in files]
