"""The benchmark of quantised weights at a tiny shape: every row is there and makes sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import quantization, result
from tests.model.checkpoints import write


def test_each_quantization_beside_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "tiny"
    write(config, hidden_size=128, intermediate_size=128, max_position_embeddings=256)
    (config / "model.safetensors").unlink()  # weights are drawn
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    command = f"quantization --config {config} --decode 1 3 --prefill 100 --tokens 3 --positions 7"
    monkeypatch.setattr("sys.argv", [*command.split(), "--state-memory-gb", "0.02"])
    quantization.main()
    (path,) = tmp_path.glob("quantization-tiny-*.json")
    rows = {row["work"]: row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 2 * 6
    for name, least, most in (("int8", 0.002, 0.1), ("fp8", 0.01, 0.3)):
        (whole,) = rows[f"{name}: weights"]["peers"].values()
        share = 2 if torch.cuda.is_available() else 4
        assert 1 < rows[f"{name}: weights"]["value"] / whole * share < 1.3
        for work in ("decode, 1 at once", "decode, 3 at once", "prefill of 100"):
            row = rows[f"{name}: {work}"]
            assert row["value"] > 0 and all(value > 0 for value in row["peers"].values())
        assert least < rows[f"{name}: logits"]["value"] < most
        assert 0 <= rows[f"{name}: likeliest token the same"]["value"] <= 1
