"""A JSON object from a client: strict, finite, every key known or refused by name.

null means absent. Errors name the field, its limit and the value given.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from server.errors import RequestError

# Known to clients of other servers, and not to this one. A value that asks for nothing is let
# through; None: there is no such value.
UNSUPPORTED: dict[str, Any] = {
    "tools": None,
    "tool_choice": "none",
    "functions": None,
    "function_call": "none",
    "parallel_tool_calls": None,
    "reasoning_effort": None,
    "include_reasoning": None,
    "verbosity": None,
    "audio": None,
    "modalities": ["text"],
    "prediction": None,
    "web_search_options": None,
    "moderation": None,
    "prompt_cache_retention": None,
    "prompt_cache_options": None,
    "best_of": 1,
    "suffix": None,
    "echo": False,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "priority": 0,
    "cache_salt": None,
    "structured_outputs": None,
    "structural_tag": None,
    "guided_json": None,
    "guided_regex": None,
    "guided_choice": None,
    "guided_grammar": None,
    "grammar": None,
    "regex": None,
    "ebnf": None,
    "json_schema": None,
    "bad_words": [],
    "allowed_token_ids": None,
    "logits_processors": None,
    "spaces_between_special_tokens": True,
    "return_tokens_as_token_ids": False,
    "chat_template": None,
    "documents": None,
    "mm_processor_kwargs": None,
    "kv_transfer_params": None,
    "vllm_xargs": None,
    "lora_path": None,
    "prompt_embeds": None,
}


class Body(BaseModel):
    """A JSON object with no surprises: strict types, finite numbers, known keys."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), frozen=True
    )
    refused: ClassVar[dict[str, Any]] = UNSUPPORTED

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Raises RequestError that names the field, its limit and the value given."""
        try:
            fields = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the body is not valid JSON: {error}") from error
        except RecursionError as error:
            raise RequestError("the body is nested too deeply") from error
        if not isinstance(fields, dict):
            raise RequestError(f"the body must be a JSON object, got {shown(fields)}")
        fields = {name: value for name, value in fields.items() if value is not None}
        for name in [name for name in fields if name not in cls.model_fields]:
            cls._refuse(name, fields.pop(name))
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _explained(error) from error

    @classmethod
    def _refuse(cls, name: str, value: Any) -> None:
        """Raise, unless the value asks for nothing."""
        if name not in cls.refused:
            raise RequestError(
                f"unknown parameter: {name[:100]!r}, got {shown(value)}",
                param=name[:100],
                code="unknown_parameter",
            )
        nothing = cls.refused[name]
        if nothing is None or type(value) is not type(nothing) or value != nothing:
            raise RequestError(
                f"{name} is not supported by this server, got {shown(value)}",
                param=name,
                code="unsupported_parameter",
            )


def shown(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = json.dumps(value, ensure_ascii=False) if len(str(value)) <= 200 else str(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _explained(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    field = ""
    for key in first["loc"]:
        field += f"[{key}]" if isinstance(key, int) else f".{key}" if field else str(key)
    if first["type"] == "missing":
        return RequestError(f"{field} is required", param=field, code="missing_parameter")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error" and not field:
        return RequestError(message, param=message.split(" ", 1)[0])
    given = "" if ", got " in message else f", got {shown(first['input'])}"
    return RequestError(f"{field}: {message}{given}", param=field or None)
