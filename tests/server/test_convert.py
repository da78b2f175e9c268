"""`steadystate convert` as a command: what it makes, and that it makes it whole or not at all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from model.weights import WeightsError, weight_files
from server.api.tokenizer import Tokenizer
from server.cli import main
from tests.releases import RELEASES
from tests.server.pieces import oracle_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    RELEASES["TransNormerLLM"].write(tmp_path / "source")
    (tmp_path / "source" / "LICENSE.md").write_text("as it was")
    return tmp_path / "source"


def test_a_release_becomes_a_checkpoint(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.parent / "deep" / "target"
    assert main(["convert", str(source), str(target)]) == 0
    assert {path.name for path in target.iterdir()} == {
        *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        *("model.safetensors.index.json", "config.json", "LICENSE.md"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    }
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert "tokenizer.json" in capsys.readouterr().out
    assert [path.name for path in target.parent.iterdir()] == ["target"], "nothing is left behind"


def test_the_tokenizer_is_the_same_either_way(source: Path) -> None:
    """Of the release's tokenizer.model, of the tokenizer.json, and the library's own."""
    target = source.parent / "target"
    assert main(["convert", str(source), str(target)]) == 0
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings
    tokenizers = Tokenizer(source), Tokenizer(target)
    for text in ("The state  is\n a slot", " 川 7,000"):
        want = oracle_of((source / "tokenizer.model").read_bytes()).encode(text)
        for tokenizer in tokenizers:
            assert asyncio.run(tokenizer.encode(text, add_special_tokens=True)).tolist() == want
            assert tokenizer.decode(want) == text
    assert [tokenizer.eos_ids for tokenizer in tokenizers] == [(2,), (2,)]
    for tokenizer in tokenizers:
        tokenizer.close()


def test_pickles_are_not_served_but_pointed_out(source: Path) -> None:
    with pytest.raises(WeightsError, match="`steadystate convert` makes them of the pickles"):
        weight_files(source)


@pytest.mark.parametrize("harm", ["config", "target", "weights", "tokenizer"])
def test_what_is_wrong_is_told_and_leaves_nothing(
    source: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = source.parent / "target"
    if harm == "config":
        (source / "config.json").unlink()
    elif harm == "target":
        target.mkdir()
    elif harm == "weights":
        torch.save({"a": {1, 2}}, source / "pytorch_model-00002-of-00002.bin")
    else:
        (source / "tokenizer.model").write_text("nothing of the kind")
    assert main(["convert", str(source), str(target)]) == 1
    told = capsys.readouterr().err
    words = {
        "config": "no config.json in",
        "target": "is there already",
        "weights": "pytorch_model-00002-of-00002.bin",
        "tokenizer": "tokenizer.model is not a SentencePiece BPE model",
    }
    assert words[harm] in told
    assert not target.exists() or not list(target.iterdir())
    assert not list(source.parent.glob(".convert-*"))
