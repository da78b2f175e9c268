"""The benchmark of contexts, against servers without arithmetic."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import NormalDist

import pytest

from benchmarks import contexts, served
from server.settings import Settings
from tests.server.api.checkpoint import write_checkpoint
from tests.server.api.live import ENGINE, in_thread

TOKENS = 2000
STATE = 1024  # bytes, without its tokens


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 1, "DECODERS": 4, "DECODED": 8, "SPREAD": 2}.items():
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


def test_costs_are_of_what_is_never_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "engine_command", lambda settings: [*ENGINE])
    usual = {"model": str(write_checkpoint(tmp_path / "tiny")), "port": 0}
    on, off = Settings(**usual), Settings(**usual, prefix_caching=False)
    launched = partial(served.launched, apart=True)
    with launched(on) as one, launched(off) as other:
        servers = contexts.Server(*one), contexts.Server(*other)
        rows = contexts.costs([servers], 1000, 3)
        assert not any(servers[0].hits().values())
    assert [row.goal for row in rows] == [0.98, None] * 2 and all(row.value > 0 for row in rows)


def test_what_drifts_is_in_both_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def rate(server: contexts.Server, tokens: int, seed: int) -> float:
        asked.append(server.url)
        return (100 + 5 * len(asked)) * (0.97 if server.url.endswith("on") else 1.0)

    monkeypatch.setattr(contexts.Server, "read", rate)
    pairs = [(contexts.Server("http://on"), contexts.Server("http://off"))] * 2
    assert contexts.read(pairs, 1000, 3) == [[pytest.approx(0.97)] * 3] * 2
    assert asked == ["http://off", "http://on"] * 12


def test_the_error_of_a_median() -> None:
    values = [NormalDist(1, 0.02).inv_cdf((i + 0.5) / 400) for i in range(400)]
    assert contexts.error(values) == pytest.approx(0.02 * math.sqrt(math.pi / 2 / 400), rel=0.01)
    assert contexts.error([1.0, 1.0, 1.0]) == 0


def test_a_share_errs_by_what_pairs_differ_if_that_is_more() -> None:
    share, wrong = contexts.rows_of("x", [[0.98, 0.98, 0.5], [1.01, 1.02, 1.02]])
    assert share.value == pytest.approx(1.0) and wrong.value == pytest.approx(0.02)
    share, wrong = contexts.rows_of("x", [[0.9, 1.0, 1.1], [0.9, 1.0, 1.1]])
    assert share.value == pytest.approx(1.0) and wrong.value > 0.05
