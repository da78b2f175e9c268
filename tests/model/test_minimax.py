"""MiniMax against transformers' own, and against itself: chunked, batched, preempted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import store
from model.batch import Batch
from model.chunk import Chunk, Copy, Place, Sampling
from model.config import ConfigError
from model.runner import ModelRunner, load_runner
from model.weights import WeightsError
from tests.model.checkpoints import LIGHTNING, SOFTMAX, oracle_logits, write

VARIANTS = {
    "dense-lightning": {
        "layer_types": [LIGHTNING] * 4,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    },
    "moe-lightning": {"layer_types": [LIGHTNING] * 4},
    "hybrid": {},
    "hybrid-softmax-first": {"layer_types": [SOFTMAX, LIGHTNING, LIGHTNING, SOFTMAX]},
    "windowed": {"sliding_window": 24, "num_local_experts": 1, "num_experts_per_tok": 1},
    "ring": {"layer_types": [LIGHTNING, SOFTMAX, LIGHTNING, LIGHTNING]},
    "tied": {"tie_word_embeddings": True},
    "six-heads": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
}
GREEDY = Sampling(temperature=0.0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path, **options: object) -> ModelRunner:
    return load_runner(
        path,
        device=DEVICE,
        dtype="float32",
        max_running=8,
        state_memory_gb=0.02,
        **options,  # type: ignore[arg-type]
    )


class Sequence:
    """A sequence in a slot, with blocks where the model has them."""

    def __init__(self, runner: ModelRunner, ids: list[int], slot: int) -> None:
        self.runner, self.ids, self.slot, self.done = runner, ids, slot, 0
        c = runner.capacity
        per = -(-c.blocks // c.slots) if c.blocks else 0
        self.all_blocks = list(range(slot * per, min((slot + 1) * per, c.blocks)))
        random.Random(slot).shuffle(self.all_blocks)

    def chunk(self, n: int) -> Chunk:
        """The next n tokens; the last row is asked for."""
        start, self.done = self.done, self.done + n
        size = self.runner.capacity.block_size
        blocks = self.all_blocks[: -(-self.done // size)] if size else []
        return Chunk(
            tokens=self.ids[start : self.done],
            start=start,
            slot=self.slot,
            blocks=blocks,
            sampling=GREEDY,
        )


@torch.inference_mode()
def logits_of(runner: ModelRunner, chunks: list[Chunk]) -> torch.Tensor:
    """Logits of the last row of each chunk, in the chunks' order (singles must come first)."""
    runner.sequences.keep(chunks)
    return runner.model.forward(Batch.pack(chunks, runner.sequences), runner.store).cpu()


def prompt(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp(request.param)
    oracle = write(path, **VARIANTS[request.param])
    ring = 5 if request.param == "ring" else 0
    return oracle, load(path, ring=ring)


@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
def test_logits_equal_transformers(pair, length: int) -> None:  # type: ignore[no-untyped-def]
    oracle, runner = pair
    ids = prompt(length)
    got = logits_of(runner, [Sequence(runner, ids, 3).chunk(length)])[0]
    torch.testing.assert_close(got, oracle_logits(oracle, ids)[-1], atol=1e-4, rtol=1e-4)


def test_decoding_equals_transformers_at_every_position(pair) -> None:  # type: ignore[no-untyped-def]
    oracle, runner = pair
    ids = prompt(80)
    want = oracle_logits(oracle, ids)
    sequence = Sequence(runner, ids, 1)
    got = [logits_of(runner, [sequence.chunk(40)])[0]]
    got += [logits_of(runner, [sequence.chunk(1)])[0] for _ in range(40)]
    torch.testing.assert_close(torch.stack(got), want[39:], atol=1e-4, rtol=1e-4)


def test_every_split_equals_the_whole(pair) -> None:  # type: ignore[no-untyped-def]
    _, runner = pair
    ids = prompt(50)
    whole = logits_of(runner, [Sequence(runner, ids, 0).chunk(50)])[0]
    for cut in range(1, 50):
        sequence = Sequence(runner, ids, cut % 8)
        sequence_rows = [logits_of(runner, [sequence.chunk(n)])[0] for n in (cut, 50 - cut)]
        torch.testing.assert_close(sequence_rows[-1], whole, atol=2e-5, rtol=1e-4)


def test_batch_equals_each_alone_in_both_orders(pair) -> None:  # type: ignore[no-untyped-def]
    """Decode rows, a one-token prompt, and prompt chunks of unequal length in one step."""
    _, runner = pair
    texts = [prompt(n, seed=n) for n in (31, 90, 1, 65, 130)]
    heads = [30, 40, 0, 64, 0]
    alone = []
    for text, head in zip(texts, heads, strict=True):
        sequence = Sequence(runner, text, 5)
        if head:
            logits_of(runner, [sequence.chunk(head)])
        alone.append(logits_of(runner, [sequence.chunk(len(text) - head)])[0])
    for order in ([0, 3, 2, 1, 4], [2, 3, 0, 4, 1]):
        runner.store.slots.poison()
        sequences = [Sequence(runner, text, slot) for slot, text in enumerate(texts)]
        for sequence, head in zip(sequences, heads, strict=True):
            if head:
                logits_of(runner, [sequence.chunk(head)])
        chunks = [sequences[i].chunk(len(texts[i]) - heads[i]) for i in order]
        together = logits_of(runner, chunks)
        for row, i in enumerate(order):
            torch.testing.assert_close(together[row], alone[i], atol=2e-5, rtol=1e-4)


def test_saved_and_restored_bit_for_bit(pair, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    _, runner = pair
    monkeypatch.setattr(store, "PIECE_BYTES", max(runner.capacity.block_bytes, 1))
    ids = prompt(90)
    undisturbed = Sequence(runner, ids, 0)
    logits_of(runner, [undisturbed.chunk(80)])
    want = [logits_of(runner, [undisturbed.chunk(5)]) for _ in range(2)]

    first, second = Sequence(runner, ids, 0), Sequence(runner, ids, 6)
    logits_of(runner, [first.chunk(80)])
    blocks = tuple(first.chunk(0).blocks) if runner.capacity.blocks else ()
    second.done = first.done
    targets = tuple(second.chunk(0).blocks) if runner.capacity.blocks else ()
    runner.copy([Copy(Place(slot=0, blocks=blocks, position=80), Place(key="a", position=80))])
    runner.store.slots.poison()
    runner.store.blocks.poison()
    runner.copy(
        [
            Copy(Place(key="a"), Place(slot=6, blocks=targets, position=80)),
            Copy(Place(key="a"), None),
        ]
    )
    assert runner.saved == {}
    got = [logits_of(runner, [second.chunk(5)]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_step_draws_greedily_and_keeps_the_order_of_the_chunks(pair) -> None:  # type: ignore[no-untyped-def]
    oracle, runner = pair
    long, short = prompt(33, seed=5), prompt(12, seed=6)
    one, two = Sequence(runner, long, 2), Sequence(runner, short, 4)
    logits_of(runner, [two.chunk(11)])
    silent = one.chunk(20)
    silent.sampling = None
    results = runner.step([silent, two.chunk(1)])
    assert results[0] is None and results[1] is not None
    assert results[1].token == int(oracle_logits(oracle, short)[-1].argmax())
    results = runner.step([one.chunk(13)])
    assert results[0] is not None
    assert results[0].token == int(oracle_logits(oracle, long)[-1].argmax())


def test_pure_and_windowed_models_have_no_maximum_length(tmp_path: Path) -> None:
    write(tmp_path, **VARIANTS["windowed"])
    capacity = load(tmp_path).capacity
    assert (capacity.blocks, capacity.max_model_len) == (0, None)
    assert load(tmp_path, max_model_len=77).capacity.max_model_len == 77


def test_hybrid_is_bounded_by_its_blocks(tmp_path: Path) -> None:
    write(tmp_path, max_position_embeddings=10**9)
    capacity = load(tmp_path).capacity
    assert capacity.max_model_len == capacity.blocks * capacity.block_size > 0
    with pytest.raises(ConfigError, match=r"max_model_len is 1000000000, at most \d+ fit"):
        load(tmp_path, max_model_len=10**9)


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, **VARIANTS["dense-lightning"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.out_proj.weight"]
    tensors["model.layers.0.self_attn.surplus.weight"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, file)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "missing: model.layers.2.self_attn.out_proj.weight" in message
    assert "left over: model.layers.0.self_attn.surplus.weight" in message
    assert "model.norm.weight: shape (5,), (64,) is due" in message


def test_decay_buffers_in_the_file_are_ignored(tmp_path: Path) -> None:
    oracle = write(tmp_path, **VARIANTS["dense-lightning"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    buffers = [name for name in tensors if name.endswith(("slope_rate", "diagonal_decay"))]
    assert buffers, "transformers writes them"
    for name in buffers:
        tensors[name].fill_(float("nan"))
    save_file(tensors, file)
    runner = load(tmp_path)
    ids = prompt(50)
    got = logits_of(runner, [Sequence(runner, ids, 0).chunk(50)])[0]
    torch.testing.assert_close(got, oracle_logits(oracle, ids)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("hidden_act", "gelu"),
        ("num_attention_heads", "four"),
        ("layer_types", [LIGHTNING]),
        ("num_key_value_heads", 3),
    ],
)
def test_bad_config_names_the_field(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values[field] = value
    file.write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=field if field != "architectures" else "LlamaForCausalLM"
    ):
        load(tmp_path)
