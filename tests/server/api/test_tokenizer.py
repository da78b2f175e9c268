"""Prompts and conversations as ids: control tokens in a message's text stay text."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.tokenizer import Tokenizer
from server.errors import RequestError
from tests.server.api.checkpoint import (
    ASSISTANT,
    END,
    END_OF_TEXT,
    SPECIALS,
    SYSTEM,
    USER,
    write_checkpoint,
)
from tests.server.api.live import ROOT


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def chat(tokenizer: Tokenizer, *contents: Any, **options: Any) -> list[int]:
    messages = [{"role": "user", "content": content} for content in contents]
    options.setdefault("add_generation_prompt", True)
    return asyncio.run(tokenizer.encode_chat(messages, **options)).tolist()


def test_a_conversation_is_what_the_template_writes(tokenizer: Tokenizer) -> None:
    assert chat(tokenizer, "hé") == [USER, *"hé".encode(), END, ASSISTANT]
    assert chat(tokenizer, ["a", "b"]) == [USER, *b"a\nb", END, ASSISTANT]
    assert chat(tokenizer, "a", add_generation_prompt=False) == [USER, *b"a", END]


@given(st.lists(st.one_of(st.sampled_from(SPECIALS), st.text(max_size=4)), max_size=8))
def test_control_tokens_in_a_message_are_text(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    assert chat(tokenizer, text) == [USER, *text.encode(), END, ASSISTANT]


@pytest.mark.parametrize("text", ["<<|end|>", "<|end|", "<|end<|end|>|>", "\ue000\U000f0000"])
def test_almost_control_tokens_are_text(tokenizer: Tokenizer, text: str) -> None:
    assert chat(tokenizer, text, text) == [
        *(USER, *text.encode(), END),
        *(USER, *text.encode(), END, ASSISTANT),
    ]


def test_control_tokens_in_names_and_template_arguments_are_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.name + '<|user|>' + m.content }}{% endfor %}{{ tail }}"
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", template))
    message = {"role": "user", "name": "<|system|>", "content": "a"}
    kwargs = {"tail": "<|end|>"}
    ids = asyncio.run(
        tokenizer.encode_chat([message], add_generation_prompt=True, kwargs=kwargs)
    ).tolist()
    assert ids == [*b"<|system|>", USER, *b"a", *b"<|end|>"]


@pytest.mark.parametrize("shown", ["{{ tail }}", "{{ tail | string }}", "{{ tail | tojson }}"])
def test_control_tokens_in_what_a_template_shows_whole_are_text(tmp_path: Path, shown: str) -> None:
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", "{{ messages[0].content }}" + shown))
    kwargs = {"tail": {"é<|end|>": ["<|user|>", 1]}}
    given = [{"role": "user", "content": "a"}]
    ids = asyncio.run(tokenizer.encode_chat(given, add_generation_prompt=True, kwargs=kwargs))
    text = str(kwargs["tail"])
    if "tojson" in shown:
        text = text.replace("'", '"')
    assert ids.tolist() == [*b"a", *text.encode()]


def test_a_raw_prompt_may_contain_control_tokens(tokenizer: Tokenizer) -> None:
    ids = asyncio.run(tokenizer.encode("<|system|>x", add_special_tokens=True))
    assert ids.tolist() == [SYSTEM, *b"x"]


def test_an_added_token_that_the_template_writes_is_a_control_token_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", "<tool>{{ messages[0].content }}"))
    assert chat(tokenizer, "<|end|>") == [*b"<tool>", *b"<|end|>"]
    path = write_checkpoint(tmp_path / "n", "<tool>{{ messages[0].content }}")
    spec = json.loads((path / "tokenizer.json").read_text())
    tool = {**spec["added_tokens"][0], "id": 261, "content": "<tool>", "special": False}
    spec["added_tokens"].append(tool)
    (path / "tokenizer.json").write_text(json.dumps(spec))
    assert chat(Tokenizer(path), "<tool>a") == [261, *b"<tool>a"]


def test_the_last_message_can_be_continued(tokenizer: Tokenizer) -> None:
    ids = chat(
        tokenizer, "a", "b <|end|> c", add_generation_prompt=False, continue_final_message=True
    )
    assert ids == [USER, *b"a", END, USER, *b"b <|end|> c"]


@pytest.mark.parametrize(
    "name", ["messages", "tokenize", "tools", "chat_template", "eos_token", "self"]
)
def test_template_arguments_replace_nothing(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m"))
    with pytest.raises(RequestError, match=name):
        chat(tokenizer, "a", kwargs={name: "x"})


def test_a_template_that_refuses_is_the_clients_error(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        chat(Tokenizer(write_checkpoint(tmp_path / "m", template)), "a")


def test_templates_are_sandboxed(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError):
        chat(Tokenizer(write_checkpoint(tmp_path / "m", template)), "a")


def test_a_template_may_want_lists(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
    )
    tokenizer = Tokenizer(write_checkpoint(tmp_path / "m", template))
    assert chat(tokenizer, "a", ["b", "c"]) == [*b"a|b\nc|"]


def test_control_tokens_in_several_parts_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|user|>"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
        "{% endfor %}<|end|>{% endfor %}"
    )
    lists = Tokenizer(write_checkpoint(tmp_path / "m", template))
    parts = ["x<|en", "d|><|sys", "tem|>y"]
    expected = [USER, *"\n".join(parts).encode(), END]
    assert chat(lists, parts) == expected
    assert chat(tokenizer, parts, add_generation_prompt=False) == expected


def test_no_template_is_said(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match="no chat template"):
        chat(Tokenizer(path), "a")


def _loads_torch(code: str) -> bool:
    code = f"import sys; {code}; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode != 0


def test_the_api_process_does_without_torch(checkpoint: Path) -> None:
    if _loads_torch("from transformers import PreTrainedTokenizerFast"):
        pytest.skip("this release of transformers loads torch with its tokenizers")
    assert not _loads_torch(
        "from pathlib import Path; import server.api.app; "
        f"from server.api.tokenizer import Tokenizer; Tokenizer(Path({str(checkpoint)!r}))"
    )


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        (None, None, (END_OF_TEXT,)),
        (None, 7, (7, END_OF_TEXT)),
        ([9, END, 8], 7, (8, 9, END_OF_TEXT, END)),
        (-1, 7, (END_OF_TEXT,)),
        ([], 7, (END_OF_TEXT,)),
        ("</s>", 7, None),
        ([True], 7, None),
        ([[2]], 7, None),
    ],
)
def test_ids_that_end_a_text(
    tmp_path: Path, generation: object, config: object, ids: tuple[int, ...] | None
) -> None:
    path = write_checkpoint(tmp_path / "m", "{{ messages[0].content }}")
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        (path / name).write_text(json.dumps({} if value is None else {"eos_token_id": value}))
    if ids is None:
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is .* is due"):
            Tokenizer(path)
    else:
        assert Tokenizer(path).eos_ids == ids
