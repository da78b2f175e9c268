"""A JSON object from a client: strict, finite, every key known or refused by name.

null means absent. Errors name the field, its limit and the value given.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from server.errors import RequestError

# Known to clients of other servers, and not to this one. The values that ask for nothing, which are
# let through.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "include_reasoning": (),
    "verbosity": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_retention": (),
    "prompt_cache_options": (),
    "best_of": (1,),
    "suffix": (),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": (),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "lora_path": (),
    "prompt_embeds": (),
}


class Body(BaseModel):
    """A JSON object with no surprises: strict types, finite numbers, known keys."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), frozen=True
    )
    refused: ClassVar[dict[str, tuple[Any, ...]]] = UNSUPPORTED

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
        nothings = cls.refused[name]
        if not any(type(value) is type(nothing) and value == nothing for nothing in nothings):
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
    message = _plainly(first)
    if first["type"] == "value_error" and not field:
        return RequestError(message, param=message.split(" ", 1)[0])
    given = "" if ", got " in message else f", got {shown(first['input'])}"
    return RequestError(f"{field}: {message}{given}", param=field or None)


def _plainly(error: ErrorDetails) -> str:
    """What pydantic says, without Python's words; sizes are told of what is too long to show."""
    limits = error.get("ctx", {})
    match error["type"]:
        case "too_long":
            return f"at most {limits['max_length']} items, got {len(error['input'])}"
        case "too_short":
            return f"at least {limits['min_length']} items, got {len(error['input'])}"
        case "string_too_long":
            return f"at most {limits['max_length']} characters, got {len(error['input'])}"
        case "string_too_short":
            return f"at least {limits['min_length']} characters, got {len(error['input'])}"
        case "model_type" | "dict_type":
            return "must be an object"
        case "extra_forbidden":
            return "unknown parameter"
    return error["msg"].removeprefix("Value error, ").removeprefix("Input ")
