"""POST /v1/completions."""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.choice import Piece, TokenChoice
from server.api.continuing import after_text, after_tokens, open_context
from server.api.detokenizer import UNFINISHED
from server.api.disconnect import unless_disconnected
from server.api.generate import Generation, Prompt, begun, check_tokens, options_of, start
from server.api.logs import Record
from server.api.registry import Record as Context
from server.api.schemas import CompletionBody
from server.api.service import Service, TheService
from server.api.stream import JSON, EventStream
from server.api.tokenizer import TokenText
from server.errors import RequestError

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request, service: TheService) -> Response:
    """Completions of one or several prompts, whole or as server-sent events."""
    record: Record = request.state.record
    body = await service.read(request, CompletionBody)
    service.check_model(body.model)
    service.queue.admit(service.client)
    head = {
        "id": f"cmpl-{body.request_id or record.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_id,
        "system_fingerprint": service.capacity.fingerprint or None,
    }
    if body.stream:
        generation = await unless_disconnected(request, _begin(service, body, request))
        return EventStream(
            _chunks(body, head, generation),
            generation,
            record,
            keepalive_seconds=service.settings.keepalive_seconds,
        )
    return JSON(await unless_disconnected(request, _whole(service, body, head, request)))


async def _begin(service: Service, body: CompletionBody, request: Request) -> Generation:
    if len(body.prompt) > service.settings.max_n:
        raise RequestError(
            f"prompt: at most max_n = {service.settings.max_n} prompts, got {len(body.prompt)}",
            param="prompt",
        )
    context = None
    if body.context is not None:
        context = await open_context(
            service, body.context, request.state.owner, salt=body.cache_salt
        )
    prompts = [await _prompt(service, body, prompt, context) for prompt in body.prompt]
    options = options_of(body, service, max_tokens=body.max_tokens, logprobs=body.logprobs)
    return await start(service, prompts, options, request.state.record)


async def _prompt(
    service: Service, body: CompletionBody, prompt: str | list[int], context: Context | None
) -> Prompt:
    if isinstance(prompt, str):
        if context is not None:
            return await after_text(service, context, prompt)
        special = body.add_special_tokens
        pieces = service.tokenizer.pieces(prompt, add_special_tokens=special)
        return await begun(service, pieces, prompt)
    tokens = await service.off_loop(len(prompt), partial(_checked, service, prompt))
    text = await service.tokenizer.decode_long(prompt) if body.echo else None
    return Prompt(tokens, text) if context is None else after_tokens(context, tokens, text)


def _checked(service: Service, ids: list[int]) -> array[int]:
    check_tokens(service, ids, "prompt")
    return array("i", ids)


async def _whole(
    service: Service, body: CompletionBody, head: Mapping[str, Any], request: Request
) -> dict[str, Any]:
    generation = await _begin(service, body, request)
    try:
        pieces = await generation.complete()
    finally:
        generation.close()
    choices = [_choice(body, generation, piece, first=True) for piece in pieces]
    return {**head, "choices": choices, "usage": generation.usage()}


async def _chunks(
    body: CompletionBody, head: Mapping[str, Any], generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    options = body.stream_options
    wants_usage = options is not None and options.include_usage
    running_usage = options is not None and options.continuous_usage_stats
    begun: set[int] = set()
    async for piece in generation.pieces():
        choice = _choice(body, generation, piece, first=piece.index not in begun)
        begun.add(piece.index)
        chunk = {**head, "choices": [choice]}
        if running_usage:
            chunk["usage"] = generation.usage()
        elif wants_usage:
            chunk["usage"] = None
        yield chunk
    if wants_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _choice(
    body: CompletionBody, generation: Generation, piece: Piece, *, first: bool
) -> dict[str, Any]:
    """A choice, or a part of one. The echoed prompt and its ids come with the first part."""
    prompt = generation.prompts[piece.index // body.n]
    echo = (prompt.text or "") if body.echo and first else ""
    choice: dict[str, Any] = {
        "index": piece.index,
        "text": echo + piece.text,
        "logprobs": None if body.logprobs is None else _logprobs(piece.logprobs, body.logprobs),
        "finish_reason": piece.finish,
        "stop_reason": piece.stop,
    }
    if body.return_token_ids:
        choice["token_ids"] = piece.tokens
        choice["prompt_token_ids"] = prompt.tokens.tolist() if first else None
    return choice


def _logprobs(tokens: list[TokenChoice], wanted: int) -> dict[str, Any]:
    """OpenAI's four aligned lists. The drawn token is among the best, at their end if need be."""
    return {
        "tokens": [_key(entry.token) for entry in tokens],
        "token_logprobs": [entry.logprob for entry in tokens],
        "top_logprobs": [
            {
                **{_key(token): logprob for token, logprob in entry.top[:wanted]},
                _key(entry.token): entry.logprob,
            }
            for entry in tokens
        ],
        "text_offset": [entry.offset for entry in tokens],
    }


def _key(token: TokenText) -> str:
    """A token as a key; parts of characters are written as bytes, to be told apart."""
    if UNFINISHED not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
