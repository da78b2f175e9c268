"""/v1/completions, /v1/models, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.api.checkpoint import END, SYSTEM
from tests.server.api.live import Live
from tests.server.api.test_chat import events


def texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ],
)
def test_prompts(echo: Live, prompt: Any, expected: list[str]) -> None:
    body = echo.complete(prompt).json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert texts(body) == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    streamed = [""] * len(expected)
    for chunk in events(echo.complete(prompt, stream=True).text):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == expected


def test_sixteen_tokens_unless_told_otherwise(echo: Live) -> None:
    body = echo.complete("x" * 40).json()
    assert texts(body) == ["x" * 16] and body["choices"][0]["finish_reason"] == "length"
    assert texts(echo.complete("x" * 40, max_tokens=30).json()) == ["x" * 30]


def test_n_of_each_prompt(echo: Live) -> None:
    assert texts(echo.complete(["a", "b"], n=2).json()) == ["a", "a", "b", "b"]
    response = echo.complete(["a"] * 65, n=2)
    assert response.status_code == 400 and "128" in response.json()["error"]["message"]
    assert echo.complete(["a"] * 129).status_code == 400


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_the_prompt_is_echoed_on_demand(echo: Live, prompt: Any) -> None:
    assert texts(echo.complete(prompt, echo=True).json()) == ["abab"]
    chunks = events(echo.complete(prompt, echo=True, stream=True).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abab"


def test_log_probabilities_are_four_aligned_lists(echo: Live) -> None:
    body = echo.complete("aé b", logprobs=2).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"][:5] == ["a", "bytes:\\xc3", "bytes:\\xa9", " ", "b"]
    assert logprobs["text_offset"][:5] == [0, 1, 1, 2, 3]
    assert logprobs["token_logprobs"] == [-0.5] * 6
    assert [list(top) for top in logprobs["top_logprobs"]][3] == [" ", "!"]
    alone = echo.complete("ab", logprobs=0).json()["choices"][0]["logprobs"]
    assert alone["top_logprobs"][0] == {"a": -0.5}


@pytest.mark.parametrize("prompt", ["", [[]], ["a", ""], [[97], []]])
def test_a_prompt_without_tokens(echo: Live, prompt: Any) -> None:
    response = echo.complete(prompt)
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("ids", [[272], [-1], [2**40], [97, 10**400]])
def test_ids_beyond_the_vocabulary(echo: Live, ids: list[int]) -> None:
    response = echo.complete(ids)
    assert response.status_code == 400 and "271" in response.json()["error"]["message"]


def test_models(echo: Live) -> None:
    (model,) = echo.http.get("/v1/models").json()["data"]
    assert model["id"] == "org/tiny" and model["object"] == "model"
    assert echo.http.get("/v1/models/org/tiny").json() == model
    response = echo.http.get("/v1/models/org/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_tokenize_and_detokenize(echo: Live) -> None:
    post = echo.http.post
    body = post("/tokenize", json={"prompt": "<|system|>é", "return_token_strs": True}).json()
    assert body["tokens"] == [SYSTEM, 0xC3, 0xA9] and body["count"] == 3
    assert body["token_strs"] == ["<|system|>", "\ufffd", "\ufffd"]
    assert post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "<|system|>é"}
    messages = [{"role": "system", "content": "<|end|>"}]
    body = post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert body["tokens"] == [SYSTEM, *b"<|end|>", END]
    for path, wrong in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": messages}),
        ("/detokenize", {"tokens": [272]}),
        ("/detokenize", {"tokens": ["a"]}),
    ):
        assert post(path, json=wrong).status_code == 400
