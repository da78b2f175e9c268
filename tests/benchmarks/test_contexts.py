"""The benchmark of contexts, against servers without arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import contexts
from tests.server.api.checkpoint import write_checkpoint
from tests.server.api.live import in_thread

TOKENS = 2000
STATE = 1024  # bytes, without its tokens


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 1, "DECODERS": 4, "DECODED": (6, 10), "TURNS": 1}.items():
        monkeypatch.setattr(contexts, name, value)


def test_each_tier_is_the_one_that_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    room = 2 * contexts.ROOM * STATE + 8 * 4 * TOKENS
    files = tmp_path / "files"
    with in_thread(path, context_directory=files, host_cache_gb=room / 1e9) as live:
        server = contexts.Server(live.url)
        beyond = room // STATE + 2 * contexts.SLOTS
        rows = contexts.tiers(server, TOKENS, files, beyond=beyond)
        with pytest.raises(RuntimeError, match="disk is due"):  # nothing has pushed it there
            id = server.http.get("/v1/contexts").json()["data"][0]["id"]
            contexts.tier(server, "disk", id, TOKENS, lambda: None)
    assert [row.work.rpartition(" ")[2] for row in rows] == ["device", "host", "disk", "tokens"]
    assert all(row.value > 0 and row.goal for row in rows)
    assert all(row.peers["cold prefill"] > 0 for row in rows[:3])


def test_costs_are_of_what_is_never_hit(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    with in_thread(path) as on, in_thread(path, prefix_caching=False) as off:
        servers = contexts.Server(on.url), contexts.Server(off.url)
        rows = contexts.costs(*servers, 1000)
        assert not any(servers[0].hits().values())
    assert [row.goal for row in rows] == [0.98, 0.98] and all(row.value > 0 for row in rows)
