"""The real client, in both of its forms."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.server.api.live import Live


def test_whole_and_streamed_chat(echo: Live) -> None:
    create = echo.openai.chat.completions.create
    messages: list = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "héllo"}]},
    ]
    whole = create(model="org/tiny", messages=messages, logprobs=True, top_logprobs=1, seed=1)
    assert whole.choices[0].message.content == "be brief"
    assert whole.choices[0].logprobs is not None
    again = [*messages, whole.choices[0].message.model_dump(), messages[1]]
    assert create(model="org/tiny", messages=again, n=2).choices[1].message.content == "be brief"
    stream = create(
        model="org/tiny",
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "be brief"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 10
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None


def test_completions_and_models(echo: Live) -> None:
    create = echo.openai.completions.create
    whole = create(model="org/tiny", prompt=["ab", "cd"], logprobs=1, stop=["b"])
    assert [choice.text for choice in whole.choices] == ["a", "cd"]
    chunks = list(create(model="org/tiny", prompt=[97, 98], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
    assert [model.id for model in echo.openai.models.list()] == ["org/tiny"]
    assert echo.openai.models.retrieve("org/tiny").id == "org/tiny"


def test_errors_are_the_clients_own(echo: Live) -> None:
    client = echo.openai
    user: list = [{"role": "user", "content": "a"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=user)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="org/tiny", messages=user, temperature=3)
    assert refused.value.param == "temperature" and "3" in refused.value.message
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        client.chat.completions.create(
            model="org/tiny", messages=user, reasoning_effort="low", stream=True
        )
    with pytest.raises(openai.BadRequestError, match="surprise"):
        client.completions.create(model="org/tiny", prompt="a", extra_body={"surprise": 1})


def test_many_at_once(echo: Live) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        text = f"number {number} " * (1 + number % 5)
        stream = await client.chat.completions.create(
            model="org/tiny", messages=[{"role": "user", "content": text}], stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return text, "".join(pieces)

    async def run() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(
            base_url=echo.url + "/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(40)))

    for asked, answered in asyncio.run(run()):
        assert answered == asked
    echo.wait_idle()
