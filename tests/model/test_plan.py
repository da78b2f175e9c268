"""The plan beside what is known of the released models, and beside what real runs allocate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import Fields
from model.plan import GPUS, Footprint, footprint, plan
from model.runner import load_runner
from tests.model.checkpoints import LIGHTNING, SOFTMAX, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUNDLED = Path(__file__).parents[2] / "model" / "bundled" / "recall"
MINIMAX = {
    "architectures": ["MiniMaxForCausalLM"],
    "hidden_size": 6144,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9216,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "vocab_size": 200_064,
    "layer_types": ([LIGHTNING] * 7 + [SOFTMAX]) * 10,
    "max_position_embeddings": 10_240_000,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "pure": {"layer_types": [LIGHTNING] * 4, "num_local_experts": 1, "num_experts_per_tok": 1},
    "windowed": {"sliding_window": 24},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def minimax() -> Footprint:
    return footprint(Fields(MINIMAX), ring=0)


def test_minimax_takes_what_is_known(minimax: Footprint) -> None:
    """Sizes of the released checkpoint's index, and the arithmetic of its state and KV."""
    gates = 80 * 32 * 6144  # which the release keeps in float32, and a run in bfloat16
    assert minimax.weights["none"] + gates * 2 == 912_210_767_872
    assert minimax.slot == 70 * 64 * 128 * 128 * 4 == 293_601_280
    assert minimax.block == 64 * 40_960
    assert (minimax.layers, minimax.full_token, minimax.pays_off) == (80, 327_680, 1024)
    assert minimax.sequence(1 << 20) == pytest.approx(43.2e9, rel=2e-3)
    assert minimax.sequence(1 << 22) == pytest.approx(172.1e9, rel=2e-3)
    assert minimax.sequence(65) - minimax.slot == 2 * minimax.block


def test_quantised_weights(minimax: Footprint) -> None:
    """A byte an element and a scale an output channel; embedding, head, routers, norms as ever."""
    kept = 2 * 200_064 * 6144 * 2 + 80 * 32 * 6144 * 2 + (161 * 6144 + 70 * 8192) * 2
    lightning, softmax = 6144 * (24_576 + 8192 + 8192), 6144 * (2 * 8192 + 2 * 1024)
    elements = 70 * lightning + 10 * softmax + 80 * 32 * 3 * 6144 * 9216
    channels = 70 * (24_576 + 8192 + 6144) + 10 * (8192 + 2048 + 6144) + 80 * 32 * 24_576
    for name in ("int8", "fp8"):
        assert minimax.weights[name] == kept + elements + 4 * channels
    assert minimax.weights["none"] == kept + 2 * elements


def test_dtypes_of_weights_and_states(minimax: Footprint) -> None:
    wide, small = (
        footprint(Fields(MINIMAX), dtype="float32", ring=0),
        footprint(Fields(MINIMAX), state_dtype="bfloat16", ring=0),
    )
    assert wide.weights["none"] == 2 * minimax.weights["none"]
    assert wide.block == 2 * minimax.block and wide.slot == minimax.slot
    assert small.slot * 2 == minimax.slot and small.block == minimax.block
    ringed = footprint(Fields(MINIMAX))  # as on CUDA
    assert ringed.slot - minimax.slot >= 70 * 64 * 16 * 256 * 2


def test_minimax_wants_eight_h200(minimax: Footprint) -> None:
    for gpus, fits in ((1, False), (4, False), (8, True)):
        made = plan(minimax, gpu_bytes=GPUS["h200"], gpus=gpus)
        assert (made.fits, made.gpus_needed) == (fits, 8)
        assert made.fits or not any(row.sequences for row in made.rows)
    eight = {row.context: row for row in plan(minimax, gpu_bytes=GPUS["h200"], gpus=8).rows}
    assert 2 <= eight[1 << 20].sequences <= 4 and eight[1 << 20].full_sequences == 0
    assert plan(minimax, gpu_bytes=GPUS["h200"], gpus=8, quantization="int8").gpus_needed == 4


@pytest.mark.parametrize("gpus", [8, 16, 32])
@pytest.mark.parametrize("max_running", [1, 7, 256])
def test_what_fits_fits(minimax: Footprint, gpus: int, max_running: int) -> None:
    """Every row's sequences have room, one more would not, as a run would divide it."""
    made = plan(minimax, gpu_bytes=GPUS["h200"], gpus=gpus, max_running=max_running)
    assert made.slots * made.slot + made.blocks * made.block <= made.budget
    for row in made.rows:
        each = made.slot + -(-row.context // 64) * made.block
        assert row.sequences * each <= made.budget
        crowded = (row.sequences + 1) * each > made.budget
        assert crowded or (row.sequences + 1) * made.slot > made.budget // 2
    if made.longest:
        assert made.slots == max_running
        assert max_running * (made.longest // 64) <= made.blocks
        bounded = made.longest == minimax.max_positions
        assert bounded or max_running * (made.longest // 64 + 1) > made.blocks


def test_a_pure_model_has_no_longest_context() -> None:
    fields = Fields(MINIMAX | {"layer_types": [LIGHTNING] * 80})
    pure = footprint(fields)
    made = plan(pure, gpu_bytes=GPUS["b200"], gpus=8)
    assert (pure.block, pure.kv_heads, made.longest, made.slots) == (0, 8, None, 256)
    assert len({row.bytes for row in made.rows}) == 1 and len(made.rows) == 6


def held(thing: object, seen: dict[int, int]) -> None:
    """Bytes of every storage that a model holds, by its address."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        held(list(thing.values()), seen)
    elif isinstance(thing, list | tuple):
        for item in thing:
            held(item, seen)
    elif type(thing).__module__.startswith(("model.", "kernels.")):
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        held([getattr(thing, name) for name in slots], seen)
        held(getattr(thing, "__dict__", {}), seen)


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("bfloat16", "fp8")],
)
@pytest.mark.parametrize("name", [*VARIANTS, "recall"])
def test_a_run_allocates_what_is_planned(
    tmp_path: Path, name: str, dtype: str, quantization: str
) -> None:
    path = BUNDLED
    if name != "recall":
        path = tmp_path
        write(path, **VARIANTS[name])
    ring = 16 if dtype == "bfloat16" else 0
    taken = footprint(Fields.read(path), dtype=dtype, ring=ring)
    options = {"dtype": dtype, "ring": ring, "state_memory_gb": 0.02, "max_running": 6}
    runner = load_runner(path, device=DEVICE, quantization=quantization, **options)  # type: ignore[arg-type]
    capacity, store = runner.capacity, runner.store
    assert runner.parameters is not None
    assert runner.parameters.nbytes == taken.weights[quantization]
    weights: dict[int, int] = {}
    held(runner.model, weights)
    assert sum(weights.values()) == pytest.approx(taken.weights[quantization], rel=0.03)
    assert (capacity.state_bytes, capacity.block_bytes) == (taken.slot, taken.block)
    assert store.slots.memory.nbytes == capacity.slots * taken.slot
    assert store.blocks.memory.nbytes == capacity.blocks * taken.block
    assert (taken.vocab_size, taken.max_positions) == (
        runner.model.vocab_size,
        runner.model.max_positions,
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="what is left of a GPU can be told on one only")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="others take of the GPU meanwhile")
@pytest.mark.parametrize("name", ["hybrid", "pure"])
def test_what_is_left_of_a_gpu(tmp_path: Path, name: str) -> None:
    write(tmp_path, **VARIANTS[name])
    total = torch.cuda.mem_get_info()[1]
    taken = footprint(Fields.read(tmp_path))
    made = plan(taken, gpu_bytes=total, memory_fraction=0.5, max_running=1 << 14)
    runner = load_runner(tmp_path, device="cuda", memory_fraction=0.5, max_running=1 << 14)
    capacity = runner.capacity
    if capacity.blocks:
        allocated = capacity.slots * taken.slot + capacity.blocks * taken.block
        assert allocated == pytest.approx(made.budget, rel=0.03)
    assert capacity.slots == pytest.approx(made.slots, rel=0.03)
    assert capacity.blocks == pytest.approx(made.blocks, rel=0.03)


def test_what_is_not_served_is_said() -> None:
    with pytest.raises(ValueError, match="'LlamaForCausalLM' is not served"):
        footprint(Fields({"architectures": ["LlamaForCausalLM"]}))


def test_a_plan_is_plain_data(minimax: Footprint) -> None:
    """So that the command writes it as JSON."""
    import msgspec

    made = plan(minimax, gpu_bytes=GPUS["h200"])
    assert json.loads(msgspec.json.encode(made))["footprint"]["slot"] == minimax.slot
