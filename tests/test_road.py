"""The whole road: the real command, the real engine, the bundled model, OpenAI's own client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
import torch

from model.bundled.facts import Case, Library, case

ROOT = Path(__file__).parent.parent
NOWHERE = Library([])  # no books: made-up sentences


class Server:
    """`steadystate serve` as a user starts it, on a free port."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, f"no line that says where it serves: {line!r}"
        self.url = found[0] + "/v1"
        self._rest = threading.Thread(target=self.process.stdout.read)
        self._rest.start()

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            self._rest.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server("--max-running", "16", "--threads", str(min(2, os.cpu_count() or 1)))
    yield server
    assert server.stop() == 0


def cases(count: int, size: int) -> list[Case]:
    rng = Random(17)
    forms = ("single", "follow-up", "nameless")
    return [case(rng, NOWHERE, size=size, facts=1 + i % 4, form=forms[i % 3]) for i in range(count)]


def body(asked: Case, **more: Any) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.content} for m in asked.messages]
    return {"model": "recall", "messages": messages, "temperature": 0, **more}


async def ask_all(server: Server, asked: list[Case], width: int) -> list[str]:
    """Answers in order, `width` requests at a time."""
    gate = asyncio.Semaphore(width)
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

        async def one(item: Case) -> str:
            async with gate:
                made = await client.chat.completions.create(**body(item))
            assert made.choices[0].finish_reason == "stop"
            return made.choices[0].message.content or ""

        return list(await asyncio.gather(*(one(item) for item in asked)))


def test_the_readmes_question_is_answered(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    content = re.search(r'"content": "(It was a cold[^"]*)"', (ROOT / "README.md").read_text())
    assert content
    made = client.chat.completions.create(
        model="recall", temperature=0, messages=[{"role": "user", "content": content[1]}]
    )
    assert "71432" in (made.choices[0].message.content or "")


def test_it_recalls_and_a_batch_answers_as_each_alone(server: Server) -> None:
    """More requests than slots, of unequal lengths: all are served, most right, and the same."""
    asked = [*cases(15, 900), *cases(9, 2048)]
    together = asyncio.run(ask_all(server, asked, width=len(asked)))
    alone = asyncio.run(ask_all(server, asked, width=1))
    assert together == alone
    right = sum(item.number in answer for item, answer in zip(asked, together, strict=True))
    assert right >= 21, f"{right} of {len(asked)}"


def test_a_stream_says_the_same(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    asked = cases(1, 600)[0]
    whole = client.chat.completions.create(**body(asked)).choices[0].message.content
    pieces = []
    for chunk in client.chat.completions.create(**body(asked, stream=True)):
        pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    assert "".join(pieces) == whole
    # a GPU draws several while one is on its way
    assert len(pieces) > (1 if torch.cuda.is_available() else 10)


def test_a_follow_up_in_a_conversation(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    text = (
        "The wind had dropped by evening and the boats lay still. The locker number of Fepe is "
        "808018. A boy went along the wall with a lantern. The room code of Alice is 5521. "
        "Then it grew dark. What is the locker number of Fepe?"
    )
    messages: list[Any] = [{"role": "user", "content": text}]
    first = client.chat.completions.create(model="recall", messages=messages, temperature=0)
    assert "808018" in (first.choices[0].message.content or "")
    messages.append(first.choices[0].message.model_dump(exclude_none=True))
    messages.append({"role": "user", "content": "What is the room code of Alice?"})
    second = client.chat.completions.create(model="recall", messages=messages, temperature=0)
    assert "5521" in (second.choices[0].message.content or "")


def test_seeds_repeat_in_any_company(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)

    def texts(n: int) -> list[str]:
        made = client.completions.create(
            model="recall", prompt="The boats", max_tokens=12, temperature=1.2, seed=4, n=n
        )
        return [choice.text for choice in made.choices]

    assert texts(1)[0] == texts(5)[0]
    assert len(set(texts(5))) > 1


def test_a_context_is_read_once_and_outlives_the_server(tmp_path: Path) -> None:
    """A text as a context: answers are those of the whole prompt, before and after a restart."""
    flags = ["--context-directory", str(tmp_path), "--max-running", "4", "--threads", "1"]
    asked = cases(1, 1500)[0]
    document, question = asked.messages[0].content[:1400], asked.messages[0].content[1400:]
    messages: list[Any] = [{"role": "system", "content": document}]
    answers = []
    for life in range(2):
        server = Server(*flags)
        try:
            client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
            if life == 0:
                made = client.post("/contexts", body={"messages": messages}, cast_to=object)
            assert isinstance(made, dict)
            user = {"role": "user", "content": question}
            for body in (
                {"messages": [*messages, user], "extra_body": {"cache_salt": f"cold {life}"}},
                {"messages": [user], "extra_body": {"context": made["id"]}},
            ):
                answer = client.chat.completions.create(
                    model="recall", temperature=0, logprobs=True, max_tokens=30, **body
                )  # type: ignore[call-overload]
                said = answer.choices[0]
                answers.append([entry.logprob for entry in said.logprobs.content])
                cached = answer.usage.prompt_tokens_details.cached_tokens
                assert cached == (made["tokens"] if "context" in body["extra_body"] else 0)
        finally:
            assert server.stop() == 0
    for other in answers[1:]:
        assert other == pytest.approx(answers[0], abs=1e-4)
