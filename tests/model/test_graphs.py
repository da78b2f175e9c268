"""Steps whose ids the host does not know yet, and steps that are CUDA graphs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from model.chunk import PENDING, Chunk, Copy, Place, Sampling
from model.graphs import DecodeGraphs, Exchange, Rows, ladder
from model.runner import ModelRunner, load_runner
from model.sampling import Wishes, noise_keys
from model.sequences import Sequences
from model.staging import IN_FLIGHT, Staging
from tests.model.captured import eager
from tests.model.checkpoints import write
from tests.model.harness import STEP_TOKENS
from tests.model.test_runner import DENSE

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")
WARM = Sampling(temperature=0.9, seed=3)


def test_the_ladder_ends_where_it_must() -> None:
    for most in (1, 2, 3, 16, 17, 100, 512):
        sizes = ladder(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(b - a <= max(8, a // 8) for a, b in pairwise(sizes))
        assert {1 << i for i in range(10) if 1 << i <= most} <= {*sizes}


def test_tables_follow_their_slots() -> None:
    on = Sequences(3, 4, CPU)

    def tables(*slots: int) -> list[list[int]]:
        return [on.tables[slot].tolist() for slot in slots]

    def chunk(slot: int, start: int, *blocks: int) -> Chunk:
        return Chunk(tokens=[1], start=start, slot=slot, blocks=blocks)

    on.keep([chunk(0, 0, 7, 8), chunk(2, 0, 5)])
    assert tables(2, 0) == [[5, -1, -1, -1], [7, 8, -1, -1]]
    on.keep([chunk(0, 128, 7, 8, 9), chunk(2, 1, 5)])
    assert tables(0)[0][:3] == [7, 8, 9]
    on.keep([chunk(0, 0, 3)])  # another sequence
    on.keep([chunk(2, 90, 6, 4)])  # another one that was restored there
    assert tables(0)[0][0] == 3 and tables(2)[0][:2] == [6, 4]
    on.forget(2)
    on.keep([chunk(2, 90, 6, 1)])
    assert tables(2)[0][:2] == [6, 1]


def test_what_a_step_is_told_follows_its_slots() -> None:
    """Whoever comes to a slot draws as it asks, not as the one before it did."""
    wishes = Wishes(4)
    on = Exchange(6, wishes, Sequences(4, 0, CPU))
    on._staging._said.fill_(0x4120_0000_4120_0000)  # what others left: no id, and twice 10.0

    def take(chunks: list[Chunk], size: int) -> Rows:
        on.say(chunks, size)
        rows = on.take(size)
        on.heard()
        return rows

    cold, tepid = Sampling(temperature=0.0, seed=-1), Sampling(temperature=1e-6, seed=2**63)
    assert take([], 6).slots.tolist() == [-1] * 6
    for turn, kinds in enumerate([(WARM, cold), (WARM, tepid), (cold, WARM), (tepid, tepid)]):
        chunks = [
            Chunk(tokens=[7 + slot], start=9 + turn, slot=slot, sampling=kind, generated=turn)
            for slot, kind in zip((3, 1), kinds, strict=True)
        ]
        rows = take(chunks, 4)
        assert rows.ids.tolist() == [10, 8, 0, 0]
        assert rows.positions.tolist() == [9 + turn] * 2 + [0, 0]
        assert rows.slots.tolist() == [3, 1, -1, -1]
        assert rows.keys.tolist()[:2] == noise_keys(chunks).tolist()
        warm = [0.9 if kind is WARM else 0.0 for kind in kinds]
        assert rows.temperatures.tolist() == pytest.approx([*warm, 0, 0])
        assert wishes.plain(chunks)


def test_what_a_step_tells_is_read_after_others_were_launched() -> None:
    """As many as may be under way: each tells where nobody else does, and the next one goes on."""
    on = Exchange(3, Wishes(3), Sequences(3, 0, CPU))
    begun = [Chunk(tokens=[5], start=0, slot=slot) for slot in (2, 0)]
    pending = [Chunk(tokens=[PENDING], start=1, slot=slot) for slot in (0, 2, 1)]
    on.say(begun, 2)
    on.tell(torch.tensor([70, -1]), on.take(2))  # one whose logits were not finite goes on from 0
    heard = [on.heard()]
    for step in range(1, IN_FLIGHT):
        on.say(pending, 3)
        rows = on.take(3)
        assert rows.ids.tolist() == ([0, 70, 0] if step == 1 else [10 * step - 10, step - 1, 7])
        on.tell(torch.tensor([10 * step, step, 7]), rows)
        heard.append(on.heard())
    assert heard[0].tolist()[:2] == [70, -1]
    assert [ids.tolist() for ids in heard[1:]] == [[10 * n, n, 7] for n in range(1, IN_FLIGHT)]


@pytest.mark.parametrize("most", [1, 5, 9])
def test_parts_of_every_size_lie_apart_and_aligned(most: int) -> None:
    """Said as far ahead as turns go, of sizes by turns, and taken in order."""
    on = Staging(lambda n: ((n, 1, n), (n, 3)), most, Sequences(4, 0, CPU))
    sizes = [1 + n % most for n in range(5 * IN_FLIGHT)]
    said: list[list[list[int]]] = []
    for turn, size in enumerate(sizes):
        parts = on.next(size)
        for number, part in enumerate(parts):
            part[:] = range(100 * number + turn, 100 * number + turn + len(part))
        assert [len(part) for part in parts] == [size, 1, size, size, 3]
        said.append([part.tolist() for part in parts])
        assert on.launched() == turn % IN_FLIGHT
        if len(said) < IN_FLIGHT and turn + 1 < len(sizes):
            continue
        for ahead, words in enumerate(said):  # launched long ago, and carried out now
            taken = on.take(sizes[turn + 1 - len(said) + ahead])
            assert [x.tolist() for x in taken] == words
            assert all(x.data_ptr() % 16 == 0 for x in taken)
            assert [x.dtype for x in taken] == [torch.int64] * 3 + [torch.int32] * 2
        said.clear()


def test_a_step_that_is_not_launched_leaves_the_turn_to_the_next() -> None:
    on = Exchange(2, Wishes(2), Sequences(2, 0, CPU))
    for id in (5, 6):
        on.say([Chunk(tokens=[id], start=0, slot=1)], 1)
    rows = on.take(1)
    on.tell(torch.tensor([9]), rows)
    assert rows.ids.tolist() == [6] and on.heard()[:1].tolist() == [9]


STEERED = (
    {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 0}, {"logit_bias": {1: 1.0}},
    {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1},
)  # fmt: skip


@pytest.mark.parametrize("options", STEERED, ids=lambda options: next(iter(options)))
def test_steered_rows_are_known_as_long_as_they_stay(options: dict[str, float]) -> None:
    wishes = Wishes(3)

    def plain(*kinds: Sampling | None, suppress: tuple[int, ...] = ()) -> bool:
        chunks = [
            Chunk(tokens=[1], start=1, slot=slot, sampling=kind, suppress=suppress)
            for slot, kind in enumerate(kinds)
        ]
        wishes.take(chunks)
        return wishes.plain(chunks)

    steered = Sampling(**options)  # type: ignore[arg-type]
    assert plain(WARM, None) and not plain(WARM, WARM, suppress=(5,))
    assert not plain(WARM, steered) and not plain(steered, WARM)
    assert plain(WARM, WARM) and not plain(WARM, WARM, steered)
    assert plain(WARM, WARM), "a slot that has no part in the step does not count"
    assert plain(WARM, WARM, None)


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    write(directory, **(DENSE if request.param == "dense" else {}))
    return directory


def load(path: Path, ring: int = 0, host_bytes: int = 0) -> ModelRunner:
    options = {"dtype": "float32", "state_memory_gb": 0.02, "max_running": 6}
    options["max_step_tokens"] = STEP_TOKENS
    return load_runner(path, ring=ring, host_bytes=host_bytes, **options)  # type: ignore[arg-type]


def generate(
    runner: ModelRunner, prompts: list[list[int]], steps: int, known: bool
) -> list[list[int]]:
    """Tokens of sequences that decode together; the host knows the ids of a step or not yet."""
    blocks = [range(8 * i, 8 * i + 8) if runner.capacity.blocks else () for i in range(6)]
    slots = [4, 1, 3, 0, 5][: len(prompts)]
    launched = runner.launch(
        [
            Chunk(tokens=prompt, start=0, slot=slot, blocks=blocks[slot], sampling=WARM)
            for prompt, slot in zip(prompts, slots, strict=True)
        ]
    )
    drawn: list[list[int]] = [[] for _ in prompts]
    for step in range(steps):
        ids = [PENDING] * len(prompts)
        before = launched
        if known:
            for tokens, sampled in zip(drawn, runner.collect(before), strict=True):
                tokens.append(sampled.token if sampled else -1)
            ids = [tokens[-1] for tokens in drawn]
        launched = runner.launch(
            [
                Chunk(
                    tokens=[id],
                    start=len(prompt) + step,
                    slot=slot,
                    blocks=blocks[slot],
                    sampling=WARM,
                    generated=step + 1,
                    prompt=False,
                )
                for id, prompt, slot in zip(ids, prompts, slots, strict=True)
            ]
        )
        if not known:
            for tokens, sampled in zip(drawn, runner.collect(before), strict=True):
                tokens.append(sampled.token if sampled else -1)
    runner.collect(launched)
    return drawn


PROMPTS = [[5, 9, 2, 77], [31], [8] * 70]


def test_a_step_may_need_ids_that_the_host_has_not_read(path: Path) -> None:
    first, second = (generate(load(path), PROMPTS, 40, known) for known in (True, False))
    assert first == second and all(0 <= id < 97 for tokens in first for id in tokens)


@pytest.mark.parametrize("prompts", [PROMPTS, [[31], [5], [8]]], ids=["long", "of one token"])
def test_what_graphs_record_draws_what_eager_steps_draw(
    path: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    """The steps that are captured, run each time instead, with a row of padding. A prompt of one
    token is such a step too, in a slot that holds what nobody wrote."""
    expected = generate(load(path), prompts, 20, known=True)
    runner = load(path)
    graphs = DecodeGraphs(runner.model, runner.store, runner.sequences, 4)

    monkeypatch.setattr(graphs, "sizes", [4])
    monkeypatch.setattr(graphs, "_replay", eager(graphs))
    runner.graphs = graphs
    assert generate(runner, prompts, 20, known=False) == expected


@pytest.mark.skipif(not CUDA, reason="a CUDA graph")
@pytest.mark.parametrize("ring", [0, 8])
@pytest.mark.parametrize("prompts", [PROMPTS, [[31], [5], [8]]], ids=["long", "of one token"])
def test_graphs_draw_what_eager_steps_draw(path: Path, ring: int, prompts: list[list[int]]) -> None:
    runner = load(path, ring)
    assert runner.graphs is not None
    replayed = generate(runner, prompts, 40, known=False)
    untouched = runner.store.slots.views["state.0"][[0, 2, 5]]
    assert untouched.isnan().all()
    runner.graphs = runner.pieces = runner.ends = None
    assert generate(runner, prompts, 40, known=True) == replayed
    assert runner.store.slots.views["state.0"][[0, 2, 5]].isnan().all()


@pytest.mark.skipif(not CUDA, reason="what a GPU does")
def test_memory_pinned_for_states_outlives_the_capturing_of_graphs(path: Path) -> None:
    probe = load(path)
    if probe.capacity.blocks:
        pytest.skip("beside KV blocks a state has no one size")
    each = 1 << (probe.capacity.state_bytes - 1).bit_length()
    runner = load(path, host_bytes=3 * each + 1)
    assert runner.capacity.state_bytes == probe.capacity.state_bytes
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    kept = [runner.store.save(slot, (), None) for slot in range(3)]
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before and len(kept) == 3


@pytest.mark.skipif(not CUDA, reason="a CUDA graph")
def test_rows_of_every_kind_in_a_graph(path: Path) -> None:
    """Log-probabilities, filters and rows that ask for nothing, beside plain ones."""
    runner = load(path)
    kinds = [WARM, None, Sampling(top_k=3, seed=1), Sampling(temperature=0.0, logprobs=2)]
    results = []
    for recorded in (True, False):
        if not recorded:
            runner.graphs = runner.pieces = runner.ends = None
        blocks = [range(2 * i, 2 * i + 2) if runner.capacity.blocks else () for i in range(4)]
        runner.step([Chunk(tokens=[9, 4], start=0, slot=i, blocks=blocks[i]) for i in range(4)])
        results.append(
            runner.step(
                [
                    Chunk(tokens=[7], start=2, slot=i, blocks=blocks[i], sampling=kind)
                    for i, kind in enumerate(kinds)
                ]
            )
        )
    graphed, eager = results
    assert [s and s.token for s in graphed] == [s and s.token for s in eager]
    assert graphed[1] is None and graphed[3] is not None and len(graphed[3].top) == 2


def test_a_state_that_was_saved_goes_on(path: Path) -> None:
    """Out to the host, another sequence in its place, back elsewhere: blocks are known anew."""
    runner = load(path)
    blocks = (3, 1) if runner.capacity.blocks else ()
    others = (5, 2) if runner.capacity.blocks else ()
    prompt = [7] * 65

    def following(slot: int, blocks: tuple[int, ...]) -> int:
        chunk = Chunk(
            tokens=[3], start=65, slot=slot, blocks=blocks, sampling=Sampling(temperature=0.0)
        )
        (sampled,) = runner.step([chunk])
        assert sampled is not None
        return sampled.token

    runner.step([Chunk(tokens=prompt, start=0, slot=0, blocks=blocks)])
    used = blocks[:2]
    key = Place(key="k", position=65)
    runner.copy([Copy(Place(slot=0, blocks=used, position=65), key)])
    expected = following(0, blocks)
    runner.step([Chunk(tokens=[1] * 65, start=0, slot=0, blocks=blocks)])
    runner.copy([Copy(key, Place(slot=0, blocks=others, position=65))])
    assert following(0, others) == expected
