"""Weights on their way in: shard by shard, each tensor to its place, every mistake by its name."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model import progress, weights
from model.names import folded
from model.progress import Progress
from model.weights import Parameters, WeightsError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
NOTHING = re.compile(r"(?!)")
STATUS = Path("/proc/self/status")


def write_shards(path: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Files with an index that names them."""
    path.mkdir(exist_ok=True)
    names = [f"model-{i:05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / name)
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory: now, or with VmHWM the most there have been."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="measures by Linux's /proc")
@pytest.mark.parametrize(("shards", "megabytes"), [(2, 40), (6, 40), (2, 120)])
def test_host_memory_peaks_at_one_shard(tmp_path: Path, shards: int, megabytes: int) -> None:
    """What filling takes beside the parameters is one shard, however many there are."""
    rows, columns = megabytes * 250, 1000  # of float32
    parameters = Parameters(CPU, torch.float32)
    tensors = {f"t{i}": torch.full((rows, columns), float(i + 1)) for i in range(shards)}
    write_shards(tmp_path, [{name: tensor} for name, tensor in tensors.items()])
    for name in tensors:
        parameters.tensor(name, rows, columns).zero_()  # resident from here on
    del tensors
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident()
    parameters.fill(tmp_path, ignore=NOTHING)
    growth = resident("VmHWM") - before
    assert growth < 1.25 * megabytes * 1e6 + 8e6
    for i in range(shards):
        assert (parameters.places[f"t{i}"] == i + 1).all()


@pytest.mark.parametrize("piece", [1, 600, 1 << 30])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_pieces_of_any_size_make_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, kind: torch.dtype
) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    tensors = {
        "a": torch.randn(7, 50),
        "b": torch.randn(3, 50),
        "c": torch.randn(9),
        "d": torch.ones(()),
    }
    write_shards(tmp_path, [{name: tensor.to(kind) for name, tensor in tensors.items()}])
    parameters = Parameters(DEVICE, torch.float32)
    joined = parameters.rows([("a", 7), ("b", 3)], 50)
    vector, scalar = parameters.tensor("c", 9), parameters.tensor("d")
    parameters.fill(tmp_path, ignore=NOTHING)
    want = torch.cat((tensors["a"], tensors["b"])).to(kind).float()
    assert (joined.cpu() == want).all()
    assert (vector.cpu() == tensors["c"].to(kind).float()).all() and scalar == 1


def test_a_file_that_cannot_be_mapped_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, [{"a": torch.ones(4)}, {"b": torch.ones(4)}])
    real, backends = weights.safe_open, []

    def unmapped(*args: Any, **options: Any) -> Any:
        backends.append(options.get("backend"))
        if backends[-1] != "pread":
            raise OSError("cannot allocate memory")
        return real(*args, **options)

    monkeypatch.setattr(weights, "safe_open", unmapped)
    parameters = Parameters(DEVICE, torch.float32)
    a, b = parameters.tensor("a", 4), parameters.tensor("b", 4)
    parameters.fill(tmp_path, ignore=NOTHING)
    assert backends == [None, "pread"] * 2 and (a == 1).all() and (b == 1).all()


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    extra = {f"layers.{i}.bias": torch.ones(1) for i in range(40)}
    tensors = {
        "shape": torch.ones(3),
        "kind": torch.ones(4, dtype=torch.int8),
        "buffer": torch.ones(1),
    }
    write_shards(tmp_path, [tensors, extra])
    parameters = Parameters(CPU, torch.float32)
    parameters.tensor("shape", 4)
    parameters.tensor("kind", 4)
    for layer in range(30):
        for expert in range(8):
            if (layer, expert) != (3, 5):
                parameters.tensor(f"layers.{layer}.experts.{expert}.w1", 2)
    with pytest.raises(WeightsError) as caught:
        parameters.fill(tmp_path, ignore=re.compile("buffer"))
    message = str(caught.value)
    assert "shape: shape (3,), (4,) is due" in message
    assert "kind: dtype I8, one of F64, F32, F16, BF16 is due" in message
    assert "left over: layers.{0-39}.bias" in message
    assert "missing: layers.{0-29}.experts.{0-4,6-7}.w1" in message
    assert "missing: layers.{0-2,4-29}.experts.5.w1" in message
    assert "buffer" not in message


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"a": torch.ones(4)}, {"a": torch.zeros(4)}])
    (tmp_path / "model.safetensors.index.json").unlink()
    parameters = Parameters(CPU, torch.float32)
    parameters.tensor("a", 4)
    with pytest.raises(WeightsError, match=r"a: twice, again in model-00001\.safetensors"):
        parameters.fill(tmp_path, ignore=NOTHING)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "weight_map must be an object"),
        ("{}", "weight_map must be an object"),
        ('{"weight_map": ["model-00000.safetensors"]}', "weight_map must be an object"),
        ('{"weight_map": {"a": 3}}', "weight_map must be an object"),
        ('{"weight_map": {"a": "../model-00000.safetensors"}}', "not in its directory"),
        ('{"weight_map": {"a": ".."}}', "not in its directory"),
        ('{"weight_map": {"a": ""}}', "not in its directory"),
        ('{"weight_map": {"a": "other.safetensors"}}', "other.safetensors is named in the index"),
        ('{"weight_map": {}}', r"no \*\.safetensors file"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str, reason: str) -> None:
    write_shards(tmp_path, [{"a": torch.ones(4)}])
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=reason):
        weights.weight_files(tmp_path)


def test_folded_names_spell_all_names_and_no_other() -> None:
    names = {f"a.{i}.b.{j}" for i in range(9) for j in range(i % 3, 7)} | {
        "a.b",
        "c.7",
        "c.08",
        "a.1.b",
    }
    spelt: set[str] = set()
    for line in folded(names):
        options = [""]
        for text, ranges in re.findall(r"([^{]*)(?:{([^}]*)})?", line):
            numbers = [""]
            if ranges:
                spans = [[int(n) for n in span.split("-")] for span in ranges.split(",")]
                numbers = [str(n) for span in spans for n in range(span[0], span[-1] + 1)]
            options = [a + text + n for a in options for n in numbers]
        assert not spelt & set(options)
        spelt |= set(options)
    assert spelt == names and len(folded(names)) == 7


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"a": torch.ones(1000)}])
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    parameters = Parameters(CPU, torch.float32)
    parameters.tensor("a", 1000)
    with pytest.raises(WeightsError, match=path.name):
        parameters.fill(tmp_path, ignore=NOTHING)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [{"a": torch.ones(4)}])
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    parameters = Parameters(CPU, torch.float32)
    parameters.tensor("a", 4)
    parameters.fill(tmp_path, ignore=NOTHING)
    assert "weights: 100%|" in screen.getvalue()


def test_progress_is_log_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with (
        caplog.at_level(logging.INFO, "model"),
        Progress(desc="weights", total=2e9, unit="B", unit_scale=True) as bar,
    ):
        bar.update(1e9)
        bar.update(1e9)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in lines] == [
        "weights: 1.00GB of 2.00GB",
        "weights: 2.00GB of 2.00GB",
    ]
    assert screen.getvalue() == ""
