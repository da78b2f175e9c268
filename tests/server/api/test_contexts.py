"""/v1/contexts over HTTP: made, gone on with, grown, forked, moved, kept apart, found again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import httpx
import openai
import pytest

from server.api import contexts
from server.api.registry import Record, Registry
from server.errors import NotFoundError
from tests.server.api.checkpoint import write_checkpoint
from tests.server.api.live import Live, Process, eventually, in_thread

TEXT = "All happy families are alike; every unhappy family is unhappy in its own way.\n"
TALK = [
    {"role": "system", "content": "Answer from the text. " + TEXT},
    {"role": "user", "content": "Who is alike?"},
]


@pytest.fixture(scope="module", params=["memory", "disk"])
def live(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("contexts") if request.param == "disk" else None
    with in_thread(checkpoint, served_model_name="tiny", context_directory=directory) as live:
        yield live


def make(live: Live, **body: object) -> dict:
    response = live.http.post("/v1/contexts", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def usage(answer: httpx.Response) -> tuple[int, int]:
    assert answer.status_code == 200, answer.text
    told = answer.json()["usage"]
    return told["prompt_tokens"], told["prompt_tokens_details"]["cached_tokens"]


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [
        choice.get("text", choice.get("message", {}).get("content"))
        for choice in answer.json()["choices"]
    ]


def test_a_text_is_read_once(live: Live) -> None:
    made = make(live, text=TEXT, name="karenina", model="tiny")
    assert made["object"] == "context" and made["name"] == "karenina" and made["kind"] == "text"
    assert made["tokens"] == len(TEXT) and made["bytes"] > 0 and len(made["digest"]) == 64
    assert made["expires_at"] is None and made["usage"]["prompt_tokens"] == len(TEXT)
    cold = live.complete(TEXT + "Who?", max_tokens=9, temperature=0, cache_salt="cold")
    warm = live.complete("Who?", max_tokens=9, temperature=0, context=made["id"])
    assert texts(warm) == texts(cold)
    assert usage(cold) == (len(TEXT) + 4, 0) and usage(warm) == (len(TEXT) + 4, len(TEXT))
    ids = live.complete([87, 104, 111, 63], max_tokens=9, temperature=0, context=made["id"])
    assert texts(ids) == texts(cold)
    two = live.complete(["Who?", "Why?"], n=2, max_tokens=9, temperature=0, context=made["id"])
    assert texts(two)[:2] == texts(cold) * 2
    streamed = live.complete("Who?", max_tokens=9, temperature=0, context=made["id"], stream=True)
    assert streamed.status_code == 200 and "[DONE]" in streamed.text


def test_a_conversation_goes_on(live: Live) -> None:
    made = make(live, messages=TALK)
    more = [{"role": "assistant", "content": "Families."}, {"role": "user", "content": "Which?"}]
    cold = live.http.post(
        "/v1/chat/completions",
        json={"messages": TALK + more, "max_tokens": 9, "temperature": 0, "cache_salt": "cold"},
    )
    warm = live.http.post(
        "/v1/chat/completions",
        json={"messages": more, "max_tokens": 9, "temperature": 0, "context": made["id"]},
    )
    assert texts(warm) == texts(cold)
    assert usage(warm) == (usage(cold)[0], made["tokens"])
    text = make(live, text=TEXT)
    after = live.chat("Who?", max_tokens=3, context=text["id"])
    assert usage(after)[1] == len(TEXT)
    wrong = live.complete("Who?", context=made["id"])
    assert wrong.status_code == 400 and "messages" in wrong.json()["error"]["message"]


def test_it_is_shown_listed_and_forgotten(live: Live) -> None:
    made = make(live, text=TEXT + "listed")
    assert live.http.get(f"/v1/contexts/{made['id']}").json() == {
        name: value for name, value in made.items() if name != "usage"
    }
    listed = live.http.get("/v1/contexts").json()
    assert made["id"] in [item["id"] for item in listed["data"]] and listed["object"] == "list"
    gone = live.http.delete(f"/v1/contexts/{made['id']}")
    assert gone.json() == {"id": made["id"], "object": "context.deleted", "deleted": True}
    for answer in (
        live.http.get(f"/v1/contexts/{made['id']}"),
        live.http.delete(f"/v1/contexts/{made['id']}"),
        live.http.post(f"/v1/contexts/{made['id']}/fork", json={}),
        live.http.post(f"/v1/contexts/{made['id']}/append", json={"text": "a"}),
        live.http.get(f"/v1/contexts/{made['id']}/file"),
        live.complete("a", context=made["id"]),
        live.chat("a", context=made["id"], stream=True),
    ):
        assert answer.status_code == 404, answer.text
        error = answer.json()["error"]
        assert error["code"] == "context_not_found" and error["param"] == "context"


def test_more_is_read_behind_it(live: Live) -> None:
    made = make(live, text=TEXT)
    for part in ("Everything ", "was in confusion."):
        grown = live.http.post(f"/v1/contexts/{made['id']}/append", json={"text": part})
        assert grown.status_code == 200 and grown.json()["id"] == made["id"]
    whole = TEXT + "Everything was in confusion."
    assert grown.json()["tokens"] == len(whole) and grown.json()["digest"] != made["digest"]
    warm = live.complete(" So", max_tokens=9, temperature=0, context=made["id"])
    cold = live.complete(whole + " So", max_tokens=9, temperature=0, cache_salt="cold")
    assert texts(warm) == texts(cold) and usage(warm)[1] == len(whole)
    assert (
        make(live, text=[TEXT, "Everything ", "was in confusion."])["digest"]
        == (grown.json()["digest"])
    )
    talk = make(live, messages=TALK[:1])
    both = live.http.post(f"/v1/contexts/{talk['id']}/append", json={"messages": TALK[1:]})
    assert both.json()["digest"] == make(live, messages=TALK)["digest"]
    wrong = live.http.post(f"/v1/contexts/{talk['id']}/append", json={"text": "a"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "text"
    again = live.http.post(f"/v1/contexts/{made['id']}/append", json={"text": "a", "name": "b"})
    assert again.status_code == 400 and again.json()["error"]["param"] == "name"


def test_parts_as_lines(live: Live) -> None:
    lines = [{"name": "lines"}, {"text": TEXT}, {"text": "more"}]
    body = "\n".join(map(json.dumps, lines))
    headers = {"content-type": "application/x-ndjson"}
    made = live.http.post("/v1/contexts", content=body, headers=headers).json()
    assert made["name"] == "lines" and made["digest"] == make(live, text=TEXT + "more")["digest"]
    for wrong in ('{"text": "a"}\n{"name": "late"}', "[1]", "{", '{"name": "a"}'):
        answer = live.http.post("/v1/contexts", content=wrong, headers=headers)
        assert answer.status_code == 400, answer.text


def test_forks_go_their_own_ways(live: Live) -> None:
    made = make(live, text=TEXT)
    fork = live.http.post(f"/v1/contexts/{made['id']}/fork", json={"name": "fork"}).json()
    assert fork["digest"] == made["digest"] and fork["id"] != made["id"]
    live.http.post(f"/v1/contexts/{fork['id']}/append", json={"text": "One way."})
    live.http.delete(f"/v1/contexts/{made['id']}")
    warm = live.complete("So", max_tokens=9, temperature=0, context=fork["id"])
    cold = live.complete(TEXT + "One way.So", max_tokens=9, temperature=0, cache_salt="cold")
    assert texts(warm) == texts(cold)


def test_names_are_taken_once(live: Live) -> None:
    make(live, text=TEXT, name="taken")
    again = live.http.post("/v1/contexts", json={"text": "b", "name": "taken"})
    assert again.status_code == 409 and again.json()["error"]["code"] == "context_exists"


def test_it_lives_for_its_time(live: Live) -> None:
    made = make(live, text="short-lived", ttl=3600)
    assert made["expires_at"] is not None
    assert live.complete("a", context=made["id"], max_tokens=1).status_code == 200
    short = make(live, text="short-lived", ttl=1)
    eventually(lambda: live.http.get(f"/v1/contexts/{short['id']}").status_code == 404)
    assert live.http.get(f"/v1/contexts/{made['id']}").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"), ({"text": ""}, "text"), ({"text": []}, "text"), ({"text": [1]}, "text"),
        ({"text": "a", "messages": TALK}, "text"), ({"messages": []}, "messages"),
        ({"text": "a", "ttl": 0}, "ttl"), ({"text": "a", "name": ""}, "name"),
        ({"text": "a", "cache_salt": ""}, "cache_salt"), ({"text": "a", "surprise": 1}, "surprise"),
        ({"messages": TALK, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"text": "a", "model": "other"}, "model"), ({"text": "a", "priority": 1001}, "priority"),
    ],
)  # fmt: skip
def test_bodies_that_make_no_sense(live: Live, body: dict, param: str) -> None:
    answer = live.http.post("/v1/contexts", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param, answer.text


def test_salts_go_with_the_context(live: Live) -> None:
    made = make(live, text=TEXT, cache_salt="mine")
    assert make(live, text=TEXT)["digest"] != made["digest"]
    assert usage(live.complete("a", max_tokens=1, context=made["id"]))[1] == len(TEXT)
    right = live.complete("a", max_tokens=1, context=made["id"], cache_salt="mine")
    assert right.status_code == 200
    wrong = live.complete("a", max_tokens=1, context=made["id"], cache_salt="other")
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "cache_salt"
    grown = live.http.post(f"/v1/contexts/{made['id']}/append", json={"text": "b"}).json()
    assert grown["digest"] == make(live, text=TEXT + "b", cache_salt="mine")["digest"]


def test_files_go_from_server_to_server(live: Live, checkpoint: Path, tmp_path: Path) -> None:
    text, talk = make(live, text=TEXT, name="moved"), make(live, messages=TALK)
    files = [live.http.get(f"/v1/contexts/{made['id']}/file") for made in (text, talk)]
    assert all(file.headers["content-disposition"].endswith('.safetensors"') for file in files)
    with in_thread(checkpoint, context_directory=tmp_path) as other:
        came = other.http.post("/v1/contexts/import", content=files[0].content)
        assert came.status_code == 200, came.text
        assert came.json()["name"] == "moved" and came.json()["digest"] == text["digest"]
        named = other.http.post("/v1/contexts/import?name=talk&ttl=60", content=files[1].content)
        assert named.json()["name"] == "talk" and named.json()["expires_at"] is not None
        here = live.complete("So", max_tokens=9, temperature=0, context=text["id"])
        there = other.complete("So", max_tokens=9, temperature=0, context=came.json()["id"])
        assert texts(here) == texts(there) and usage(there)[1] == len(TEXT)
        more = [{"role": "user", "content": "And?"}]
        for server, id in ((live, talk["id"]), (other, named.json()["id"])):
            answer = server.http.post(
                "/v1/chat/completions", json={"messages": more, "context": id, "max_tokens": 3}
            )
            assert usage(answer)[1] == talk["tokens"]
        grown = other.http.post(
            f"/v1/contexts/{came.json()['id']}/append", json={"text": "more"}
        ).json()
        assert grown["digest"] == make(live, text=TEXT + "more")["digest"]
        bad = bytearray(files[0].content)
        bad[-1] ^= 1
        for content in (bytes(bad), b"", b"noise" * 100, files[0].content[:-9]):
            refused = other.http.post("/v1/contexts/import", content=content)
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["param"] == "file"
        wrong = other.http.post("/v1/contexts/import?ttl=soon", content=files[0].content)
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "ttl"


def test_openais_client_goes_on_with_it(live: Live) -> None:
    client = live.openai
    made = client.post("/contexts", body={"messages": TALK}, cast_to=object)
    assert isinstance(made, dict)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "And?"}],
        max_tokens=5,
        extra_body={"context": made["id"]},
    )
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == made["tokens"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="tiny", prompt="a", extra_body={"context": "ctx_none"})
    assert missing.value.param == "context"


def test_it_says_where_messages_part(tmp_path: Path) -> None:
    """A template that leaves out what an assistant thought, once a later message has come."""
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('THOUGHT')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    path = write_checkpoint(tmp_path / "forgetful", template)
    with in_thread(path) as live:
        talk = [*TALK, {"role": "assistant", "content": "Let me see. THOUGHT Families."}]
        made = make(live, messages=talk)
        answer = live.chat("Which?", context=made["id"], max_tokens=3)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_diverges"
        assert "messages[2]" in error["message"] and error["param"] == "context"
        assert live.chat("Which?", context=make(live, messages=TALK)["id"]).status_code == 200


def test_a_key_sees_its_own(checkpoint: Path, tmp_path: Path) -> None:
    with in_thread(checkpoint, api_key="one, two", context_directory=tmp_path) as live:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        post, get = live.http.post, live.http.get
        made = post("/v1/contexts", json={"text": TEXT, "name": "mine"}, headers=one).json()
        assert post("/v1/contexts", json={"text": "a", "name": "mine"}, headers=two).is_success
        assert get(f"/v1/contexts/{made['id']}", headers=two).status_code == 404
        assert made["id"] not in get("/v1/contexts", headers=two).text
        for path in ("", "/append", "/fork", "/file"):
            method = {"": "DELETE", "/file": "GET"}.get(path, "POST")
            answer = live.http.request(
                method, f"/v1/contexts/{made['id']}{path}", json={"text": "a"}, headers=two
            ) if path != "/fork" else post(
                f"/v1/contexts/{made['id']}/fork", json={}, headers=two
            )  # fmt: skip
            assert answer.status_code == 404, path
        body = {"prompt": "a", "context": made["id"]}
        assert post("/v1/completions", json=body, headers=two).status_code == 404
        assert post("/v1/completions", json=body, headers=one).status_code == 200


def test_it_outlives_the_server(checkpoint: Path, tmp_path: Path) -> None:
    with in_thread(checkpoint, context_directory=tmp_path) as live:
        made = make(live, text=TEXT, name="kept")
        other = make(live, messages=TALK)
        cold = texts(live.complete(TEXT + "So", max_tokens=9, temperature=0))
    with in_thread(checkpoint, context_directory=tmp_path) as live:
        assert [item["name"] for item in live.http.get("/v1/contexts").json()["data"]] == [
            "kept", None,
        ]  # fmt: skip
        warm = live.complete("So", max_tokens=9, temperature=0, context=made["id"])
        assert texts(warm) == cold and usage(warm)[1] == len(TEXT)
        [state] = (tmp_path / "states").glob(f"{other['digest']}*")
        state.write_bytes(state.read_bytes()[:-1] + b"\x07")
        broken = live.chat("a", context=other["id"])
        assert broken.status_code == 410 and other["id"] in broken.json()["error"]["message"]
        assert broken.json()["error"]["code"] == "context_gone"
        assert list((tmp_path / "quarantine").iterdir())
        assert live.complete("a", max_tokens=1).status_code == 200


def test_a_server_that_is_killed_has_lost_nothing_it_told(
    launch: Callable[..., Process], tmp_path: Path
) -> None:
    """Killed at any moment while contexts are made, grown and deleted, and started again."""
    rng, known = Random(3), {}
    for _ in range(3):
        process = launch(context_directory=str(tmp_path))
        process.live.wait_ready()
        live = process.live
        there = {r["id"]: r["digest"] for r in live.http.get("/v1/contexts").json()["data"]}
        assert all(there.get(id) == digest for id, (digest, _) in known.items())
        for id, (_, text) in known.items():
            warm = live.complete("So", max_tokens=5, temperature=0, context=id)
            cold = live.complete(text + "So", max_tokens=5, temperature=0, cache_salt="cold")
            assert texts(warm) == texts(cold) and usage(warm)[1] == len(text)
        killer = threading.Timer(rng.random() * 0.05, process.process.kill)
        left, doubtful = rng.randrange(3, 12), None
        with contextlib.suppress(httpx.TransportError):
            while True:
                text = TEXT[: rng.randrange(20, len(TEXT))] + str(rng.random())
                made = live.http.post("/v1/contexts", json={"text": text}).json()
                known[made["id"]] = made["digest"], text
                left -= 1
                if left == 0:  # somewhere in what follows
                    killer.start()
                if rng.random() < 0.5:
                    doubtful = made["id"]
                    grown = live.http.post(
                        f"/v1/contexts/{doubtful}/append", json={"text": "more"}
                    ).json()
                    known[doubtful] = grown["digest"], text + "more"
                    doubtful = None
        killer.join()
        known.pop(doubtful, None)  # its answer was never seen: either is right
        process.wait()
    assert len(known) > 4 and not list((tmp_path / "quarantine").iterdir())


def test_two_servers_share_a_directory(checkpoint: Path, tmp_path: Path) -> None:
    with (
        in_thread(checkpoint, context_directory=tmp_path) as one,
        in_thread(checkpoint, context_directory=tmp_path) as two,
    ):
        made = make(one, text=TEXT)
        there = two.complete("So", max_tokens=9, temperature=0, context=made["id"])
        here = one.complete("So", max_tokens=9, temperature=0, context=made["id"])
        assert texts(there) == texts(here) and usage(there)[1] == len(TEXT)
        assert two.http.post(f"/v1/contexts/{made['id']}/append", json={"text": "more"}).is_success
        assert usage(one.complete("So", max_tokens=1, context=made["id"]))[1] == len(TEXT) + 4
        two.http.delete(f"/v1/contexts/{made['id']}")
        assert one.complete("a", context=made["id"]).status_code == 404


def test_there_is_not_always_room(checkpoint: Path, tmp_path: Path) -> None:
    with in_thread(checkpoint, host_cache_gb=3000e-9) as live:
        assert live.http.post("/v1/contexts", json={"text": TEXT}).status_code == 200
        answers = [live.http.post("/v1/contexts", json={"text": f"{n}" + TEXT}) for n in range(4)]
        assert answers[-1].status_code == 507
        error = answers[-1].json()["error"]
        assert error["code"] == "storage_full" and "host_cache_gb" in error["message"]
        assert live.complete("a", max_tokens=1).status_code == 200
    with in_thread(checkpoint, context_directory=tmp_path, disk_cache_gb=20_000e-9) as live:
        made = make(live, text=TEXT)
        full = live.http.post("/v1/contexts", json={"text": "other " + TEXT})
        assert full.status_code == 507 and "disk_cache_gb" in full.json()["error"]["message"]
        live.http.delete(f"/v1/contexts/{made['id']}")
        make(live, text="other " + TEXT)
    with in_thread(checkpoint, prefix_caching=False) as live:
        off = live.http.post("/v1/contexts", json={"text": TEXT})
        assert off.status_code == 400 and "prefix_caching" in off.json()["error"]["message"]


def test_an_upload_onto_a_full_disk(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(live, text=TEXT)
    data = live.http.get(f"/v1/contexts/{made['id']}/file").content

    async def to_thread(work: Callable[..., object], *given: object, **named: object) -> object:
        if getattr(work, "__name__", "") == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return await asyncio.to_thread(work, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(contexts, "asyncio", SimpleNamespace(to_thread=to_thread))
        full = live.http.post("/v1/contexts/import", content=data)
    assert full.status_code == 507 and "No space left" in full.json()["error"]["message"]
    assert full.json()["error"]["code"] == "storage_full"
    assert live.http.post("/v1/contexts/import", content=data).status_code == 200
    assert not list(live.service.scratch.iterdir())


def test_contexts_of_servers_that_compute_otherwise_are_not_seen(tmp_path: Path) -> None:
    (tmp_path / "contexts").mkdir()
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "k.safetensors").touch()
    one, two = Registry(tmp_path, "float32"), Registry(tmp_path, "bfloat16")
    record = Record(
        id="ctx_1", key="k", identity="float32", owner="me", kind="text", count=1, bytes=1,
        salt="", created=1.0,
    )  # fmt: skip
    one.put(record)
    assert one.owned("me") == [record] and two.owned("me") == []
    with pytest.raises(NotFoundError):
        two.get("ctx_1", "me")


def test_metrics_tell_of_the_cache(live: Live) -> None:
    before = live.metrics()
    text = "A prompt that is long enough to be kept, and is asked twice. " * 2
    for _ in range(2):
        live.complete(text, max_tokens=1)
    live.wait_idle()
    after = live.metrics()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grew("prefix_cache_queries_total") == 2 * len(text)
    assert grew("prefix_cache_hits_total") == len(text) - 1
    tiers = [name for name in after if name.startswith("checkpoint_hits_total")]
    assert len(tiers) == 3 and grew('checkpoint_hits_total{tier="device"}') == 1
    assert sum(map(grew, tiers)) == 1
    misses = [name for name in after if name.startswith("checkpoint_misses_total")]
    assert len(misses) == 5 and sum(map(grew, misses)) == 1
    assert after['checkpoints{tier="device"}'] + after['checkpoints{tier="host"}'] > 0
    assert after['checkpoint_bytes{tier="device"}'] + after['checkpoint_bytes{tier="host"}'] > 0
    if 'checkpoint_bytes{tier="disk"}' in after:
        assert after["checkpoint_save_seconds_count"] > 0
