"""Request bodies. A parameter that is not supported is refused by name, never ignored.

null means absent. Unknown keys are refused at the top level and tolerated inside messages, into
which clients echo what they once received.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from server.api import limits
from server.api.body import UNSUPPORTED, Body, shown
from server.api.tools import CallList, ToolFields, check_size

Name = Annotated[str, StringConstraints(max_length=limits.MAX_NAME_CHARS)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=limits.MAX_NAME_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=limits.MAX_TOKENS)]
Priority = Annotated[int, Field(ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)]


def _few(value: Any) -> Any:
    if isinstance(value, list) and len(value) > limits.MAX_MESSAGES:
        raise ValueError(f"at most {limits.MAX_MESSAGES} messages, got {len(value)}")
    return value


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """null is absent here too, and so is an obfuscation that is not wanted."""
        if not isinstance(value, dict):
            return value
        off = {"include_obfuscation": False}
        return {k: v for k, v in value.items() if v is not None and (k, v) not in off.items()}


class GenerationBody(Body):
    """What chat and text completions have in common."""

    model: Name | None = None
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)
    min_tokens: int = Field(0, ge=0, le=limits.MAX_TOKENS)
    ignore_eos: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=limits.MAX_TOKENS)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=limits.MAX_STOP_TOKEN_IDS
    )
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    request_id: Name | None = None
    cache_salt: Salt | None = None
    priority: Priority = 0

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("must be a string or a list of strings")
        if len(stops) > limits.MAX_STOPS:
            raise ValueError(f"at most {limits.MAX_STOPS} strings, got {len(stops)}")
        for stop in stops:
            if not 1 <= len(stop) <= limits.MAX_STOP_CHARS:
                raise ValueError(
                    f"a string must have 1 to {limits.MAX_STOP_CHARS} characters, got {len(stop)}"
                )
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be an object of token ids and biases")
        if len(value) > limits.MAX_LOGIT_BIAS:
            raise ValueError(f"at most {limits.MAX_LOGIT_BIAS} entries, got {len(value)}")
        biases = {}
        for id, bias in value.items():
            if not (id.isascii() and id.isdecimal() and len(id) <= 10):
                raise ValueError(f"keys must be token ids, got {shown(id)}")
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ValueError(f"biases must be numbers from -100 to 100, got {shown(bias)}")
            biases[int(id)] = float(bias)
        return biases

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError(
                "stream_options is only allowed with stream = true, got stream = false"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens = {self.max_tokens}, got {self.min_tokens}"
            )
        return self


class Message(BaseModel):
    """One message of a conversation; keys that are not read here are tolerated."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[str] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    tool_calls: CallList | None = None
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        role = value.get("role")
        for name in ("function_call", "audio"):
            if value.get(name):
                raise ValueError(f"{name} is not supported by this server")
        if role != "assistant":
            if value.get("content") is None:
                raise ValueError("content must be a string or a list of text parts")
            if value.get("tool_calls"):
                raise ValueError(f"tool_calls are an assistant's, got role {shown(role)}")
            value = {k: v for k, v in value.items() if k not in ("tool_calls", "reasoning_content")}
        if role == "tool":
            if not isinstance(value.get("tool_call_id"), str):
                raise ValueError(
                    "tool_call_id must be the id of a call, got " + shown(value.get("tool_call_id"))
                )
        else:
            value = {k: v for k, v in value.items() if k != "tool_call_id"}
        return value

    @field_validator("role", mode="before")
    @classmethod
    def _role(cls, value: Any) -> Any:
        if value == "function":
            raise ValueError("is 'tool' where functions are tools, got \"function\"")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of text parts")
        if len(value) > limits.MAX_PARTS:
            raise ValueError(f"at most {limits.MAX_PARTS} parts, got {len(value)}")
        texts = []
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else None
            text = part.get("text") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"only 'text' parts are supported, got {shown(kind or part)}")
            if not isinstance(text, str):
                raise ValueError(f"a part's text must be a string, got {shown(text)}")
            texts.append(text)
        return texts

    def for_template(self, names: Mapping[str, str]) -> dict[str, Any]:
        """As chat templates know it: the role `developer` is called system there, and the answer
        of a tool has the name that its call had, by `names`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content}
        name = self.name or (names.get(self.tool_call_id) if self.tool_call_id else None)
        optional = {
            "name": name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
        }
        return message | {key: value for key, value in optional.items() if value is not None}


def for_template(messages: list[Message]) -> list[dict[str, Any]]:
    """A conversation as chat templates know it."""
    names: dict[str, str] = {}
    shaped = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        shaped.append(message.for_template(names))
    return shaped


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_few)]


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: str

    @field_validator("type")
    @classmethod
    def _text(cls, value: str) -> str:
        if value != "text":
            raise ValueError("only 'text' is supported by this server")
        return value


class TemplateBody(ToolFields):
    """How messages become a prompt."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, max_length=limits.MAX_TEMPLATE_KWARGS
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _small(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_size(value, limits.MAX_TEMPLATE_KWARGS_BYTES)
        return value

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt and continue_final_message must not both be true"
            )
        effort = self.chat_template_kwargs.get("reasoning_effort", self.reasoning_effort)
        if self.reasoning_effort is not None and effort != self.reasoning_effort:
            raise ValueError(
                f"reasoning_effort differs from that in chat_template_kwargs: {shown(effort)}, "
                f"got {shown(self.reasoning_effort)}"
            )
        return self


class ChatBody(GenerationBody, TemplateBody):
    """POST /v1/chat/completions."""

    messages: Messages
    context: Name | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=limits.MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    metadata: dict[Name, Name] | None = Field(None, max_length=limits.MAX_METADATA)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Name | None = None
    safety_identifier: Name | None = None

    @model_validator(mode="after")
    def _chat_agrees(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(
                f"top_logprobs is only allowed with logprobs = true, got {self.top_logprobs} "
                "with logprobs = false"
            )
        bound = self.max_completion_tokens
        if bound is not None and self.min_tokens > bound:
            raise ValueError(
                f"min_tokens must not exceed max_completion_tokens = {bound}, got {self.min_tokens}"
            )
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    refused = {name: value for name, value in UNSUPPORTED.items() if name != "echo"}

    prompt: list[str] | list[list[int]]
    context: Name | None = None
    max_tokens: int = Field(16, ge=1, le=limits.MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompts(cls, value: Any, _: Any) -> list[str] | list[list[int]]:
        """One prompt or several, text or ids; by hand, for a prompt may be a million ids."""
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(type(item) is int for item in value):
                return [value]
            if all(type(item) is str for item in value):
                return value
            if all(type(item) is list and all(type(i) is int for i in item) for item in value):
                return value
        raise ValueError("must be a string or token ids, or a list of either, and not empty")

    @model_validator(mode="after")
    def _completion_agrees(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo together with logprobs is not supported by this server, "
                f"got logprobs = {self.logprobs}"
            )
        return self


class TokenizeBody(TemplateBody):
    """POST /tokenize: a prompt or messages."""

    refused = {}

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"prompt or messages is needed, exactly one of them, got {given}")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    refused = {}

    model: Name | None = None
    tokens: list[TokenId] = Field(fail_fast=True)
