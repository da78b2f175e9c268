"""What the runner does with memory: how it divides it, bounds lengths by it, and runs out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.batch import Batch
from model.chunk import Capacity, Chunk, OutOfDeviceMemory, Runner, Sampling
from model.config import ConfigError
from model.families import forward
from model.runner import BLOCK_SIZE, ModelRunner, divide, load_runner, longest
from model.store import Field, Rows
from model.weights import WeightsError, fingerprint
from tests.model.checkpoints import LIGHTNING, write

CPU = torch.device("cpu")
DENSE = {"layer_types": [LIGHTNING] * 4, "num_local_experts": 1, "num_experts_per_tok": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    write(directory, **DENSE)
    return directory


def load(path: Path, **options: object) -> ModelRunner:
    return load_runner(path, device="cpu", state_memory_gb=0.01, max_running=4, **options)  # type: ignore[arg-type]


def test_it_is_a_runner(path: Path) -> None:
    runner: Runner = load(path)
    capacity = runner.capacity
    assert isinstance(capacity, Capacity)
    assert (capacity.slots, capacity.vocab_size, capacity.device) == (4, 97, "cpu")
    assert capacity.state_bytes == 4 * 4 * 16 * 16 * 4
    assert runner.device_memory() > 0
    free, total = runner.device_room()
    assert 0 < free < total


def test_a_bfloat16_state_is_half_as_large_and_close(path: Path) -> None:
    exact, small = load(path), load(path, state_dtype="bfloat16")
    assert small.capacity.state_bytes * 2 == exact.capacity.state_bytes
    ids = [i * 37 % 97 for i in range(300)]
    batch = Batch.pack([Chunk(tokens=ids, start=0, slot=1, sampling=Sampling())], exact.sequences)
    again = Batch.pack([Chunk(tokens=[5], start=300, slot=1, sampling=Sampling())], exact.sequences)
    with torch.inference_mode():
        for model, store in ((exact.model, exact.store), (small.model, small.store)):
            forward(model, batch, store)
        want, got = (forward(r.model, again, r.store) for r in (exact, small))
    error = (got - want).norm() / want.norm()
    assert 0 < error < 0.02


def test_budget_is_divided() -> None:
    assert divide(1000, 100, 0, 256) == (10, 0)
    assert divide(10_000, 100, 0, 7) == (7, 0)
    assert divide(10_000, 100, 50, 20) == (20, 160)
    assert divide(10_000, 1000, 50, 256) == (5, 100)
    for budget, block in ((99, 0), (150, 50)):
        with pytest.raises(ConfigError, match=f"state memory of {budget} bytes is too little"):
            divide(budget, 100, block, 4)


def test_lengths_are_bounded_by_what_bounds_them() -> None:
    assert longest(None, 0, None) is None
    assert longest(5000, 0, None) == 5000
    assert longest(None, 10, None) == 10 * BLOCK_SIZE
    assert longest(None, 10, 100) == 100
    with pytest.raises(ConfigError, match="max_model_len is 641, at most 640 fit"):
        longest(10 * BLOCK_SIZE + 1, 10, None)


def test_running_out_of_memory_is_told_and_survived(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = load(path)
    greedy = Sampling(temperature=0.0)
    chunk = Chunk(tokens=[1, 2, 3], start=0, slot=0, sampling=greedy)
    before = runner.step([chunk])

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "finish", fail)
        with pytest.raises(OutOfDeviceMemory, match="CUDA out of memory"):
            runner.step([chunk])
    assert runner.step([chunk]) == before


def test_slots_begin_poisoned(path: Path) -> None:
    """Whatever reads a slot before it is written would see NaN, in every field."""
    store = load(path).store
    assert all(view.isnan().all() for view in store.slots.views.values())


def test_rows_do_not_overlap() -> None:
    fields = [Field("a", (3,), torch.float32), Field("b", (5, 7), torch.bfloat16)]
    rows = Rows(fields, 2, torch.device("cpu"))
    rows.views["a"].fill_(1)
    rows.views["b"][1].fill_(2)
    assert (rows.views["a"] == 1).all() and (rows.views["b"][1] == 2).all()
    assert rows.views["b"][0].isnan().all() and rows.bytes % 256 == 0


def test_fingerprint_names_the_checkpoint(path: Path, tmp_path: Path) -> None:
    write(tmp_path, seed=1, **DENSE)
    assert fingerprint(path) == fingerprint(path) != fingerprint(tmp_path)


def test_a_directory_without_weights_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load(tmp_path)
    for text, reason in (("{", "is not JSON"), ("[]", "holds a list, an object is due")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json {reason}"):
            load(tmp_path)
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"no \*\.safetensors file"):
        load(tmp_path)
