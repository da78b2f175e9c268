"""States as files: safetensors, with checksums, written whole or not at all, believed only once
checked.

The header's metadata say of which model and tokens the state is; the tensors are the token ids, in
the narrowest integer that holds the vocabulary, and the state's own. Everything is refused that is
not as it should be: names, dtypes, shapes, offsets, checksums, numbers that are not finite. The
header has a checksum of its own, so that a header of another model is told from a damaged one.
Tensors of zeros, such as rings that hold nothing, are only named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from model.chunk import Capacity, Image, Layout, Tensor
from server.engine.chain import BLOCK, Chain, root_of, trail

VERSION = "3"
MOST_HEADER = 1 << 20  # bytes; ours are a few kB
TOKENS = "tokens"
ZEROS = "zeros"  # in the metadata: names of tensors that are left out
WIDTHS = {"U8": "<u1", "U16": "<u2", "I32": "<i4"}
BYTES = {"U8": 1, "U16": 2, "BF16": 2, "F16": 2, "I32": 4, "F32": 4, "I64": 8}
FLOATS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
MESSAGES = "messages"  # of a context, in a file that was taken from a server
TEMPORARY = "tmp-"


class ArchiveError(ValueError):
    """A file that is not a state of this model, or is damaged; says what is wrong with it."""


class ForeignError(ArchiveError):
    """A file that may be good, for a server of another model, or of one that computes otherwise."""


@dataclass(slots=True, frozen=True)
class Header:
    """What the beginning of a file says: metadata, tensors and where the data begin."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]  # dtype, shape, begin, end
    start: int

    @property
    def size(self) -> int:
        """Bytes that the whole file must have."""
        return self.start + max((end for *_, end in self.tensors.values()), default=0)

    @property
    def zeros(self) -> set[str]:
        """Tensors that are left out, for all of them is zero."""
        return set(self.metadata.get(ZEROS, "").split())


@dataclass(slots=True, frozen=True)
class State:
    """A state out of a file that was found to be good."""

    chain: Chain
    key: str
    position: int
    salt: str
    image: Image
    bytes: int


def describe(capacity: Capacity, chain: Chain, position: int, *, salt: str) -> dict[str, str]:
    """The metadata of a state; salt is a digest."""
    return {
        "format": "steadystate-state",
        "version": VERSION,
        "fingerprint": capacity.fingerprint,
        "dtype": capacity.dtype,
        "identity": capacity.identity,
        "salt": salt,
        "count": str(position),
        "key": chain.key(position),
        "block": chain.digest(position // BLOCK).hex(),
        "trail": trail(chain, position // BLOCK).hex(),
    }


def narrow(tokens: array[int], vocab_size: int, count: int | None = None) -> Tensor:
    """The first `count` token ids in the narrowest integer that holds them all."""
    dtype = "U8" if vocab_size <= 1 << 8 else "U16" if vocab_size <= 1 << 16 else "I32"
    ids = numpy.frombuffer(tokens, dtype="<i4")[:count].astype(WIDTHS[dtype])
    return Tensor(TOKENS, dtype, (len(ids),), ids.view(numpy.uint8).data)


def contents(
    capacity: Capacity, chain: Chain, position: int, image: Image, *, salt: str
) -> tuple[dict[str, str], list[Tensor]]:
    """Metadata and tensors of a state's file. Of what a slot holds, zeros are only named."""
    metadata = describe(capacity, chain, position, salt=salt)
    fixed, zeros = {layout.name for layout in capacity.slot_layout}, []
    tensors = [narrow(chain.tokens, capacity.vocab_size, position)]
    for tensor in image.tensors:
        if tensor.name in fixed and not numpy.frombuffer(tensor.data, dtype=numpy.uint8).any():
            zeros.append(tensor.name)
        else:
            tensors.append(tensor)
    return {**metadata, ZEROS: " ".join(zeros)}, tensors


def write(path: Path, metadata: Mapping[str, str], tensors: Iterable[Tensor]) -> None:
    """Write a file that is there whole once this returns, whatever happens.

    OSError when it cannot be written; nothing is left then.
    """
    tensors = list(tensors)
    head = header({**metadata, "sha256": checksum(tensors)}, tensors)
    write_whole(path, [head, *(tensor.data for tensor in tensors)])


def size_of(metadata: Mapping[str, str], tensors: Iterable[Tensor]) -> int:
    """Bytes that a file of these will have."""
    tensors = list(tensors)
    head = header({**metadata, "sha256": "0" * 64}, tensors)
    return len(head) + sum(tensor.data.nbytes for tensor in tensors)


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over tensors in order: what they are called, what they are, and their bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Bytes into a file: under another name, to the disk, renamed, and the directory too."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    new, renamed = not path.exists(), False
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        renamed = True
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            (path if renamed and new else temporary).unlink()
        raise


def sync(directory: Path) -> None:
    """Let what was renamed in a directory outlive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header(metadata: Mapping[str, str], tensors: Iterable[Tensor]) -> bytes:
    """The beginning of a safetensors file: its length as eight bytes, JSON, spaces up to eight."""
    entries: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.data.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    entries["__metadata__"] = {**metadata, "header": _header_sum({**metadata}, entries)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_sum(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> str:
    """SHA-256 over all that a header says, whatever the order."""
    text = json.dumps([metadata, tensors], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_header(path: Path) -> Header:
    """The beginning of a file. ArchiveError when it is none, OSError when it cannot be read."""
    with path.open("rb") as file:
        return _read_header(file)


def _read_header(file: BinaryIO) -> Header:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MOST_HEADER:
        raise ArchiveError(f"a header of {length} bytes")
    text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        if not all(type(value) is str for value in metadata.values()):
            raise ArchiveError("metadata that are not strings")
        if metadata.pop("header", "") != _header_sum(metadata, entries):
            raise ArchiveError("its header's checksum is wrong")
        tensors = {
            name: (
                entry["dtype"], tuple(map(_natural, entry["shape"])),
                *map(_natural, entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }  # fmt: skip
        for dtype, shape, begin, end in tensors.values():
            if end - begin != prod(shape) * BYTES[dtype]:
                raise ArchiveError(f"a tensor of {dtype} {list(shape)} in {end - begin} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"a header that makes no sense: {error!r}"[:200]) from error
    offset = 0
    tensors = dict(sorted(tensors.items(), key=lambda entry: entry[1][2:]))
    for _, _, begin, end in tensors.values():
        if begin != offset:
            raise ArchiveError(f"tensors that overlap or leave a gap at byte {offset}")
        offset = end
    return Header(metadata, tensors, 8 + length)


def check_header(header: Header, capacity: Capacity, *, besides: Iterable[str] = ()) -> int:
    """How many tokens the state is of. ArchiveError unless it fits this model; ForeignError when
    it may fit another."""
    metadata, tensors = header.metadata, header.tensors
    if metadata.get("format") != "steadystate-state":
        raise ArchiveError(f"format is {metadata.get('format')!r}, 'steadystate-state' is due")
    for name, due in (
        ("version", VERSION),
        ("fingerprint", capacity.fingerprint),
        ("dtype", capacity.dtype),
    ):
        if metadata.get(name) != due:
            raise ForeignError(f"{name} is {metadata.get(name)!r}, {due!r} is due")
    foreign = metadata.get("identity") != capacity.identity
    kind = ForeignError if foreign else ArchiveError
    digits = metadata.get("count", "")
    count = int(digits) if digits.isdecimal() and len(digits) < 16 else 0
    if count < 1:
        raise ArchiveError(f"count is {digits[:20]!r}, a number of tokens is due")
    blocks = -(-count // capacity.block_size) if capacity.block_size else 0
    layouts = {layout.name: layout for layout in capacity.slot_layout}
    for block in capacity.block_layout:
        layouts[block.name] = Layout(block.name, block.dtype, (blocks, *block.shape))
    dtype = narrow(array("i", [0]), capacity.vocab_size).dtype
    layouts[TOKENS] = Layout(TOKENS, dtype, (count,))
    for name in header.zeros:  # of a fixed size: a small file takes no more memory than a state
        if name in tensors or all(name != layout.name for layout in capacity.slot_layout):
            raise kind(f"tensor {name[:100]!r} is said to be zeros")
        del layouts[name]
    for name in tensors.keys() | layouts.keys():
        if name in besides and name not in layouts:
            continue
        found = f"{tensors[name][0]} {list(tensors[name][1])}" if name in tensors else "missing"
        wanted = "nothing"
        if name in layouts:
            wanted = f"{layouts[name].dtype} {list(layouts[name].shape)}"
        if found != wanted:
            raise kind(f"tensor {name!r} is {found}, {wanted} is due")
    if foreign:
        raise ForeignError("it is of a server that lays states out otherwise")
    return count


def read(path: Path, capacity: Capacity, *, besides: Iterable[str] = ()) -> State:
    """The state in a file, checked in every way. ArchiveError, OSError."""
    with path.open("rb") as file:  # once: another file may come to the name meanwhile
        head = _read_header(file)
        count = check_header(head, capacity, besides=besides)
        size = os.fstat(file.fileno()).st_size
        data = memoryview(file.read() if size == head.size else b"")
    if head.start + len(data) != head.size:
        raise ArchiveError(f"{size} bytes, {head.size} are due")
    tensors = {
        name: Tensor(name, dtype, shape, data[begin:end])
        for name, (dtype, shape, begin, end) in head.tensors.items()
    }
    if checksum(tensors.values()) != head.metadata.get("sha256"):
        raise ArchiveError("its checksum is wrong")
    for due in capacity.slot_layout:
        if due.name in head.zeros:
            zeros = bytes(prod(due.shape) * BYTES[due.dtype])
            tensors[due.name] = Tensor(due.name, due.dtype, due.shape, memoryview(zeros))
    ids = numpy.frombuffer(tensors[TOKENS].data, dtype=WIDTHS[tensors[TOKENS].dtype])
    if int(ids.max()) >= capacity.vocab_size or int(ids.min()) < 0:
        raise ArchiveError(f"token ids beyond the vocabulary of {capacity.vocab_size}")
    names = [layout.name for layout in (*capacity.slot_layout, *capacity.block_layout)]
    for name in names:
        _check_finite(tensors[name])
    salt = head.metadata.get("salt", "")
    if len(salt) != 64 or not all(digit in "0123456789abcdef" for digit in salt):
        raise ArchiveError("its salt is not a digest")
    tokens = array("i", ids.astype("<i4").tobytes())
    chain = Chain(root_of(capacity.identity, salt), tokens)
    described = describe(capacity, chain, count, salt=salt)
    for name, value in described.items():
        if head.metadata.get(name) != value:
            raise ArchiveError(f"its {name} is not that of its tokens")
    image = Image([tensors[name] for name in names])
    return State(chain, described["key"], count, salt, image, head.size)


def _check_finite(tensor: Tensor) -> None:
    if tensor.dtype in FLOATS:
        integer, mask = FLOATS[tensor.dtype]
        bits = numpy.frombuffer(tensor.data, dtype=integer)
        if bool(((bits & mask) == mask).any()):
            raise ArchiveError(f"tensor {tensor.name!r} has numbers that are not finite")


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ArchiveError(f"{value!r} where a size is due")
    return value
