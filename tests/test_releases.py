"""Each family as released, through the whole road: convert, serve, complete, chat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.api.service import Service
from server.cli import main
from server.settings import Settings
from tests.model.checkpoints.formulas import Oracle
from tests.releases import RELEASES, Release
from tests.server.api.live import Live, serving

SYSTEM, USER = {"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}


@dataclass(frozen=True)
class Served:
    """A release behind HTTP, the real engine at work, and what it should say."""

    release: Release
    live: Live
    oracle: Oracle

    def continuation(self, ids: list[int], count: int) -> list[int]:
        """The most probable tokens after ids, by the oracle."""
        for _ in range(count):
            ids = [*ids, int(self.oracle(ids)[-1].argmax())]
        return ids[-count:]

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        reply = self.live.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        made: dict[str, Any] = reply.json()
        return made


@pytest.fixture(scope="module", params=RELEASES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path: Path = tmp_path_factory.mktemp("releases") / request.param
    release = RELEASES[request.param]
    oracle = release.write(path)
    if release.convert:
        source, path = path, path.with_name("converted")
        assert main(["convert", str(source), str(path)]) == 0
    settings = Settings(
        model=str(path),
        served_model_name=request.param,
        device="cpu",
        threads=1,
        max_running=4,
        state_memory_gb=0.02,
        max_step_tokens=64,
    )
    with serving(Service(settings)) as live:
        yield Served(release, live, oracle)


def test_a_completion_is_the_oracles(served: Served) -> None:
    """A prompt of more than one step, its greedy continuation, and log-probabilities of it."""
    prompt = "The state is a slot of fixed size. " * 3
    ids = served.post("/tokenize", prompt=prompt)["tokens"]
    made = served.post(
        "/v1/completions",
        prompt=prompt,
        max_tokens=6,
        temperature=0,
        ignore_eos=True,
        logprobs=2,
        return_token_ids=True,
    )
    (choice,) = made["choices"]
    assert choice["token_ids"] == served.continuation(ids, 6)
    assert made["usage"]["prompt_tokens"] == len(ids)
    want = served.oracle(ids)[-1].log_softmax(-1).max()
    assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(float(want), abs=1e-4)
    text = served.post("/detokenize", tokens=[*ids, *choice["token_ids"]])["prompt"]
    assert text == prompt + choice["text"]


def test_a_chat_is_as_its_template_has_it(served: Served) -> None:
    body = {"messages": [SYSTEM, USER]}
    if served.release.chat is None:
        reply = served.live.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400 and "no chat template" in reply.text
        return
    ids = served.post("/tokenize", **body)["tokens"]
    assert served.post("/detokenize", tokens=ids)["prompt"] == served.release.chat
    made = served.post(
        "/v1/chat/completions",
        **body,
        max_tokens=5,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )
    assert made["choices"][0]["token_ids"] == served.continuation(ids, 5)


def test_a_switch_reaches_the_template(served: Served) -> None:
    """Ring's thinking, on unless chat_template_kwargs say otherwise; no system message needed."""
    if served.live.model != "Ring-mini-linear-2.0":
        pytest.skip("its template has none")
    for kwargs, word in (({}, "on"), ({"enable_thinking": False}, "off")):
        ids = served.post("/tokenize", messages=[USER], chat_template_kwargs=kwargs)["tokens"]
        text = served.post("/detokenize", tokens=ids)["prompt"]
        assert text.startswith(f"<role>SYSTEM</role>detailed thinking {word}<|role_end|>")


def test_a_stream_is_the_whole_in_pieces(served: Served) -> None:
    options: dict[str, Any] = {
        "model": served.live.model,
        "prompt": "Once upon a time, ",
        "max_tokens": 16,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    create = served.live.openai.completions.create
    whole = create(**options).choices[0].text
    parts = [chunk.choices[0].text for chunk in create(**options, stream=True) if chunk.choices]
    assert "".join(parts) == whole
