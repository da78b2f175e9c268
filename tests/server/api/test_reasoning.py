"""Reasoning told apart from the answer: however it is cut, opened, stopped or never closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.reasoning import CLOSE, OPEN, Reasoning
from server.api.tokenizer import Tokenizer
from server.cli import main
from tests.server.api.checkpoint import TEMPLATE, write_checkpoint
from tests.server.api.live import Live, in_thread
from tests.server.api.test_chat import events

OPENS = TEMPLATE.replace("'<|assistant|>'", "'<|assistant|><think>\\n'")
SKIPS = TEMPLATE.replace("'<|assistant|>'", "'<|assistant|><think>\\n\\n</think>\\n\\n'")
TEXTS = st.lists(
    st.sampled_from([OPEN, CLOSE, "<thi", "nk>", "</", "think>", "<", " ", "\n", "a", "é"]),
    max_size=10,
).map("".join)


def whole(text: str, inside: bool) -> tuple[str, str]:
    """Reasoning and answer of a whole reply."""
    if not inside:
        if not text.lstrip().startswith(OPEN):
            return "", text
        text = text.lstrip()[len(OPEN) :]
    thought, tag, answer = text.partition(CLOSE)
    if not tag:
        return thought.lstrip(), ""
    return thought.strip(), answer.lstrip()


def split(pieces: list[str], inside: bool) -> tuple[str, str]:
    reasoning = Reasoning(inside=inside)
    parts = [reasoning.push(piece) for piece in pieces]
    for thought, said in parts:  # a piece of the answer comes after all reasoning
        assert not said or reasoning.state == "after" or not thought
    parts.append(reasoning.flush())
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@given(TEXTS, st.booleans(), st.lists(st.integers(0, 40), max_size=8))
def test_any_cut_is_split_like_the_whole(text: str, inside: bool, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert split(pieces, inside) == whole(text, inside)
    assert split(list(text), inside) == whole(text, inside)


def test_nothing_is_held_back_that_can_be_told() -> None:
    reasoning = Reasoning(inside=False)
    steps = [("<th", ("", "")), ("ink>\nso", ("so", "")), (" </", ("", "")), ("b", (" </b", ""))]
    steps += [("\n</think", ("", "")), (">", ("", "")), ("\n", ("", "")), ("Yes.", ("", "Yes."))]
    for text, told in steps:
        assert reasoning.push(text) == told
    assert reasoning.end == len("<think>\nso </b\n</think>")
    assert Reasoning(inside=False).push("Hi <think>") == ("", "Hi <think>")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("thinking")
    paths = {
        name: write_checkpoint(directory / name, template)
        for name, template in (("plain", TEMPLATE), ("opens", OPENS), ("skips", SKIPS))
    }
    template = "<think>hm</think>{{ messages[0].content }}<|end|>"
    paths["special"] = write_checkpoint(directory / "special", template)
    spec = json.loads((paths["special"] / "tokenizer.json").read_text())
    for id, tag in ((261, OPEN), (262, CLOSE)):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": id, "content": tag})
    (paths["special"] / "tokenizer.json").write_text(json.dumps(spec))
    return paths


@pytest.fixture(scope="module")
def think(paths: dict[str, Path]) -> Iterator[Live]:
    """A model that repeats the prompt, taken for one that may open a block itself."""
    with in_thread(paths["plain"], "--echo", reasoning_parser="think") as live:
        yield live


@pytest.fixture(scope="module")
def opens(paths: dict[str, Path]) -> Iterator[Live]:
    """One whose template opens the block."""
    with in_thread(paths["opens"], "--echo") as live:
        yield live


def both_ways(live: Live, content: str, **options: Any) -> dict[str, Any]:
    """What a request is told, streamed and whole, which must be the same."""
    body = live.chat(content, **options).json()
    (choice,) = body["choices"]
    usage = {"stream_options": {"include_usage": True}}
    chunks = events(live.chat(content, stream=True, **usage, **options).text)
    for told in (last := chunks.pop()["usage"], body["usage"]):
        del told["prompt_tokens_details"]  # the second time the prompt is known
    assert last == body["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    deltas = [each["delta"] for each in choices]
    for delta in deltas:
        assert not (delta.get("content") and delta.get("reasoning_content"))
    message = choice["message"]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == (
        message["reasoning_content"] or ""
    )
    assert "".join(d.get("content", "") for d in deltas) == message["content"]
    assert choices[-1]["finish_reason"] == choice["finish_reason"]
    assert choices[-1]["stop_reason"] == choice["stop_reason"]
    assert all(each["finish_reason"] is None for each in choices[:-1])
    return {
        "reasoning": message["reasoning_content"],
        "content": message["content"],
        "finish": choice["finish_reason"],
        "stop": choice["stop_reason"],
        "tokens": body["usage"]["completion_tokens_details"]["reasoning_tokens"],
    }


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ("<think>\nhm é\n</think>\n\nYes", {}, ("hm é", "Yes", "stop", None)),
        ("No <think>tag</think>", {}, (None, "No <think>tag</think>", "stop", None)),
        ("<think>hm", {}, ("hm", "", "stop", None)),
        ("<think>hm", {"max_tokens": 9}, ("h", "", "length", None)),
        ("<think>hm</think>Yes", {"max_tokens": 17}, ("hm</think", "", "length", None)),
        ("<think>a</think>b</think>", {}, ("a", "b</think>", "stop", None)),
        ("<think></think>b", {}, (None, "b", "stop", None)),
        ("<think>hm</think>Yes", {"stop": "es"}, ("hm", "Y", "stop", "es")),
        ("<think>hm</think>Yes", {"stop": "</th"}, ("hm", "", "stop", "</th")),
        ("<think>hm</think>Yes", {"stop": "k>Y"}, ("hm</thin", "", "stop", "k>Y")),
        ("<think>hm</think>Yes", {"stop": "think>"}, (None, "<", "stop", "think>")),
        ("<think>hm</think>Yes", {"stop": "hm</think>Yes, no"}, ("hm", "Yes", "stop", None)),
        (
            "<think>hm</think>Yes",
            {"stop": "</think>", "include_stop_str_in_output": True},
            ("hm", "", "stop", "</think>"),
        ),
    ],
)
def test_a_reply_that_thinks(
    think: Live, content: str, options: dict[str, Any], told: tuple[Any, ...]
) -> None:
    got = both_ways(think, content, **options)
    assert (got["reasoning"], got["content"], got["finish"], got["stop"]) == told


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("<think>\nhm\n</think>\n\nYes", 1 + len("<think>\nhm\n</think>")),
        ("<think>hm", 1 + len("<think>hm") + 1),
        ("Yes", 0),
        (" <think", 0),
    ],
)
@pytest.mark.parametrize("stop", [None, "hm\n</think>\n\nYes, no", "zzz"])
def test_reasoning_tokens_are_counted(
    think: Live, content: str, tokens: int, stop: str | None
) -> None:
    """A token a byte; the reply begins with the echoed control token, which counts to it."""
    assert both_ways(think, content, stop=stop)["tokens"] == tokens


def test_the_template_opens_the_block(opens: Live) -> None:
    got = both_ways(opens, "so it is</think>\n\nYes")
    assert (got["reasoning"], got["content"]) == ("so it is", "Yes")
    assert got["tokens"] == 1 + len("so it is</think>")
    got = both_ways(opens, "on and on")
    assert (got["reasoning"], got["content"], got["tokens"]) == ("on and on", "", 11)


def test_the_template_closes_it_again(paths: dict[str, Path]) -> None:
    with in_thread(paths["skips"], "--echo") as live:
        got = both_ways(live, "so it is</think>Yes")
        assert (got["reasoning"], got["content"]) == (None, "so it is</think>Yes")


def test_a_message_that_is_continued(think: Live) -> None:
    """The reply goes on inside of what the last message has opened."""
    for last, reasoning in (("<think>so", True), ("<think>so</think>ok", False), ("so", False)):
        messages = [
            {"role": "user", "content": "hm"},
            {"role": "assistant", "content": last},
        ]
        response = think.http.post(
            "/v1/chat/completions",
            json={"messages": messages, "continue_final_message": True, "max_tokens": 3},
        )
        message = response.json()["choices"][0]["message"]
        assert (message["reasoning_content"] == "hm") is reasoning
        assert (message["content"] == "hm") is not reasoning


def test_a_users_tag_at_the_end_of_a_prompt_opens_nothing(think: Live) -> None:
    got = both_ways(think, "hm<think>")
    assert (got["reasoning"], got["content"]) == (None, "hm<think>")


def test_tags_that_are_special_tokens(paths: dict[str, Path]) -> None:
    """They are not shown as such, and still seen."""
    with in_thread(paths["special"], "--echo") as live:
        got = both_ways(live, "Yes")
        assert (got["reasoning"], got["content"], got["tokens"]) == ("hm", "Yes", 4)
        raw = live.complete([261, *b"hm", 262, *b"Yes", 260]).json()["choices"][0]
        assert raw["text"] == "hmYes"


@pytest.mark.parametrize("stop", [None, "hm</think>Yes, no"])
def test_log_probabilities_stay_aligned(think: Live, stop: str | None) -> None:
    """One entry a token, in order, streamed as whole; each piece's entries spell its tokens."""
    options = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "stop": stop}
    content = "<think>hm</think>Yes"
    choice = think.chat(content, **options).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    spelt = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert spelt == b"<|user|>" + content.encode() + b"<|end|>"
    assert len(choice["token_ids"]) == len(entries)
    chunks = [
        chunk["choices"][0] for chunk in events(think.chat(content, stream=True, **options).text)
    ]
    assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == entries
    for chunk in chunks:
        assert len(chunk["token_ids"]) == len(chunk["logprobs"]["content"])
    answers = [chunk for chunk in chunks if chunk["delta"].get("content")]
    spelt = b"".join(bytes(e["bytes"]) for c in answers for e in c["logprobs"]["content"])
    # nothing of the reasoning but the end of its tag; the token that ends the reply may come in a
    # chunk of its own
    before = spelt.removesuffix(b"<|end|>").removesuffix(b"Yes")
    assert (spelt and b"</think>".endswith(before)) or stop is not None


def test_several_choices_think_each_for_itself(think: Live) -> None:
    body = think.chat("<think>hm</think>Yes", n=3).json()
    for choice in body["choices"]:
        assert choice["message"]["reasoning_content"] == "hm"
        assert choice["message"]["content"] == "Yes"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3 * 18}


def test_openais_client_sees_it(think: Live) -> None:
    ask: Any = {
        "model": think.model,
        "messages": [{"role": "user", "content": "<think>hm</think>Yes"}],
    }
    made = think.openai.chat.completions.create(**ask)
    message = made.choices[0].message
    assert message.content == "Yes"
    assert message.model_extra is not None and message.model_extra["reasoning_content"] == "hm"
    assert made.usage is not None and made.usage.completion_tokens_details is not None
    assert made.usage.completion_tokens_details.reasoning_tokens == 18
    thought = said = ""
    for chunk in think.openai.chat.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            thought += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            said += choice.delta.content or ""
    assert (thought, said) == ("hm", "Yes")


def test_turned_off_all_is_text(paths: dict[str, Path]) -> None:
    with in_thread(paths["opens"], "--echo", reasoning_parser="none") as live:
        body = live.chat("a</think>b").json()
        assert body["choices"][0]["message"] == {
            "role": "assistant",
            "content": "a</think>b",
            "refusal": None,
        }
        assert "completion_tokens_details" not in body["usage"]


def test_who_thinks_is_seen_by_template_or_tokenizer(paths: dict[str, Path]) -> None:
    thinks = {name: Tokenizer(path).thinks for name, path in paths.items()}
    assert thinks == {"plain": False, "opens": True, "skips": True, "special": True}


def test_the_setting_is_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--reasoning-parser", "deepseek"])
    assert "reasoning-parser" in capsys.readouterr().err
