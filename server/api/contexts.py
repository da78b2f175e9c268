"""/v1/contexts: texts and conversations that are read once, kept as states, and gone on with by id.

An extension of OpenAI's API; docs/contexts.md describes it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from array import array
from collections.abc import Mapping
from pathlib import Path

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from server.api import exchange
from server.api.continuing import open_context, template_kwargs, trouble_of, whole
from server.api.disconnect import unless_disconnected
from server.api.reading import ForkBody, body_of, read
from server.api.registry import TAIL, Record
from server.api.schemas import for_template
from server.api.service import Service, TheService
from server.api.stream import JSON
from server.errors import RequestError
from server.protocol import Read, pack_tokens


async def _enabled(service: TheService) -> None:
    settings = service.settings
    if not settings.prefix_caching:
        raise RequestError("there are no contexts where prefix_caching is off")
    if settings.api_workers > 1 and settings.context_directory is None:
        raise RequestError(  # these know of one another's by files alone
            f"with api_workers = {settings.api_workers} contexts need a context_directory"
        )


router = APIRouter(dependencies=[Depends(_enabled)])


@router.post("/v1/contexts")
async def create(request: Request, service: TheService) -> Response:
    """Read text or messages once; answers when the state is kept."""
    body = await body_of(request, service)
    service.check_model(body.model)
    messages = None
    if body.messages is not None:
        messages = for_template(body.messages)
        template = {
            "add_special_tokens": bool(body.add_special_tokens),
            "kwargs": template_kwargs(body),
            "tools": [tool.for_template() for tool in body.offered],
        }
        tokens = await whole(service, messages, template)
        boundaries = service.tokenizer.boundaries(tokens)
    else:
        template, boundaries = {}, []
        special = body.add_special_tokens is not False
        tokens = await service.tokenizer.encode(body.text or "", add_special_tokens=special)
    message = Read(
        id=service.client.new_id(),
        tokens=pack_tokens(tokens),
        salt=body.cache_salt or "",
        boundaries=boundaries,
    )
    state, cached = await unless_disconnected(request, read(service, message, len(tokens)))
    record = Record(
        id="ctx_" + secrets.token_hex(12),
        key=state.key,
        identity=service.capacity.identity,
        owner=request.state.owner,
        kind="text" if messages is None else "messages",
        count=state.count,
        bytes=state.bytes,
        salt=state.salt,
        created=time.time(),
        name=body.name,
        expires=_expiry(body.ttl),
        messages=messages,
        template=template,
        tail=tokens[-TAIL:].tolist(),
    )
    await _enter(service, record)
    return _answer(service, record, cached)


@router.get("/v1/contexts")
async def contexts(request: Request, service: TheService) -> Response:
    """The caller's contexts, the oldest first."""
    records = await asyncio.to_thread(service.contexts.owned, request.state.owner)
    return JSON({"object": "list", "data": [r.shown(service.model_id) for r in records]})


@router.post("/v1/contexts/import")
async def bring(request: Request, service: TheService) -> Response:
    """Keep the state in a file that a server of the same model has given out."""
    name, ttl = request.query_params.get("name"), request.query_params.get("ttl")
    fields = {"name": name, "ttl": int(ttl) if ttl and ttl.isdecimal() else ttl}
    asked = ForkBody.parse(msgspec.json.encode(fields))
    path = service.scratch / secrets.token_hex(12)
    try:
        await _receive(request, path)
        record = await exchange.imported(service, path, request.state.owner)
    finally:
        path.unlink(missing_ok=True)
    record = msgspec.structs.replace(
        record, name=asked.name or record.name, expires=_expiry(asked.ttl)
    )
    await _enter(service, record)
    return _answer(service, record, 0)


@router.get("/v1/contexts/{id}")
async def context(id: str, request: Request, service: TheService) -> Response:
    """One context."""
    record = await asyncio.to_thread(service.contexts.get, id, request.state.owner)
    return JSON(record.shown(service.model_id))


@router.delete("/v1/contexts/{id}")
async def delete(id: str, request: Request, service: TheService) -> Response:
    """Forget a context; forks of it stay."""
    record = await asyncio.to_thread(service.contexts.get, id, request.state.owner)
    if await asyncio.to_thread(service.contexts.remove, record):
        service.client.pin(record.key, -1)
    return JSON({"id": id, "object": "context.deleted", "deleted": True})


@router.post("/v1/contexts/{id}/fork")
async def fork(id: str, request: Request, service: TheService) -> Response:
    """A context of its own that begins as this one; the state is shared."""
    body = ForkBody.parse(await request.body() or b"{}")
    record = await open_context(service, id, request.state.owner)
    record = msgspec.structs.replace(
        record,
        id="ctx_" + secrets.token_hex(12),
        created=time.time(),
        name=body.name,
        expires=_expiry(body.ttl),
    )
    service.client.pin(record.key, 1)
    await _enter(service, record)
    return _answer(service, record, record.count)


@router.post("/v1/contexts/{id}/append")
async def append(id: str, request: Request, service: TheService) -> Response:
    """Read more behind a context, which then is all of it. Nothing bounds the sum."""
    body = await body_of(request, service)
    for field in sorted(body.model_fields_set - {"model", "text", "messages", "ttl"}):
        raise RequestError(f"{field} is set when a context is made, not later", param=field)
    record = await open_context(service, id, request.state.owner)
    kind = "text" if body.messages is None else "messages"
    if kind != record.kind:
        raise RequestError(
            f"{kind}: the context was made of {record.kind}, and goes on with {record.kind}",
            param=kind,
        )
    messages, base, drop, boundaries = None, record.key, 0, []
    if body.messages is not None:
        messages = [*(record.messages or []), *for_template(body.messages)]
        tokens = await whole(service, messages, record.template)
        boundaries = service.tokenizer.boundaries(tokens)
        base, count, tail = "", len(tokens), tokens[-TAIL:]
    else:
        before = array("i", record.tail)
        drop, tokens = await service.tokenizer.encode_after(before, body.text or "")
        count = record.count - drop + len(tokens)
        tail = (before[: len(before) - drop] + tokens)[-TAIL:]
    message = Read(
        id=service.client.new_id(), tokens=pack_tokens(tokens), base=base, drop=drop,
        boundaries=boundaries, salt_digest=record.salt,
    )  # fmt: skip
    state, cached = await unless_disconnected(request, read(service, message, count))
    expires = _expiry(body.ttl) if body.ttl is not None else record.expires
    grown = msgspec.structs.replace(
        record, key=state.key, count=state.count, bytes=state.bytes, messages=messages,
        tail=tail.tolist(), expires=expires,
    )  # fmt: skip
    await _enter(service, grown, instead=record)
    service.client.pin(record.key, -1)
    return _answer(service, grown, cached)


@router.get("/v1/contexts/{id}/file")
async def file(id: str, request: Request, service: TheService) -> Response:
    """A context as one safetensors file, for another server of the same model."""
    record = await open_context(service, id, request.state.owner)
    path = await exchange.exported(service, record)
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=f"{record.id}.safetensors",
        background=BackgroundTask(path.unlink, missing_ok=True),
    )


async def _receive(request: Request, path: Path) -> None:
    """An upload, as it comes, into a file."""
    try:
        with path.open("wb") as file:
            async for data in request.stream():
                await asyncio.to_thread(file.write, data)
    except OSError as error:
        raise trouble_of(exchange.full(error)) from error


async def _enter(service: Service, record: Record, *, instead: Record | None = None) -> None:
    """Put a context into the registry; its state is let go when that fails."""
    try:
        await asyncio.to_thread(service.contexts.put, record, instead=instead)
    except OSError as error:
        service.client.pin(record.key, -1)
        raise trouble_of(exchange.full(error)) from error
    except Exception:
        service.client.pin(record.key, -1)
        raise


def _expiry(ttl: int | None) -> float | None:
    return None if ttl is None else time.time() + ttl


def _answer(service: Service, record: Record, cached: int) -> Response:
    shown: Mapping[str, object] = record.shown(service.model_id)
    usage = {
        "prompt_tokens": record.count,
        "total_tokens": record.count,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return JSON({**shown, "usage": usage})
