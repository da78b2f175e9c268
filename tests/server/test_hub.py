"""Checkpoints from the hub: the real client against a small hub on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from server.api import fetch as fetching
from server.api.fetch import fetch
from server.settings import Settings
from tests.model.checkpoints import write
from tests.releases import RELEASES
from tests.server.api.checkpoint import VOCAB, write_checkpoint
from tests.server.hub_server import Hub, Repo, serve_hub
from tests.test_road import ROOT, Server

SMALL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
EVIL = "import pathlib; pathlib.Path({!r}).write_text('it ran')\nclass Evil: ...\n"


def get(**settings: Any) -> Path:
    return asyncio.run(fetch(Settings(**settings)))


def names(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one small repository that the client takes for the hub, and an empty cache."""
    with serve_hub(org_small=Repo(SMALL)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield hub


def plant_code(path: Path, sentinel: Path) -> None:
    """Code in a checkpoint, and every field that asks to run it."""
    (path / "evil.py").write_text(EVIL.format(str(sentinel)))
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {name: "evil.Evil" for name in classes}
    config["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with a tokenizer, and with code that must not run."""
    path = write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny")
    write(path, vocab_size=VOCAB, max_shard_size="200KB")
    (path / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": 256}')
    plant_code(path, path.parent / "sentinel")
    return path


def test_a_model_from_the_hub_is_served_and_its_code_is_not_run(hub: Hub, tiny: Path) -> None:
    files = {name: (tiny / name).read_bytes() for name in names(tiny)}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    files |= {"pytorch_model.bin": b"\x80", "original/config.json": b"{}", "README.md": b"tiny"}
    hub.repos["org/tiny"] = Repo({**files, "consolidated.safetensors": b"not in the index"})
    flags = ("--device", "cpu", "--max-running", "2", "--state-memory-gb", "0.01")
    server = Server("org/tiny", *flags)
    try:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["org/tiny"]
        ask: Any = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}
        made = client.chat.completions.create(**ask, max_tokens=3)
        assert made.usage is not None and made.usage.completion_tokens == 3
    finally:
        assert server.stop() == 0
    assert not (tiny.parent / "sentinel").exists()
    fetched = {path.rpartition("/")[2] for path in hub.paths() if "/resolve/" in path}
    assert fetched == {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    stored = [path for path in hub.paths() if "/store/" in path]
    assert len(stored) == sum(name.startswith("model-") for name in files)


def test_planted_code_does_not_run_from_a_directory_either(tiny: Path, tmp_path: Path) -> None:
    """With tokenizer.json it is not looked at; without, the loader refuses."""
    from model.runner import load_runner
    from server.api.tokenizer import Tokenizer

    load_runner(tiny, device="cpu", state_memory_gb=0.01, max_running=1)
    Tokenizer(tiny)
    for name in names(tiny):
        if name != "tokenizer.json":
            (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with pytest.raises(ValueError):
        Tokenizer(tmp_path)
    assert not (tiny.parent / "sentinel").exists()


def test_revisions(hub: Hub) -> None:
    repo = hub.repos["org/small"] = Repo(SMALL, branch="v2")
    assert names(get(model="org/small", revision="v2")) == sorted(SMALL)
    assert get(model="org/small", revision=repo.sha).name == repo.sha
    for revision in (None, "v3"):
        with pytest.raises(ValueError, match="no such revision") as caught:
            get(model="org/small", revision=revision)
        assert f"'org/small' at revision '{revision or 'main'}'" in str(caught.value)
    with pytest.raises(ValidationError, match="revision is for models on the hub"):
        Settings(model="recall", revision="v2")


def test_private_and_gated_models(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/small"] = Repo(SMALL, token="hf_secret")
    with pytest.raises(ValueError, match=r"'org/small' at revision 'main'.*token"):
        get(model="org/small")
    with pytest.raises(ValueError, match=r"'org/none' at revision 'main'.*no"):
        get(model="org/none")
    assert names(get(model="org/small", hub_token="hf_secret")) == sorted(SMALL)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", os.environ["HF_HOME"] + "2")
    assert names(get(model="org/small")) == sorted(SMALL)
    for _, path, headers in hub.requests:  # the token goes to the hub and to nobody else
        assert ("authorization" in headers) is False or "/store/" not in path
    hub.repos["org/small"].gated = True
    monkeypatch.setenv("HF_HOME", os.environ["HF_HOME"] + "3")
    with pytest.raises(ValueError, match=r"'org/small' at revision 'main'.*asked for"):
        get(model="org/small")


def test_offline_what_is_in_the_cache_is_served(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = get(model="org/small", hub_cache=cache)
    assert path.is_relative_to(cache)
    count = len(hub.requests)
    assert get(model="org/small", hub_cache=cache, hub_offline=True) == path
    with pytest.raises(ValueError, match=r"'org/other' at revision 'main'.*offline mode is on"):
        get(model="org/other", hub_cache=cache, hub_offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(model="org/small", hub_cache=cache) == path
    with pytest.raises(ValueError, match=r"'org/small' at revision 'main'.*offline mode is on"):
        get(model="org/small", hub_cache=tmp_path / "empty")
    assert len(hub.requests) == count
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="not whole, and offline mode is on"):
        get(model="org/small", hub_cache=cache)


def test_a_hub_that_is_down(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = get(model="org/small")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert get(model="org/small") == path
    with pytest.raises(ValueError, match=r"'org/other' at revision 'main'.*cannot be reached"):
        get(model="org/other")


def test_a_download_that_broke_off_goes_on_where_it_ended(hub: Hub) -> None:
    data = os.urandom(20_000_000)
    hub.repos["org/small"] = Repo({**SMALL, "model.safetensors": data})
    hub.cut = 12_000_000
    try:
        path = get(model="org/small")
    except ValueError:
        path = get(model="org/small")
    assert (path / "model.safetensors").read_bytes() == data
    ranges = [headers.get("range") for _, path_, headers in hub.requests if "/store/" in path_]
    assert len(ranges) == 2 and ranges[0] is None
    assert ranges[1] is not None and int(ranges[1][6:].partition("-")[0]) > 1_000_000


@pytest.mark.parametrize(
    ("files", "mistake"),
    [
        ({"model.safetensors": b""}, "no config.json"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, r"no \*.safetensors"),
        ({"config.json": b"{}", "sub/model.safetensors": b""}, r"no \*.safetensors"),
        (
            {"config.json": b"{}", "a.safetensors": b"", "model.safetensors.index.json": b"[]"},
            "weight_map must be an object",
        ),
    ],
)
def test_repositories_that_are_no_checkpoints(
    hub: Hub, files: dict[str, bytes], mistake: str
) -> None:
    hub.repos["org/small"] = Repo(files)
    with pytest.raises(ValueError, match=f"'org/small' at revision 'main'.*{mistake}"):
        get(model="org/small")
    assert not any("/store/" in path for path in hub.paths())


def test_pickles_are_fetched_only_for_who_asks(hub: Hub) -> None:
    index = {"weight_map": {"a": "pytorch_model-1.bin"}}
    files = {"config.json": b"{}", "pytorch_model-1.bin": b"1", "training_args.bin": b"2"}
    files |= {"pytorch_model.bin.index.json": json.dumps(index).encode(), "LICENSE": b"free"}
    hub.repos["org/small"] = Repo({**files, "model.safetensors": b"3", "evil.py": b"4"})
    code = (
        "from server.hub import Repository; from server.settings import Settings;"
        "print(Repository(Settings(model='org/small')).release())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert names(Path(done.stdout.strip())) == sorted({*files} - {"training_args.bin"})


def test_a_release_is_converted_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    RELEASES["TransNormerLLM"].write(tmp_path / "release")
    (tmp_path / "release" / "LICENSE").write_text("as it was")
    hub.repos["org/normer"] = Repo(
        {name: (tmp_path / "release" / name).read_bytes() for name in names(tmp_path / "release")}
    )
    target = tmp_path / "made"
    command = [sys.executable, "-m", "server", "convert", "org/normer", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    made = names(target)
    files = {"model.safetensors.index.json", "tokenizer.json", "config.json", "LICENSE"}
    assert files <= {*made}
    assert not any(name.endswith((".py", ".bin")) for name in made)
    assert not any(path.endswith(".py") for path in hub.paths())
    with pytest.raises(ValueError, match="`steadystate convert` makes them of pickles"):
        get(model="org/normer")
    # safetensors with a SentencePiece tokenizer
    kept = {name: (target / name).read_bytes() for name in made if name != "tokenizer.json"}
    hub.repos["org/safe"] = Repo(kept)
    command[-2:] = "org/safe", str(tmp_path / "again")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    assert names(tmp_path / "again") == made


@pytest.mark.parametrize(
    ("model", "hub_id"),
    [
        ("recall", None),
        ("org/tiny", "org/tiny"),
        ("gpt2", "gpt2"),
        *(
            (name, None)
            for name in ("/org/tiny", "./tiny", "../tiny", "a/b/c", "~/tiny", "", "a//b")
        ),
        *((name, None) for name in ("org/", "/", "a b/c", "tests/server")),
    ],
)
def test_what_is_taken_for_an_id(model: str, hub_id: str | None) -> None:
    settings = Settings(model=model)
    assert settings.hub_id == hub_id
    assert hub_id is None or settings.model_id == hub_id


def test_secrets_are_not_shown_and_not_handed_on() -> None:
    assert "hf_secret" not in repr(Settings(model="org/tiny", hub_token="hf_secret"))


def test_fetching_ends_when_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled, as at a SIGTERM while a model is still being fetched."""
    processes: list[asyncio.subprocess.Process] = []
    real = fetching.create_subprocess_exec

    async def start(*_: str, **options: Any) -> asyncio.subprocess.Process:
        processes.append(await real("sleep", "60", **options))
        return processes[0]

    async def run() -> None:
        monkeypatch.setattr(fetching, "create_subprocess_exec", start)
        task = asyncio.create_task(fetch(Settings(model="org/tiny")))
        while not processes:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert processes[0].returncode is not None

    asyncio.run(run())


def test_health_is_answered_and_failure_told_while_a_model_is_fetched(hub: Hub) -> None:
    from tests.server.api.live import Process

    process = Process(Path("org/none"))
    try:
        response = httpx.get(process.live.url + "/health", timeout=60)
        assert response.status_code == 503 and response.json()["status"] == "starting"
        assert process.wait() == 1
        assert any("'org/none' at revision 'main'" in line for line in process.log)
    finally:
        process.close()
