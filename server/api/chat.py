"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.choice import Piece, TokenChoice
from server.api.continuing import after_messages, open_context, template_kwargs
from server.api.disconnect import unless_disconnected
from server.api.generate import Generation, Prompt, begun, options_of, start
from server.api.logs import Record
from server.api.pieces import Pieces
from server.api.reasoning import OPEN, opened
from server.api.schemas import ChatBody, Message, TemplateBody, for_template
from server.api.service import Service, TheService
from server.api.stream import JSON, EventStream

TAIL = 32  # tokens of a prompt in which an opening tag at its end is looked for

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(request: Request, service: TheService) -> Response:
    """A chat completion, whole or as server-sent events."""
    record: Record = request.state.record
    body = await service.read(request, ChatBody)
    service.check_model(body.model)
    service.queue.admit(service.client)
    head = {
        "id": f"chatcmpl-{body.request_id or record.request_id}",
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


async def encode_messages(service: Service, body: TemplateBody, messages: list[Message]) -> Pieces:
    """A conversation on its way to ids."""
    ending = body.add_generation_prompt
    return await service.tokenizer.chat_pieces(
        for_template(messages),
        add_generation_prompt=not body.continue_final_message if ending is None else ending,
        continue_final_message=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
        tools=[tool.for_template() for tool in body.offered],
        kwargs=template_kwargs(body),
    )


async def _begin(service: Service, body: ChatBody, request: Request) -> Generation:
    if body.context is None:
        pieces = await encode_messages(service, body, body.messages)
        ends = service.tokenizer.boundaries
        prompt = await begun(service, pieces, ends=ends, field="messages")
    else:
        context = await open_context(
            service, body.context, request.state.owner, salt=body.cache_salt
        )
        prompt = await after_messages(service, context, body)
    options = options_of(
        body,
        service,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    thinking = partial(_thinking, service, body) if service.tells_reasoning else None
    return await start(service, [prompt], options, request.state.record, thinking=thinking)


def _thinking(service: Service, body: ChatBody, prompt: Prompt) -> bool:
    """Whether the prompt ends inside a block of reasoning, which the reply then goes on with.

    The template may open one at the prompt's very end; elsewhere the tag is somebody's text.
    """
    if body.continue_final_message:
        content = body.messages[-1].content or ""
        return opened(content if isinstance(content, str) else "\n".join(content))
    return service.tokenizer.decode(prompt.tokens[-TAIL:]).rstrip().endswith(OPEN)


async def _whole(
    service: Service, body: ChatBody, head: Mapping[str, Any], request: Request
) -> dict[str, Any]:
    generation = await _begin(service, body, request)
    try:
        pieces = await generation.complete()
    finally:
        generation.close()
    choices = []
    for done in pieces:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        if service.tells_reasoning:
            message["reasoning_content"] = done.reasoning or None
        choice: dict[str, Any] = {
            "index": done.index,
            "message": message,
            "logprobs": _logprobs(body, done.logprobs),
            "finish_reason": done.finish,
            "stop_reason": done.stop,
        }
        if body.return_token_ids:
            choice["token_ids"] = done.tokens
        choices.append(choice)
    answer = {**head, "object": "chat.completion", "choices": choices, "usage": generation.usage()}
    if body.return_token_ids:
        answer["prompt_token_ids"] = generation.prompts[0].tokens.tolist()
    return answer


async def _chunks(
    body: ChatBody, head: Mapping[str, Any], generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    """The role comes with a choice's first piece: clients take it for the first token."""
    options = body.stream_options
    wants_usage = options is not None and options.include_usage
    running_usage = options is not None and options.continuous_usage_stats
    head = {**head, "object": "chat.completion.chunk"}
    begun: set[int] = set()
    async for piece in generation.pieces():
        chunk = {**head, "choices": [_delta(body, piece, piece.index not in begun)]}
        if running_usage:
            chunk["usage"] = generation.usage()
        elif wants_usage:
            chunk["usage"] = None
        if body.return_token_ids and not begun:
            chunk["prompt_token_ids"] = generation.prompts[0].tokens.tolist()
        begun.add(piece.index)
        yield chunk
    if wants_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


def _delta(body: ChatBody, piece: Piece, first: bool) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if first:
        delta = {"role": "assistant", "content": piece.text, "refusal": None}
    elif piece.text:
        delta = {"content": piece.text}
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
    choice: dict[str, Any] = {
        "index": piece.index,
        "delta": delta,
        "logprobs": _logprobs(body, piece.logprobs),
        "finish_reason": piece.finish,
    }
    if piece.finish is not None:
        choice["stop_reason"] = piece.stop
    if body.return_token_ids:
        choice["token_ids"] = piece.tokens
    return choice


def _logprobs(body: ChatBody, tokens: list[TokenChoice]) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    wanted = body.top_logprobs or 0
    return {
        "content": [
            {
                "token": entry.token.text,
                "logprob": entry.logprob,
                "bytes": list(entry.token.bytes),
                "top_logprobs": [
                    {"token": token.text, "logprob": logprob, "bytes": list(token.bytes)}
                    for token, logprob in entry.top[:wanted]
                ],
            }
            for entry in tokens
        ],
        "refusal": None,
    }
