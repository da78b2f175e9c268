"""Pickles to safetensors: what is in them arrives, and what could run does not load."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.convert import convert_weights
from model.weights import WeightsError

BIG = torch.arange(12.0).view(3, 4)


def shards(directory: Path) -> dict[str, torch.Tensor]:
    """Two pickles with an index, in bfloat16 and float32, a transposed view among them."""
    one = {"model.a.weight": BIG.bfloat16(), "model.b.theta": torch.randn(2, 1, 3)}
    two = {"model.c.weight": BIG.t(), "model.d.weight": torch.randn(8)[2:5]}
    weight_map = {}
    for i, part in enumerate((one, two), 1):
        name = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return one | two


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def test_shards_become_shards(tmp_path: Path, made: Path) -> None:
    want = shards(tmp_path)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert convert_weights(tmp_path, made) == names
    got = load_file(made / names[0]) | load_file(made / names[1])
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.c.weight"] == names[1]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_one_file_in_either_format_and_a_tied_head(
    tmp_path: Path, made: Path, zipped: bool
) -> None:
    tensors = {"model.embed_tokens.weight": BIG, "lm_head.weight": BIG, "twin": BIG.clone()}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert convert_weights(tmp_path, made) == ["model.safetensors"]
    got = load_file(made / "model.safetensors")
    assert got.keys() == {"model.embed_tokens.weight", "twin"}
    assert not (made / "model.safetensors.index.json").exists()


class Harm:
    """Runs where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code in a pickle ran')",)


@pytest.mark.parametrize("how", ["zip", "old", "plain"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, made: Path, how: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    harm = {"a": BIG, "b": Harm()}
    if how == "plain":
        path.write_bytes(pickle.dumps(harm, protocol=2))
    else:
        torch.save(harm, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin does not load safely: .* global"
    ) as e:
        convert_weights(tmp_path, made)
    assert "weights_only" not in str(e.value)  # no advice to load it another way
    assert list(made.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([BIG], "holds a list"),
        ({"state_dict": {"a": BIG}}, "'state_dict' is a dict"),
        ({"a": BIG, "step": 3}, "'step' is a int"),
        ({"a": BIG.to_sparse()}, "a is sparse"),
        ({"a": BIG.to("meta")}, "a is sparse, quantised or empty"),
        ({}, r"no tensors in pytorch_model\.bin"),
    ],
)
def test_other_content_is_named(tmp_path: Path, made: Path, content: object, why: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=why):
        convert_weights(tmp_path, made)


def test_a_tensor_twice_and_files_elsewhere_are_refused(tmp_path: Path, made: Path) -> None:
    shards(tmp_path)
    torch.save({"model.a.weight": BIG}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(WeightsError, match=r"model\.a\.weight is in model-00001-of-00002"):
        convert_weights(tmp_path, made)
    index = tmp_path / "pytorch_model.bin.index.json"
    for name in ("../secret.bin", "pytorch_model-00009.bin"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(WeightsError, match="not in its directory"):
            convert_weights(tmp_path, made)


def test_safetensors_are_copied(tmp_path: Path, made: Path) -> None:
    (tmp_path / "source").mkdir()
    shards(tmp_path / "source")
    convert_weights(tmp_path / "source", made)
    again = tmp_path / "again"
    again.mkdir()
    names = convert_weights(made, again)
    files = [*names, "model.safetensors.index.json"]
    assert all((again / n).read_bytes() == (made / n).read_bytes() for n in files)
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file"):
        convert_weights(tmp_path, again)
