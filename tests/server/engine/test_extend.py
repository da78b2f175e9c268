"""Prompts that are not all there when they arrive."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from server.engine.loop import Loop
from server.protocol import Extend, Read, pack_tokens
from tests.server.engine.bench import Bench, alone, capacity, counts, generate
from tests.server.engine.test_loop import Post
from tests.server.fake_engine import FakeRunner


@pytest.mark.parametrize("last", [0, 1, 5])
def test_it_is_read_as_it_comes_and_answered_at_its_end(last: int):
    bench = Bench(max_step_tokens=8)
    message = generate("a", 30, 6)
    bench.begin(message, 10)
    assert counts(bench.step()) == {"a": 8}
    assert counts(bench.step()) == {"a": 1}  # one stays, from whose row the first token is drawn
    assert counts(bench.step()) == {}
    bench.extend("a", 20 - last)
    while counts(bench.step()):
        pass
    assert bench.tokens("a") == [] and bench.finish_of("a") is None
    assert bench.scheduler.running["a"].computed == 29 - last
    bench.extend("a", last, more=False)
    bench.finish()
    assert bench.result("a") == alone(message)


def test_others_go_on_while_it_waits_for_more():
    bench = Bench(slots=2)
    message, other = generate("a", 9, 4), generate("bb", 7, 12)
    bench.begin(message, 3)
    bench.add(other)
    for _ in range(5):
        bench.step()
    assert len(bench.tokens("bb")) == 5 and not bench.tokens("a")
    bench.extend("a", 6, more=False)
    bench.finish()
    assert bench.result("a") == alone(message) and bench.result("bb") == alone(other)


def test_it_leaves_with_all_it_holds():
    bench = Bench(slots=2, blocks=8, block_size=4)
    for id, known in (("a", 5), ("bb", 1)):
        bench.begin(generate(id, 12, 4), known)
        bench.step()
    bench.extend("a", 4)
    bench.step()
    bench.abort("a", "bb")
    assert bench.finish_of("a") == bench.finish_of("bb") == "abort"
    bench.extend("a", 3)  # on its way when the end came
    bench.extend("bb", 3, more=False)
    assert bench.scheduler.idle
    bench.scheduler.check_integrity()


def test_blocks_are_counted_for_all_that_is_expected():
    """Two prompts that do not fit beside one another take turns; nobody is preempted."""
    bench = Bench(slots=2, blocks=8, block_size=4)
    first, second = generate("a", 20, 3), generate("bb", 20, 3)
    bench.begin(first, 2)
    bench.begin(second, 2)
    bench.step()
    assert list(bench.scheduler.running) == ["a"]
    for id in ("a", "bb"):
        bench.extend(id, 18, more=False)
    bench.finish()
    assert bench.result("a") == alone(first) and bench.result("bb") == alone(second)
    assert bench.scheduler.preemptions["blocks"] == 0


def test_one_that_grows_beyond_what_was_expected_still_ends_well():
    bench = Bench(slots=3, blocks=9, block_size=4, max_step_tokens=5)
    messages = [generate("a" * n, 22, 3) for n in (1, 2, 3)]
    for message in messages:
        bench.rest[message.id] = message.tokens[8:]
        part = msgspec.structs.replace(message, tokens=message.tokens[:8], more=True, expected=4)
        bench.add(part)
    for _ in range(7):
        for message in messages:
            bench.extend(message.id, 3)
        bench.step()
    for message in messages:
        bench.extend(message.id, 0, more=False)
    bench.finish()
    assert bench.scheduler.preemptions["blocks"] > 0
    for message in messages:
        assert bench.result(message.id) == alone(message)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (pack_tokens([5] * 15), "a prompt of 20 leaves no room in 20"),
        (pack_tokens([97]), "id 97"),
        (b"123", "3 bytes"),
    ],
)
def test_an_impossible_piece_ends_the_request(tokens: bytes, error: str):
    bench = Bench(max_model_len=20)
    bench.begin(generate("a", 5, 4), 5)
    bench.step()
    bench.gather(bench.scheduler.extend(Extend(id="a", tokens=tokens, more=True)))
    assert bench.finish_of("a") == "error" and error in str(bench.outputs["a"][-1].error)
    del bench.rest["a"]
    bench.finish()


def test_a_prompt_that_is_complete_takes_no_more():
    bench = Bench()
    bench.add(generate("a", 5, 4))
    [output] = bench.scheduler.extend(Extend(id="a", tokens=b"", more=False))
    assert output.finish == "error" and "complete" in str(output.error)
    assert bench.scheduler.extend(Extend(id="none", tokens=b"", more=False)) == []


def test_the_loop_sleeps_while_nothing_can_be_computed():
    post = Post()
    loop = Loop(FakeRunner(capacity=capacity(), max_step_tokens=64), post)
    message = generate("a", 9, 2)
    part = msgspec.structs.replace(message, tokens=message.tokens[:16], more=True)
    post.put(part)
    for _ in range(4):
        loop.turn(0.5)
    assert post.waits == [0.5, 0.0, 0.5, 0.5]
    post.put(Extend(id="a", tokens=message.tokens[16:], more=False))
    for _ in range(3):
        loop.turn(0.5)
    assert post.result("a") == alone(message)
    assert post.waits[4:] == [0.5, 0.0, 0.5]


DOCUMENT = [(7 * i + i // 50) % 97 for i in range(2000)]


def cached(bench: Bench, id: str) -> int:
    return max(output.cached for output in bench.outputs[id])


def test_one_that_may_be_known_waits_until_that_is_certain():
    """Its first piece leads to a checkpoint farther on, which it would miss if it began."""
    bench = Bench(caching=True, host_bytes=1 << 20, max_step_tokens=512)
    bench.add(generate("first", DOCUMENT, 3))
    bench.finish()
    again = generate("again", [*DOCUMENT, 1, 2, 3], 4)
    bench.begin(again, 600)
    for _ in range(3):
        assert counts(bench.step()) == {}
    bench.extend("again", 800)
    assert counts(bench.step()) == {}
    bench.extend("again", 0, more=False)
    bench.finish()
    assert bench.result("again") == alone(again)
    assert cached(bench, "again") >= 1999


def test_one_that_parts_in_its_first_piece_is_read_at_once_and_kept():
    bench = Bench(caching=True, host_bytes=1 << 20, max_step_tokens=512)
    bench.add(generate("first", DOCUMENT, 3))
    bench.finish()
    other = generate("other", [*DOCUMENT[:300], *reversed(DOCUMENT)], 4, boundaries=[100, 2200])
    bench.begin(other, 600)
    assert counts(bench.step()) != {}
    bench.extend("other", 1000)
    bench.step()
    bench.extend("other", 0, more=False)
    bench.finish()
    assert bench.result("other") == alone(other)
    again = generate("again", [*DOCUMENT[:300], *reversed(DOCUMENT), 5], 4)
    bench.add(again)
    bench.finish()
    assert bench.result("again") == alone(again) and cached(bench, "again") >= 2299
    stats = bench.scheduler.stats().cache
    assert stats is not None and stats.queried == 2000 + 2300 + 2301


def test_one_that_follows_another_under_way_waits_to_see_where_they_part():
    bench = Bench(caching=True, host_bytes=1 << 20, max_step_tokens=256)
    first, second = generate("a", DOCUMENT, 3), generate("b", [*DOCUMENT[:1500], 9, 9], 3)
    bench.begin(first, 600)
    bench.step()
    bench.begin(second, 500)
    assert counts(bench.step()) == {"a": 256}
    bench.extend("a", 0, more=False)
    bench.extend("b", 0, more=False)
    bench.finish()
    for message in (first, second):
        assert bench.result(message.id) == alone(message)
    assert cached(bench, "b") == 1500


def test_one_waits_while_a_longer_state_lies_on_the_disk(tmp_path: Path):
    options = {"caching": True, "host_bytes": 1 << 20, "max_step_tokens": 512}
    bench = Bench(directory=tmp_path, **options)
    bench.add(Read(id="read", tokens=pack_tokens(DOCUMENT)))
    bench.finish()
    bench = Bench(directory=tmp_path, **options)  # nothing lies in memory
    again = generate("again", [*DOCUMENT, 1, 2, 3], 4)
    bench.begin(again, 600)
    assert counts(bench.step()) == {}
    bench.extend("again", 0, more=False)
    bench.finish()
    assert bench.result("again") == alone(again) and cached(bench, "again") == 2000


def test_one_that_ends_before_it_was_expected_to_keeps_nothing_of_what_it_draws():
    bench = Bench(caching=True, host_bytes=1 << 20, max_step_tokens=512)
    message = generate("a", DOCUMENT[:1000], 200)
    bench.rest["a"] = message.tokens[4 * 600 :]
    part = msgspec.structs.replace(
        message, tokens=message.tokens[: 4 * 600], more=True, expected=9000
    )
    bench.add(part)
    bench.step()
    assert max(bench.scheduler.running["a"].wanted) > 1000
    bench.extend("a", 0, more=False)
    assert bench.scheduler.running["a"].wanted == [999]
    bench.finish()
    assert bench.result("a") == alone(message)
