"""Conversations over HTTP: a turn reads what is new in it, whatever the template does."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from server.engine.chain import common
from tests.server.api.checkpoint import END, TEMPLATE, write_checkpoint
from tests.server.api.live import Live, in_thread

FORGETS = (  # what an assistant thought, once a user has answered
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
MOVES = (  # the tools to before the last message
    "{% for m in messages %}{% if loop.last and tools %}{{ '<|system|>' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look something up", "parameters": {}},
}


def ids(live: Live, messages: list[Any], **more: Any) -> list[int]:
    body = {"messages": messages, "add_generation_prompt": True, **more}
    answer = live.http.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["tokens"])


@pytest.mark.parametrize(
    ("template", "more"),
    [(TEMPLATE, {}), (FORGETS, {}), (MOVES, {"tools": [TOOL]})],
    ids=["plain", "forgets", "moves"],
)
def test_a_turn_reads_what_is_new(tmp_path: Path, template: str, more: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path / "tiny", template)
    messages: list[dict[str, str]] = [
        {"role": "system", "content": "Answer from what you were told, and from nothing else."}
    ]
    asked: list[bytes] = []
    with in_thread(path, "--echo") as live:
        for turn in range(5):
            messages.append({"role": "user", "content": f"Question {turn} of many is what comes?"})
            tokens = ids(live, messages, **more)
            answer = live.http.post(
                "/v1/chat/completions", json={"messages": messages, "max_tokens": 2, **more}
            ).json()
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert usage["prompt_tokens"] == len(tokens)
            ends = [at + 1 for at, token in enumerate(tokens) if token == END]
            data = array("i", tokens).tobytes()
            shared = max((common(data, other) for other in asked), default=0)
            known = max((end for end in ends if end <= shared), default=0)
            assert known <= cached <= shared, turn
            assert (known > 0) == (turn > 0)
            asked.append(data)
            said = (
                f"<think>Let me see about {turn}.</think>It is the answer of turn {turn}, no less."
            )
            messages.append({"role": "assistant", "content": said})
    if template is not MOVES:  # all but this turn's question and the answer before it
        assert len(tokens) - cached < 130
