"""Contexts as files: what goes out to another server, and what comes in from one.

A file that goes out is the state's own with the context's fields in its header and, if it was made
of messages, these as one more tensor.
"""

from __future__ import annotations

import asyncio
import mmap
import secrets
import time
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy

from model.chunk import Tensor
from server.api.continuing import trouble_of
from server.api.limits import MAX_NAME_CHARS
from server.api.registry import TAIL, Record
from server.api.service import Service
from server.engine import archive
from server.engine.archive import ArchiveError
from server.errors import RequestError
from server.protocol import Export, Import, Trouble


async def exported(service: Service, record: Record) -> Path:
    """Write a context into a file of its own, which the caller removes."""
    out = service.scratch / secrets.token_hex(12)
    directory = service.settings.context_directory
    try:
        if directory is None:
            source = out.with_suffix(".state")
            call = Export(service.client.new_id(), record.key, str(source))
            reply = await service.client.call(call)
            if reply.trouble is not None:
                raise trouble_of(reply.trouble, record)
        else:
            source = directory / "states" / f"{record.key}.safetensors"
        try:
            await asyncio.to_thread(_compose, source, out, record)
        finally:
            if directory is None:
                source.unlink(missing_ok=True)
        return out
    except BaseException as error:
        out.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):
            raise trouble_of(Trouble(410, "its file is gone"), record) from error
        if isinstance(error, OSError):
            raise trouble_of(full(error)) from error
        raise


async def imported(service: Service, path: Path, owner: str) -> Record:
    """Have the engine check a file and keep its state; the context that it is of."""
    try:
        fields = await asyncio.to_thread(_fields, path, service.settings.max_body_bytes)
    except (ArchiveError, ValueError, zlib.error, msgspec.DecodeError) as error:
        raise RequestError(f"not a context of this model: {error}", param="file") from error
    reply = await service.client.call(Import(service.client.new_id(), str(path)))
    if reply.trouble is not None:
        raise trouble_of(reply.trouble)
    assert reply.state is not None
    return Record(
        id="ctx_" + secrets.token_hex(12),
        key=reply.state.key,
        identity=service.capacity.identity,
        owner=owner,
        count=reply.state.count,
        bytes=reply.state.bytes,
        salt=reply.state.salt,
        created=time.time(),
        **fields,
    )


def full(error: OSError) -> Trouble:
    """A disk that could not take what was written."""
    return Trouble(507, f"the context could not be written: {error.strerror or error}")


def _compose(source: Path, out: Path, record: Record) -> None:
    head = archive.read_header(source)
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        tensors = [
            Tensor(name, dtype, shape, view[head.start + begin : head.start + end])
            for name, (dtype, shape, begin, end) in head.tensors.items()
        ]
        if record.messages is not None:
            packed = zlib.compress(msgspec.json.encode(record.messages))
            tensors.append(Tensor(archive.MESSAGES, "U8", (len(packed),), memoryview(packed)))
        context = {"name": record.name, "kind": record.kind, "template": record.template}
        metadata = {**head.metadata, "context": msgspec.json.encode(context).decode()}
        metadata.pop("sha256", None)  # it is made anew
        archive.write(out, metadata, tensors)
        tensors.clear()
        view.release()


class _Template(msgspec.Struct, forbid_unknown_fields=True):
    """How messages were rendered."""

    add_special_tokens: bool = False
    kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []


class _Context(msgspec.Struct, forbid_unknown_fields=True):
    """What a file's header says of the context."""

    kind: Literal["text", "messages"]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    template: _Template = msgspec.field(default_factory=_Template)


class _Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A message as chat templates know it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[str] | None
    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


def _fields(path: Path, limit: int) -> dict[str, Any]:
    """The fields of a record that a file tells. Its state is checked by the engine."""
    head = archive.read_header(path)
    context = msgspec.json.decode(head.metadata.get("context", '{"kind":"text"}'), type=_Context)
    messages = None
    with path.open("rb") as file:
        if archive.MESSAGES in head.tensors:
            dtype, _, begin, end = head.tensors[archive.MESSAGES]
            file.seek(head.start + begin)
            if dtype != "U8" or end - begin > limit:
                raise ArchiveError(f"messages of {dtype} and {end - begin} bytes")
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(file.read(end - begin), limit)
            if unpacking.unconsumed_tail:
                raise ArchiveError(f"messages of more than max_body_bytes = {limit} bytes")
            parsed = msgspec.json.decode(data, type=list[_Message])
            messages = [msgspec.to_builtins(message) for message in parsed]
        if context.kind != ("text" if messages is None else "messages"):
            raise ArchiveError(f"a context of {context.kind!r} and messages that do not fit it")
        if archive.TOKENS not in head.tensors:
            raise ArchiveError("no tokens")
        dtype, _, begin, end = head.tensors[archive.TOKENS]
        if dtype not in archive.WIDTHS:
            raise ArchiveError(f"tokens of {dtype}")
        first = max(begin, end - TAIL * archive.BYTES[dtype])
        file.seek(head.start + first)
        tail = numpy.frombuffer(file.read(end - first), archive.WIDTHS[dtype])
    return {
        "name": context.name,
        "kind": context.kind,
        "messages": messages,
        "template": msgspec.to_builtins(context.template),
        "tail": tail.tolist(),
    }
