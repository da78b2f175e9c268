"""Prompts that go on where a context ends: text after text, messages after messages."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.generate import Prompt
from server.api.registry import Record
from server.api.schemas import ChatBody, TemplateBody, for_template
from server.api.service import Service
from server.engine.chain import Chain, common, root_of, salt_digest
from server.errors import GoneError, RequestError, SteadystateError, StorageFullError
from server.protocol import Fetch, Trouble


async def open_context(service: Service, id: str, owner: str, *, salt: str | None = None) -> Record:
    """A context whose state is where requests find it at once. Raises NotFoundError, GoneError."""
    record = await asyncio.to_thread(service.contexts.get, id, owner)
    if salt is not None and salt_digest(salt) != record.salt:
        raise RequestError("cache_salt is not that of the context", param="cache_salt")
    reply = await service.client.call(Fetch(service.client.new_id(), record.key))
    if reply.trouble is not None:
        raise trouble_of(reply.trouble, record)
    return record


def trouble_of(trouble: Trouble, record: Record | None = None) -> SteadystateError:
    """What the engine says of a state, as it goes over HTTP."""
    message = trouble.message if record is None else f"context {record.id}: {trouble.message}"
    if trouble.status == 410:
        return GoneError(message, param="context")
    if trouble.status == 507:
        return StorageFullError(message)
    return RequestError(message, param="file" if record is None else "context")


async def after_text(service: Service, record: Record, text: str) -> Prompt:
    """Text behind a context of text."""
    if record.kind != "text":
        raise RequestError(
            "context was made of messages: use /v1/chat/completions", param="context"
        )
    drop, tokens = await service.tokenizer.encode_after(array("i", record.tail), text)
    return _prompt(record, tokens, text=text, drop=drop)


def after_tokens(record: Record, tokens: array[int], text: str | None) -> Prompt:
    """Token ids behind a context of text."""
    if record.kind != "text":
        raise RequestError(
            "context was made of messages: use /v1/chat/completions", param="context"
        )
    return _prompt(record, tokens, text=text)


async def after_messages(service: Service, record: Record, body: ChatBody) -> Prompt:
    """Messages behind a context: of text, which they follow as they are rendered; of messages, with
    which they are rendered as one conversation. RequestError when that does not begin as the
    context does."""
    messages = for_template(body.messages)
    ending = body.add_generation_prompt
    if ending is None:
        ending = not body.continue_final_message
    if record.kind == "text":
        tokens = await service.tokenizer.encode_chat(
            messages,
            add_generation_prompt=ending,
            continue_final_message=body.continue_final_message,
            tools=[tool.for_template() for tool in body.offered],
            kwargs=template_kwargs(body),
        )
        boundaries = service.tokenizer.boundaries(tokens)
        return _prompt(record, tokens, boundaries=boundaries, field="messages")
    template = record.template
    if body.add_special_tokens is not None:
        template = {**template, "add_special_tokens": body.add_special_tokens}
    if template_kwargs(body):
        template = {**template, "kwargs": template_kwargs(body)}
    if body.tools:
        template = {**template, "tools": [tool.for_template() for tool in body.offered]}
    tokens = await whole(
        service,
        [*(record.messages or []), *messages],
        template,
        add_generation_prompt=ending,
        continue_final_message=body.continue_final_message,
    )
    if not await service.off_loop(4 * len(tokens), lambda: _begins(service, record, tokens)):
        raise await _parting(service, record, tokens)
    boundaries = service.tokenizer.boundaries(tokens)
    rest = tokens[record.count :]
    return _prompt(record, rest, boundaries=boundaries, absolute=True, field="messages")


def template_kwargs(body: TemplateBody) -> dict[str, Any]:
    """What a body gives the chat template beside messages and tools."""
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return body.chat_template_kwargs | effort


async def whole(
    service: Service,
    messages: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> array[int]:
    """A conversation as a context has it: rendered as the context was made."""
    return await service.tokenizer.encode_chat(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        add_special_tokens=bool(template.get("add_special_tokens")),
        tools=template.get("tools", ()),
        kwargs=template.get("kwargs"),
    )


def _begins(service: Service, record: Record, tokens: array[int]) -> bool:
    """Whether tokens begin with a context's: its key is a digest of them."""
    if len(tokens) < record.count:
        return False
    chain = Chain(root_of(service.capacity.identity, record.salt), tokens)
    return chain.key(record.count) == record.key


async def _parting(service: Service, record: Record, tokens: array[int]) -> RequestError:
    """The message in which a rendered conversation leaves the context that it should go on with."""
    before = await whole(service, record.messages or [], record.template)
    at = common(before.tobytes(), tokens.tobytes())
    ended = sum(end <= at for end in service.tokenizer.boundaries(before))
    index = min(ended, len(record.messages or []) - 1)
    return RequestError(
        f"context: with the request's messages the chat template renders messages[{index}] of the "
        f"context in another way: tokens part at {at} of {record.count}; make the context anew, or "
        "end it before that message",
        param="context",
        code="context_diverges",
    )


def _prompt(
    record: Record,
    tokens: array[int],
    *,
    text: str | None = None,
    drop: int = 0,
    boundaries: Sequence[int] = (),
    absolute: bool = False,
    field: str = "prompt",
) -> Prompt:
    before = record.count - drop
    return Prompt(
        tokens,
        text,
        boundaries if absolute else [before + end for end in boundaries],
        base=record.key,
        before=before,
        drop=drop,
        field=field,
    )
