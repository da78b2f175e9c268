"""Tools on their way to the template: schema-checked, bounded, and never control tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from server.api import limits
from server.api.schemas import ChatBody, for_template
from server.api.tokenizer import Tokenizer
from server.errors import RequestError
from tests.server.api.checkpoint import SPECIALS, USER, write_checkpoint
from tests.server.api.live import Live, in_thread

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}"
    "{% if m.role == 'tool' %}{{ m.name }}={% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }}"
    " {{ c.function.arguments.city }} {{ c.function.arguments | tojson }}]{% endfor %}<|end|>"
    "{% endfor %}{% if reasoning_effort %}effort {{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
ASK = [{"role": "user", "content": "hi"}]
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Bath"}'},
}
TURN = [
    {"role": "user", "content": "How is Bath?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "wet"},
]


def parse(**fields: Any) -> ChatBody:
    return ChatBody.parse(json.dumps({"messages": ASK, **fields}).encode())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tools") / "tiny", TEMPLATE)


@pytest.fixture(scope="module")
def live(path: Path) -> Iterator[Live]:
    """A model that repeats its prompt: what it says is what the template wrote."""
    with in_thread(path, "--echo") as live:
        yield live


def said(made: Any) -> str:
    """The whole prompt, control tokens and all."""
    return str(made.choices[0].message.content)


def all_of(live: Live, messages: list[Any], **options: Any) -> str:
    """What the template wrote, by OpenAI's own client."""
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    size = live.http.post("/tokenize", json={"messages": messages, **options}).json()["count"]
    made = live.openai.chat.completions.create(
        model=live.model, messages=messages, extra_body=extra, max_tokens=size, **options
    )
    assert made.usage is not None and made.usage.prompt_tokens == size
    return said(made)


def test_tools_reach_the_template(live: Live) -> None:
    text = all_of(live, ASK, tools=[WEATHER])
    assert text == json.dumps(WEATHER) + "\n<|user|>hi<|end|><|assistant|>"
    assert all_of(live, ASK, tools=[WEATHER], tool_choice="auto") == text


def test_with_tool_choice_none_the_model_hears_of_none(live: Live) -> None:
    made = live.openai.chat.completions.create(
        model=live.model, messages=ASK, tools=[WEATHER], tool_choice="none"
    )
    assert said(made) == "hi"
    assert made.usage is not None and made.usage.prompt_tokens == 5


def test_calls_and_their_results_reach_the_template(live: Live) -> None:
    text = all_of(live, TURN, tools=[WEATHER])
    assert text.endswith(
        "<|user|>How is Bath?<|end|>"
        '<|assistant|>[call_1 get_weather Bath {"city": "Bath"}]<|end|>'
        "<|user|>get_weather=wet<|end|><|assistant|>"
    )
    parts = [TURN[0], TURN[1], TURN[2] | {"content": [{"type": "text", "text": "wet"}]}]
    assert all_of(live, parts, tools=[WEATHER]) == text


def test_reasoning_of_earlier_turns_reaches_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", template))
    body = parse(messages=[{"role": "assistant", "content": "a", "reasoning_content": "<|end|>"}])
    ids = asyncio.run(
        tokenizer.encode_chat(for_template(body.messages), add_generation_prompt=True)
    )
    assert ids.tolist() == [*b"<|end|>|a"]


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        TEMPLATE.replace("| tojson", "| tojson(ensure_ascii=True)"),
        TEMPLATE.replace("t | tojson", "t | tojson(indent=2)"),
    ],
)
def test_control_tokens_in_tools_calls_and_results_are_text(tmp_path: Path, template: str) -> None:
    """In names, descriptions, keys, values, arguments that spell them with escapes, and results."""
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", template))
    nasty = "".join(SPECIALS)
    escaped = '{"city": "\\u003c|end|>", "<|user|>": ["<|system|>"]}'
    tool = {
        "type": "function",
        "function": {
            "name": "f",
            "description": nasty,
            "parameters": {
                "properties": {nasty: {"enum": ["<|end|>"], "<|user|>": 1}},
                "required": [nasty],
            },
        },
    }
    call = {"id": nasty, "type": "function", "function": {"name": "f", "arguments": escaped}}
    body = parse(
        tools=[tool],
        messages=[
            {"role": "user", "content": nasty, "name": nasty},
            {"role": "assistant", "content": nasty, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": nasty, "content": nasty, "name": nasty},
        ],
    )
    ids = asyncio.run(
        tokenizer.encode_chat(
            for_template(body.messages),
            add_generation_prompt=True,
            tools=[tool.for_template() for tool in body.offered],
        )
    ).tolist()
    controls = [SPECIALS[id - 256] for id in ids if id >= 256]
    assert controls == [
        *("<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|user|>", "<|end|>"),
        "<|assistant|>",
    ]
    text = bytes(id for id in ids if id < 256).decode()
    described, rest = text.split("\n" + nasty, 1) if "indent" not in template else ("", text)
    assert nasty in rest and not any(ord(char) >= 0xE000 for char in text)
    if described:
        assert json.loads(described) == tool


def test_a_list_template_finds_the_name_in_the_part(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% for c in m.content %}{{ c.name }}:{{ c.text }}|{% endfor %}"
        "{% for c in m.tool_calls or [] %}{% endfor %}{% endfor %}"
    )
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", template))
    messages = for_template(parse(messages=TURN).messages)
    ids = asyncio.run(tokenizer.encode_chat(messages, add_generation_prompt=True))
    assert bytes(ids.tolist()) == b":How is Bath?|:|get_weather:wet|"


def test_a_named_template_for_tools_is_taken(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m")
    (path / "chat_template.jinja").unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | length }}<|user|>{{ messages[0].content }}"},
    ]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(path)

    def ids(*tools: Any) -> list[int]:
        made = tokenizer.encode_chat(ASK, add_generation_prompt=True, tools=tools)
        return asyncio.run(made).tolist()

    assert ids() == [*b"plainhi"]
    assert ids(WEATHER) == [*b"1", USER, *b"hi"]


def test_reasoning_effort_reaches_a_template_that_reads_it(live: Live, echo: Live) -> None:
    options: dict[str, Any] = {"ignore_eos": True, "max_tokens": 16}
    made = live.chat("a", reasoning_effort="high", **options).json()
    assert made["choices"][0]["message"]["content"] == "aeffort high"
    kwargs = {"chat_template_kwargs": {"reasoning_effort": "high"}}
    again = live.chat("a", **kwargs, **options).json()
    assert again["choices"][0]["message"] == made["choices"][0]["message"]
    assert live.chat("a", reasoning_effort="low", **kwargs).status_code == 400
    for effort in ("high", "none"):
        refused = echo.chat("a", reasoning_effort=effort)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "reasoning_effort"
    assert live.chat("a", reasoning_effort="herculean").json()["error"]["param"] == (
        "reasoning_effort"
    )


def test_what_the_template_would_pass_over_is_refused(echo: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools") as caught:
        echo.openai.chat.completions.create(model="org/tiny", messages=ASK, tools=[WEATHER])
    assert caught.value.param == "tools"
    messages: Any = TURN
    with pytest.raises(openai.BadRequestError, match="knows no tool_calls") as caught:
        echo.openai.chat.completions.create(model="org/tiny", messages=messages, stream=True)
    assert caught.value.param == "messages"
    for name in ("enable_thinking", "no|such.*thing", "x" * 10_000):
        refused = echo.chat("a", chat_template_kwargs={name: True})
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == "chat_template_kwargs"
        assert f"knows no {name[:100]}" in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_call_cannot_be_forced(live: Live, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be forced") as caught:
        live.openai.chat.completions.create(
            model=live.model, messages=ASK, tools=[WEATHER], tool_choice=choice, stream=True
        )
    assert caught.value.param == "tool_choice"


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": WEATHER["function"] | changes}  # type: ignore[operator]


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ({}, "tools"),
        ([1], "tools[0]"),
        ([{"function": {"name": "f"}}], "only tools of type 'function'"),
        ([{"type": "web_search"}], "only tools of type 'function'"),
        ([{"type": "function"}], "tools[0].function is required"),
        ([{"type": "function", "function": {}}], "tools[0].function.name is required"),
        ([function(name="a b")], "tools[0].function.name"),
        ([function(name="<|end|>")], "tools[0].function.name"),
        ([function(name="a" * 65)], "tools[0].function.name"),
        ([function(name="f\n")], "tools[0].function.name"),
        ([function(description=5)], "tools[0].function.description"),
        ([function(parameters=[])], "tools[0].function.parameters"),
        ([function(parameters={"type": "array"})], "type must be 'object'"),
        ([function(parameters={"properties": ["a"]})], "properties must be"),
        ([function(parameters={"properties": {"a": 5}})], "properties must be"),
        ([function(parameters={"required": "a"})], "required must be"),
        ([function(strict=True)], "tools[0].function.strict"),
        ([function(returns={})], "tools[0].function.returns"),
        ([WEATHER, WEATHER], "must differ"),
        ([function(name=f"f{i}") for i in range(limits.MAX_TOOLS + 1)], "at most 128 tools"),
        ([function(description="x" * limits.MAX_TOOLS_BYTES)], "at most 524288 bytes"),
        ([function(parameters=deep(100))], "nested at most 64 deep"),
        ([function(parameters=deep(400))], "nested at most 64 deep"),
    ],
)
def test_tools_out_of_bounds_are_refused_by_name(tools: Any, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(tools=tools)
    assert caught.value.param is not None and caught.value.param.startswith("tools")
    assert named in caught.value.message
    assert ", got " in caught.value.message or "required" in caught.value.message


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (5, "messages[0].tool_calls[0]"),
        (CALL | {"id": ""}, "messages[0].tool_calls[0].id"),
        (CALL | {"type": "custom"}, "messages[0].tool_calls[0].type"),
        ({"id": "1", "function": {"name": "f"}}, "function.arguments is required"),
        *(
            ({"id": "1", "function": {"name": "f", "arguments": arguments}}, "function.arguments")
            for arguments in ("{", "[]", "5", "nonsense", {}, '{"a": NaN}', '{"a": 1e999}', None)
        ),
        ({"id": "1", "function": {"name": "f", "arguments": json.dumps(deep(90))}}, "64 deep"),
    ],
)
def test_calls_that_are_none_are_refused_by_name(call: Any, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert caught.value.param is not None and caught.value.param.startswith("messages[0]")
    assert named in caught.value.message


def test_a_call_without_arguments(live: Live) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": ""}}
    body = parse(messages=[{"role": "assistant", "tool_calls": [call]}])
    (message,) = for_template(body.messages)
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_calls_are_counted() -> None:
    with pytest.raises(RequestError, match="tool_calls"):
        parse(messages=[{"role": "assistant", "tool_calls": [CALL] * 129}])


def test_one_call_at_a_time_cannot_be_promised() -> None:
    with pytest.raises(RequestError) as caught:
        parse(tools=[WEATHER], parallel_tool_calls=False)
    assert caught.value.param == "parallel_tool_calls"
    parse(tools=[WEATHER], parallel_tool_calls=False, tool_choice="none")
    parse(tools=[WEATHER], parallel_tool_calls=True)
    parse(parallel_tool_calls=False)


def test_template_arguments_are_not_nested_without_end() -> None:
    with pytest.raises(RequestError, match="nested at most 64 deep"):
        parse(chat_template_kwargs=deep(400))
