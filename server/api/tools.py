"""Tools as requests bring them: functions with a JSON schema, and the calls of earlier turns.

They reach the checkpoint's chat template. What the model calls stays in its text: calls are not
parsed out of it, so a call can neither be forced nor be bounded.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from server.api import limits
from server.api.body import Body, shown

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Id = Annotated[str, StringConstraints(min_length=1, max_length=limits.MAX_NAME_CHARS)]


def check_size(value: Any, most_bytes: int) -> None:
    """ValueError for a value that is too large as JSON, or nested too deeply."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > limits.MAX_DEPTH:
            raise ValueError(f"nested at most {limits.MAX_DEPTH} deep, got more")
        inner = [item.values() if isinstance(item, dict) else item for item in level
                 if isinstance(item, dict | list)]  # fmt: skip
        level = [item for items in inner for item in items]
    size = len(json.dumps(value))
    if size > most_bytes:
        raise ValueError(f"at most {most_bytes} bytes, got {size}")


class Function(BaseModel):
    """What a tool is called, what it is for, and the JSON schema of its arguments."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Arguments are an object: so must the schema say, as far as it says anything."""
        schema = value or {}
        if schema.get("type", "object") != "object":
            raise ValueError(f"type must be 'object', got {shown(schema['type'])}")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not all(
            isinstance(item, dict | bool) for item in properties.values()
        ):
            raise ValueError(f"properties must be an object of schemas, got {shown(properties)}")
        if not isinstance(required, list) or not all(isinstance(item, str) for item in required):
            raise ValueError(f"required must be a list of names, got {shown(required)}")
        return value

    @field_validator("strict")
    @classmethod
    def _not_strict(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("strict schemas are not supported by this server, got true")
        return value


class Tool(BaseModel):
    """A function: there are no tools of other kinds."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: str
    function: Function

    @model_validator(mode="before")
    @classmethod
    def _function(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") != "function":
            raise ValueError(f"only tools of type 'function', got {shown(value.get('type'))}")
        return value

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


def _bounded(value: Any) -> Any:
    if isinstance(value, list):
        if len(value) > limits.MAX_TOOLS:
            raise ValueError(f"at most {limits.MAX_TOOLS} tools, got {len(value)}")
        check_size(value, limits.MAX_TOOLS_BYTES)
    return value


def _distinct(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"names of functions must differ, got {shown(name)} twice")
    return tools


Tools = Annotated[list[Tool], BeforeValidator(_bounded), AfterValidator(_distinct)]


def _free(value: Any) -> Any:
    if value not in ("none", "auto"):
        raise ValueError(
            "only 'none' and 'auto' are supported: a call cannot be forced by this server, "
            f"got {shown(value)}"
        )
    return value


ToolChoice = Annotated[Literal["none", "auto"], BeforeValidator(_free)]


class Call(BaseModel):
    """A function's name, and its arguments as the JSON that the model wrote."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    name: FunctionName
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _object(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"must be a string with a JSON object in it, got {shown(value)}")
        try:
            fields = msgspec.json.decode(value or "{}")
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(f"must be JSON: {error}, got {shown(value)}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"must be a JSON object, got {shown(value)}")
        check_size(fields, limits.MAX_ARGUMENTS_BYTES)
        return fields


class ToolCall(BaseModel):
    """A call in an assistant's message; keys that are not read here are tolerated."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    id: Id
    type: Literal["function"] = "function"
    function: Call

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: arguments as an object."""
        return {"id": self.id, "type": "function", "function": self.function.model_dump()}


class ToolFields(Body):
    """What a body says about tools."""

    tools: Tools = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _parallel(self) -> Self:
        if self.offered and not self.parallel_tool_calls:
            raise ValueError(
                "parallel_tool_calls must not be false when there are tools: "
                "calls cannot be bounded by this server"
            )
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may call: with tool_choice none it does not hear of them."""
        return self.tools if self.tool_choice == "auto" else []


CallList = Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOL_CALLS)]
