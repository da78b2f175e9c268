"""GET /v1/models, and what else tells about the model: /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.chat import encode_messages
from server.api.disconnect import unless_disconnected
from server.api.generate import check_tokens
from server.api.schemas import DetokenizeBody, TokenizeBody
from server.api.service import Service, TheService
from server.api.stream import JSON

router = APIRouter()


@router.get("/v1/models")
async def models(service: TheService) -> Response:
    """The one model that is served, as a list."""
    return JSON({"object": "list", "data": [_model(service)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: TheService) -> Response:
    """The model by its id, which may contain slashes."""
    service.check_model(name)
    return JSON(_model(service))


@router.post("/tokenize")
async def tokenize(request: Request, service: TheService) -> Response:
    """Ids of a raw prompt, or of messages as the chat template writes them."""
    body = await service.read(request, TokenizeBody)
    service.check_model(body.model)
    return JSON(await unless_disconnected(request, _tokenize(service, body)))


async def _tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    if body.messages is not None:
        tokens = await (await encode_messages(service, body, body.messages)).all()
    else:
        tokens = await service.tokenizer.encode(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    show = service.tokenizer.show
    return {
        "count": len(tokens),
        "max_model_len": service.capacity.max_model_len,
        "tokens": tokens.tolist(),
        "token_strs": [show(id).text for id in tokens] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(request: Request, service: TheService) -> Response:
    """Text of ids, control tokens included."""
    body = await service.read(request, DetokenizeBody)
    service.check_model(body.model)
    tokens = body.tokens
    await service.off_loop(len(tokens), lambda: check_tokens(service, tokens, "tokens"))
    return JSON({"prompt": await service.tokenizer.decode_long(tokens)})


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_id,
        "object": "model",
        "created": int(service.started),
        "owned_by": "steadystate",
        "root": service.model_id,
        "parent": None,
        "max_model_len": service.capacity.max_model_len,
    }
