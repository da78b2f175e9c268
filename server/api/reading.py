"""What is to be read into a context: bodies of requests, and the engine's reading of them."""

from __future__ import annotations

import json
from typing import Any, Self

from fastapi import Request
from pydantic import Field, field_validator, model_validator

from server.api import limits
from server.api.body import Body
from server.api.continuing import trouble_of
from server.api.schemas import Messages, Name, Priority, Salt, TemplateBody
from server.api.service import Service
from server.errors import ContextLengthError, GenerationError, RequestError
from server.protocol import Read, State


class ContextBody(TemplateBody):
    """POST /v1/contexts: text, parts of text, or messages; and POST /v1/contexts/{id}/append."""

    refused = {}

    model: Name | None = None
    name: Name | None = Field(None, min_length=1)
    ttl: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)
    cache_salt: Salt | None = None
    priority: Priority = 0
    text: str | None = None
    messages: Messages | None = None

    @field_validator("text", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Parts of a text become one: so it is tokenised as if it had come in one."""
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ValueError("must be a string or a list of strings")
        if not any(parts):
            raise ValueError("must not be empty")
        return "".join(parts)

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.text is None) == (self.messages is None):
            given = "neither" if self.text is None else "both"
            raise ValueError(f"text or messages is needed, exactly one of them, got {given}")
        if self.text is not None:
            for name in ("tools", "reasoning_effort", "chat_template_kwargs"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for messages, and there is a text")
        for name in ("add_generation_prompt", "continue_final_message"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for contexts: what follows decides")
        return self


class ForkBody(Body):
    """POST /v1/contexts/{id}/fork."""

    refused = {}

    name: Name | None = Field(None, min_length=1)
    ttl: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)


async def body_of(request: Request, service: Service) -> ContextBody:
    """A body of JSON, or lines of JSON: fields first, then parts of the text as they come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/x-ndjson", "application/jsonl"):
        return await service.read(request, ContextBody)
    data = await request.body()
    return await service.off_loop(len(data), lambda: ContextBody.parse(_joined(data)))


def _joined(data: bytes) -> bytes:
    """Lines as one body."""
    fields: dict[str, Any] = {}
    parts: list[object] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise RequestError(f"line {number} is not valid JSON: {error}") from error
        if not isinstance(item, dict):
            raise RequestError(f"line {number} must be a JSON object")
        if "text" in item:
            parts.append(item.pop("text"))
        elif parts:
            raise RequestError(f"line {number} must have a text: fields come first", param="text")
        fields.update(item)
    return json.dumps({**fields, "text": parts}).encode()


async def read(service: Service, message: Read, count: int) -> tuple[State, int]:
    """Have the engine read; the state that it keeps, and the tokens that it knew already."""
    limit = service.capacity.max_model_len
    if limit is not None and count > limit:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, got {count}", param="text"
        )
    if not count:
        raise RequestError("a context must have at least 1 token, got 0", param="text")
    client = service.client
    with client.admitting():
        service.queue.admit(client, tokens=count)
        submitted = client.submit(message)
    cached = 0
    async with submitted as stream:
        async for output in stream:
            cached = max(cached, output.cached)
            if output.state is not None:
                return output.state, cached
            if output.finish is not None:
                if output.trouble is not None:
                    raise trouble_of(output.trouble)
                raise GenerationError(output.error or "the engine gave this request up")
    raise GenerationError("the engine gave this request up")
