"""Bodies: what is supported is bounded, what is not is refused by name, null is absent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.api.body import UNSUPPORTED, Body
from server.api.limits import MAX_LOGIT_BIAS, MAX_MESSAGES, MAX_PARTS
from server.api.reading import ContextBody
from server.api.schemas import ChatBody, CompletionBody, TokenizeBody
from server.errors import RequestError

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatBody:
    return ChatBody.parse(json.dumps({"messages": MESSAGES, **fields}).encode())


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.parse(json.dumps({"prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, 2.1, "1", True, [])),
        *(("top_p", value) for value in (0, 1.1, -1)),
        *(("top_k", value) for value in (-2, 1.5, 2**31)),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("n", value) for value in (0, 129, 1.5, True, "2")),
        *(("max_tokens", value) for value in (0, -1, 2**31, 1e3 + 0.5)),
        *(("min_tokens", value) for value in (-1, 2**31)),
        *(("presence_penalty", value) for value in (-2.1, 2.1)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1)),
        *(("repetition_penalty", value) for value in (0, -1, 2.1)),
        *(("seed", value) for value in (2**63, -(2**63) - 1, 0.5, 10**400)),
        *(("stop", value) for value in ("", ["a"] * 5, [1], [""], "x" * 257, {"a": 1})),
        *(("stop_token_ids", value) for value in ([-1], ["a"], [0] * 257, 7)),
        *(("logit_bias", value) for value in ({"a": 1}, {"1": 101}, {"-1": 1}, [], {"1": "2"})),
        ("logit_bias", {str(id): 1 for id in range(MAX_LOGIT_BIAS + 1)}),
        ("logit_bias", {"1": True}),
        *(("stream", value) for value in (1, "true")),
        *(("stream_options", value) for value in ({"what": 1}, 3)),
        *(("priority", value) for value in (-1001, 1001, 0.5, "1", True)),
        ("user", "x" * 2000),
        ("model", 3),
    ],
)
@pytest.mark.parametrize("parse", [chat, completion])
def test_values_out_of_bounds_are_refused_by_name(parse: Any, field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**{field: value})
    assert caught.value.param is not None and caught.value.param.startswith(field)
    assert caught.value.message.startswith(field)
    assert ", got " in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("messages", value) for value in ([], "hi", [1], [{"role": "user"}], {})),
        ("messages", [{"role": "wizard", "content": "a"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "function", "content": "a", "name": "f"}]),
        ("messages", [{"role": "tool", "content": "a"}]),
        ("messages", [{"role": "tool", "tool_call_id": "1"}]),
        ("messages", [{"role": "user", "content": "a", "tool_calls": [CALL]}]),
        ("messages", [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]),
        ("messages", [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
        *(("top_logprobs", value) for value in (-1, 21, 1)),
        ("logprobs", 1),
        *(("response_format", {"type": kind}) for kind in ("json_object", "json_schema", "x")),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("store", True),
        ("service_tier", "priority"),
        ("metadata", {"a": 1}),
        ("metadata", {str(n): "a" for n in range(17)}),
        ("chat_template_kwargs", {"a": "x" * 70_000}),
        ("chat_template_kwargs", {str(n): 1 for n in range(33)}),
        ("add_generation_prompt", "yes"),
        ("max_completion_tokens", 0),
    ],
)
def test_chat_fields_out_of_bounds_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**{field: value})
    assert caught.value.param is not None and caught.value.param.startswith(field)


@pytest.mark.parametrize("value", [[], {}, 5, [1, "a"], [[1], "a"], [["a"]], [[1.5]], [True], ""])
def test_prompts_of_other_kinds_are_refused(value: Any) -> None:
    if value == "":
        assert completion(prompt="").prompt == [""]  # refused later: it has no token
        return
    with pytest.raises(RequestError) as caught:
        completion(prompt=value)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_four_forms_of_prompts(given: Any, prompts: Any) -> None:
    assert completion(prompt=given).prompt == prompts


@pytest.mark.parametrize("name", [*UNSUPPORTED, "no_such_thing"])
def test_what_is_not_supported_is_refused_and_null_is_absent(name: str) -> None:
    for parse in (chat, completion):
        parse(**{name: None})
        if name == "echo" and parse is completion:
            continue
        with pytest.raises(RequestError) as caught:
            parse(**{name: {"some": "value"}})
        assert caught.value.param == name
        assert name in caught.value.message and "some" in caught.value.message


def test_a_value_that_asks_for_nothing_is_let_through() -> None:
    chat(tool_choice="none", response_format={"type": "text"}, modalities=["text"], store=False)
    chat(tools=[], functions=[], tool_choice="auto", function_call="auto", documents=[])
    chat(parallel_tool_calls=True)
    chat(parallel_tool_calls=False)
    completion(best_of=1, echo=False)
    for name, value in (
        *(("best_of", True), ("best_of", 2)),
        *(("tool_choice", "required"), ("tools", [{}]), ("tools", {}), ("documents", [{}])),
        *(("functions", [{}]), ("parallel_tool_calls", 1)),
    ):
        with pytest.raises(RequestError, match=name):
            completion(**{name: value})
        with pytest.raises(RequestError, match=name):
            chat(**{name: value})


def test_null_is_absent_everywhere() -> None:
    for body in (ChatBody, CompletionBody):
        required = {"messages": MESSAGES} if body is ChatBody else {"prompt": "hi"}
        fields = {name: None for name in body.model_fields} | required
        assert body.parse(json.dumps(fields).encode()) == body.parse(json.dumps(required).encode())


def test_extra_keys_inside_messages_are_tolerated() -> None:
    message = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
        "function_call": None,
        "reasoning_content": "hm",
    }
    assert chat(messages=[message, *MESSAGES]).messages[0].content is None
    odd = {"role": "user", "content": "a", "tool_calls": [], "tool_call_id": 5, "weight": 1}
    assert chat(messages=[odd | {"reasoning_content": 7}]).messages[0].tool_call_id is None


def test_developers_are_system_to_the_template() -> None:
    body = chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}]}])
    assert body.messages[0].for_template({}) == {"role": "system", "content": ["a"]}


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"nonsense", b"[]", b"3", b'{"messages": ', b"\xff", b"[" * 100_000, b"{}{}"),
        *(b'{"prompt": "a", "top_p": %s}' % x for x in (b"NaN", b"Infinity", b"-Infinity")),
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "logit_bias": {"1": NaN}}',
        b'{"prompt": "a", "chat_template_kwargs": {"x": [1e999]}}',
    ],
)
@pytest.mark.parametrize("body", [ChatBody, CompletionBody, TokenizeBody])
def test_what_is_no_json_object_with_finite_numbers_is_refused(
    body: type[Body], data: bytes
) -> None:
    with pytest.raises(RequestError):
        body.parse(data)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stream_options": {}}, "stream_options"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=", got ") as caught:
        completion(**fields)
    assert caught.value.param == named


@pytest.mark.parametrize("body", [TokenizeBody, ContextBody])
@pytest.mark.parametrize("given", ["neither", "both"])
def test_a_text_or_messages(body: type[Body], given: str) -> None:
    name = "prompt" if body is TokenizeBody else "text"
    fields = {name: "a", "messages": MESSAGES} if given == "both" else {}
    with pytest.raises(RequestError, match=f", got {given}$") as caught:
        body.parse(json.dumps(fields).encode())
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages: at least 1 items, got 0"),
        ({"messages": [1]}, "messages[0]: must be an object, got 1"),
        ({"stop_token_ids": [0] * 257}, "stop_token_ids: at most 256 items, got 257"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata: at most 16 items, got 17"),
        ({"user": "x" * 1025}, "user: at most 1024 characters, got 1025"),
        ({"cache_salt": ""}, "cache_salt: at least 1 characters, got 0"),
        ({"stream_options": "x"}, 'stream_options: must be an object, got "x"'),
        (
            {"response_format": {"type": "text", "x": 1}},
            "response_format.x: unknown parameter, got 1",
        ),
        (
            {"top_logprobs": 3},
            "top_logprobs is only allowed with logprobs = true, got 3 with logprobs = false",
        ),
    ],
)
def test_limits_are_told_with_what_was_given(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.message == said


def test_messages_and_parts_are_bounded() -> None:
    part = {"type": "text", "text": "a"}
    chat(messages=MESSAGES * MAX_MESSAGES)
    chat(messages=[{"role": "user", "content": [part] * MAX_PARTS}])
    for messages, field, limit in (
        (MESSAGES * (MAX_MESSAGES + 1), "messages", MAX_MESSAGES),
        ([{"role": "user", "content": [part] * (MAX_PARTS + 1)}], "messages[0].content", MAX_PARTS),
    ):
        with pytest.raises(RequestError) as caught:
            chat(messages=messages)
        assert caught.value.param == field
        assert f"at most {limit} " in caught.value.message
        assert f"got {limit + 1}" in caught.value.message


def test_a_million_wrong_items_make_one_short_error() -> None:
    for field, parse in (("messages", chat), ("prompt", completion), ("stop_token_ids", chat)):
        with pytest.raises(RequestError) as caught:
            parse(**{field: [None] * 200_000})
        assert len(caught.value.message) < 500
