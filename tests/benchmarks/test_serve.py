"""The benchmarks of the engine and of the server, whole, with a model that does arithmetic."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine, plot, result, serve
from benchmarks.engine import Work
from benchmarks.load import Reply
from benchmarks.result import Row
from tests.model.checkpoints import LIGHTNING, write


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a config.json alone, and an empty one for results."""
    path = tmp_path / "tiny"
    write(path, vocab_size=1100, num_hidden_layers=2, layer_types=[LIGHTNING] * 2)
    (path / "model.safetensors").unlink()
    (path / "tokenizer.json").unlink(missing_ok=True)
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    return path


def written(shape: Path, bench: str) -> dict[str, Any]:
    (path,) = shape.parent.glob(f"{bench}-tiny-*.json")
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_the_engine_alone(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [
        Work("decode-1", 1, 4, 5, "ms a step"), Work("prefill-40", 1, 40, 1, "s"),
        Work("decode-3", 3, 4, 5, "ms a step"), Work("prefill-64", 1, 64, 1, "s"),
    ]  # fmt: skip
    monkeypatch.setattr(engine, "WORKS", works)
    monkeypatch.setattr(
        engine, "GOALS", {"MiniMaxForCausalLM": {w.name: 1 for w in works[:2] + works[3:]}}
    )
    monkeypatch.setattr("sys.argv", ["engine", str(shape)])
    ended = RuntimeError("the run is ended")
    run, ran = engine.run, []

    def one_work(loop: Any, mailbox: Any, work: Work, vocab: int, seed: int) -> float:
        ran.append(work.name)
        if work.name == "prefill-64" and ran.count(work.name) == 1:
            raise ended
        return run(loop, mailbox, work, vocab, seed)

    monkeypatch.setattr(engine, "run", one_work)
    with pytest.raises(RuntimeError, match="ended"):
        engine.main()
    assert written(shape, "engine")["missing"] == ["tiny prefill-64"]
    engine.main()
    told = written(shape, "engine")
    assert "missing" not in told and set(told["startup_seconds"]) >= {"load", "memory", "warm_up"}
    rows = {row["work"]: row for row in told["rows"]}
    memory = "tiny device memory, prefill"
    prefills = ["tiny prefill-40", f"{memory}-40", "tiny prefill-64", f"{memory}-64"]
    assert list(rows) == ["tiny decode-1", *prefills, f"{memory}-64, over the first"]
    assert all(row["value"] > 0 for row in rows.values()) and rows["tiny decode-1"]["goal"] == 1


def test_through_http_beside_the_engine_alone(shape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "--prompt 5 --tokens 6 --streams 1 3 --least 4 --seconds 0.5 --shares 0.5 --threads 1"
    processes = ["--api-workers", "2", "--clients", "2"]
    monkeypatch.setattr("sys.argv", ["serve", str(shape), *command.split(), *processes])
    missing: list[list[str]] = []

    def noted(*arguments: Any, **told: Any) -> Path:
        missing.append(told["missing"])
        return result.write(*arguments, **told)

    monkeypatch.setattr(serve, "write", noted)
    serve.main()
    assert missing == [["3 streams", "open loop at 50%"], ["open loop at 50%"], []]
    rows = {row["work"]: row for row in written(shape, "serve")["rows"]}
    assert len(rows) == 2 * 14 + 12
    for name in ("1 streams", "3 streams"):
        throughput = rows[f"throughput, {name}"]
        assert throughput["goal"] == 0.95 * throughput["peers"]["engine alone"] > 0
        assert 1 <= rows[f"tokens a frame, {name}"]["value"] <= 6
        for kind in ("TTFT", "ITL", "time per token", "E2E"):
            times = [rows[f"{kind} p{percent}, {name}"] for percent in (50, 90, 99)]
            for column in ("value", "floor"):
                values = [row[column] for row in times]
                # tokens that are read at once have no time between them, all of a GPU's perhaps
                between = kind in ("ITL", "time per token")
                least = values[-1] if kind == "ITL" else values[0]
                at_once = between and column == "value" and torch.cuda.is_available()
                assert (least > 0 or at_once) and values[0] >= 0
                assert values == sorted(values)


def test_times_are_of_when_a_request_was_due() -> None:
    replies = [Reply(1.0, 1.5, [2.0, 2.1, 2.1, 2.4]), Reply(2.0, 2.0, [2.2, 2.6])]
    times = serve.times_of(replies, 5)
    assert times["TTFT p50"] == pytest.approx(600) and times["E2E p50"] == pytest.approx(1000)
    assert times["ITL p50"] == pytest.approx(200) and times["ITL p99"] < 400
    assert times["time per token p50"] == pytest.approx(100)
    assert serve.rate_of(replies, 5) == pytest.approx(10 / 1.1)
    at_once = serve.times_of([Reply(1.0, 1.0, [1.5]), Reply(1.0, 1.0, [1.25])], 5)
    assert at_once["ITL p99"] == at_once["time per token p50"] == 0
    assert at_once["TTFT p50"] == at_once["E2E p50"] == pytest.approx(375)


def test_arrivals_are_random_and_as_many_as_they_should_be() -> None:
    dues = serve.poisson(100.0, 50.0)
    assert dues == sorted(dues) and 4500 < len(dues) < 5500 and dues[-1] < 50
    gaps = sorted(b - a for a, b in pairwise(dues))
    assert gaps[len(gaps) // 2] == pytest.approx(0.00693, rel=0.1)  # the median of exponentials
    assert len(serve.poisson(0.001, 1.0)) == 1


def test_pictures_of_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name in ("RESULTS", "ROOT"):
        monkeypatch.setattr(plot, name, tmp_path)
    (tmp_path / "docs").mkdir()
    works = ("decode-1", "decode-64", "prefill-1024", "prefill-8192", "job-256x1024+128")
    rows = {
        "engine": [
            Row(work=f"x {work}", value=2.0, unit="s", better="lower", floor=1.0, goal=goal)
            for work, goal in zip(works, (3.0, None, 1.5, 2.5, 4.0), strict=True)
        ],
        "serve": [
            row
            for streams in (1, 64)
            for row in serve.closed(
                f"{streams} streams",
                [Reply(1.0, 1.0, [2.0, 2.5, 3.0])] * streams,
                3,
                serve.Alone([Reply(1.0, 1.0, [1.5, 2.0, 2.5])] * streams, 10.0 * streams),
            )
        ]
        + serve.rows_of("open loop at 3.5 requests/s (50%)", [Reply(1.0, 1.0, [2.0, 2.5])], 2),
    }
    about = {"gpu": "a card", "commit": "0123abc"}
    for bench, made in rows.items():
        for model in ("one", "other"):
            path = tmp_path / f"{bench}-{model}-x1.json"
            path.write_text(json.dumps({**about, "rows": [asdict(row) for row in made]}))
        plot.PICTURES[bench]("x1")
        assert (tmp_path / "docs" / f"{bench}.svg").stat().st_size > 10_000
        with pytest.raises(SystemExit, match=f"no {bench}-"):
            plot.PICTURES[bench]("x2")
    told = {"rows": [asdict(row) for row in rows["serve"]]}
    assert list(plot.by_load(told, plot.STREAMS)["TTFT p50"]) == [1, 64]
    assert list(plot.by_load(told, plot.OPEN)["E2E p99"]) == [3.5]
