"""States with an owner, and the disk below the host: read, gone on with, moved, found again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from server.engine import archive
from server.engine.chain import salt_digest
from server.engine.disk import WRONG
from server.protocol import Export, Fetch, Import, Output, Pin, Read, State, pack_tokens
from tests.server.engine.bench import Bench, alone, generate
from tests.server.engine.test_checkpoints import ask, caching, words

SIZE = 8 + 4 * 300  # of a state of 300 tokens on the host


def read(bench: Bench, id: str, tokens: list[int], **fields: Any) -> Output:
    bench.add(Read(id=id, tokens=pack_tokens(tokens), **fields))
    bench.finish()
    return bench.outputs[id][-1]


def state(output: Output) -> State:
    assert output.finish == "stop" and output.state is not None, output
    return output.state


def goes_on(bench: Bench, id: str, base: str, before: list[int], tokens: list[int]) -> int:
    """Generate after a state; how many tokens of the prompt were computed."""
    message = generate(id, tokens, 4)
    message.base = base
    bench.add(message)
    bench.finish()
    assert bench.result(id) == alone(generate(id, before + tokens, 4))
    return len(before) + len(tokens) - bench.outputs[id][-1].cached


@pytest.fixture(params=["memory", "disk"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return caching(directory=tmp_path if request.param == "disk" else None, slots=4)


def test_a_read_keeps_the_whole_of_it(bench: Bench) -> None:
    document = words(300, 1)
    made = state(read(bench, "r", document))
    assert (made.count, made.bytes, made.salt) == (300, SIZE, salt_digest(""))
    assert goes_on(bench, "a", made.key, document, [5]) == 1
    assert goes_on(bench, "b", made.key, document, words(70, 2)) == 70
    again = read(bench, "again", document)
    assert state(again) == made and again.cached == 300
    assert sum(len(c.tokens) for s in bench.runner.steps for c in s) == 300 + 1 + 70 + 2 * 3


def test_reads_go_on_with_reads(bench: Bench) -> None:
    first = state(read(bench, "1", words(300, 1)))
    second = read(bench, "2", words(50, 2), base=first.key)
    assert second.cached == 300 and state(second).count == 350
    assert goes_on(bench, "a", state(second).key, words(300, 1) + words(50, 2), [5]) == 1
    # the last three tokens are other ones now that more has come: one begins before them
    third = read(bench, "3", words(40, 3), base=first.key, drop=3)
    assert state(third).count == 337 and third.cached < 300
    assert goes_on(bench, "b", state(third).key, words(300, 1)[:-3] + words(40, 3), [5]) == 1


def test_short_and_salted_reads(bench: Bench) -> None:
    short = state(read(bench, "r", [1, 2, 3], salt="s"))
    assert short.salt == salt_digest("s") and short.key != state(read(bench, "q", [1, 2, 3])).key
    goes_on(bench, "a", short.key, [1, 2, 3], [5])


def test_what_is_impossible_is_told(bench: Bench) -> None:
    with pytest.raises(ValueError, match="there is no state"):
        bench.add(generate("a", 5), Read(id="r", tokens=b"", base="0" * 64))
    made = state(read(bench, "r", words(50, 1)))
    with pytest.raises(ValueError, match="drop: more than the 50"):
        bench.add(Read(id="d", tokens=b"", base=made.key, drop=51))
    with pytest.raises(ValueError, match="empty"):
        bench.add(Read(id="e", tokens=b"", base=made.key, drop=50))
    with pytest.raises(ValueError, match="prefix_caching is off"):
        Bench().add(Read(id="r", tokens=pack_tokens([1])))


def test_an_aborted_read_leaves_nothing_pinned(bench: Bench) -> None:
    for steps in range(1, 8):
        id = f"r{steps}"
        bench.add(Read(id=id, tokens=pack_tokens(words(200, steps))))
        for _ in range(steps):
            bench.step()
        bench.abort(id)
        bench.finish()
    cache = bench.scheduler.checkpoints
    assert all(bench.finish_of(f"r{n}") in ("abort", "stop") for n in range(1, 8))
    told = sum(bench.finish_of(f"r{n}") == "stop" for n in range(1, 8))
    if cache.disk is None:
        assert sum(c.pins for c in cache.tiers.host) == told
    else:
        assert not any(c.pins for c in cache.tiers.host)


def test_pinned_states_stay_and_have_a_bound():
    bench = caching(slots=1, host_bytes=3 * SIZE + 100)
    made = [state(read(bench, str(n), words(300, n))) for n in range(3)]
    full = read(bench, "full", words(300, 9))
    assert full.finish == "error" and full.trouble is not None
    assert full.trouble.status == 507 and "host_cache_gb" in full.trouble.message
    for n in range(5):
        ask(bench, generate(f"other {n}", words(300, 20 + n), 2))
    for n in range(3):
        assert goes_on(bench, f"a{n}", made[n].key, words(300, n), [5]) == 1
    bench.call(Pin(made[0].key, 1))
    bench.call(Pin(made[0].key, -1))
    assert read(bench, "still full", words(300, 9)).finish == "error"
    bench.call(Pin(made[0].key, -1))
    assert read(bench, "room", words(300, 9)).finish == "stop"


def test_states_outlive_the_process(tmp_path: Path):
    document = words(300, 1)
    first = caching(directory=tmp_path)
    made = state(read(first, "r", document, salt="s"))
    again = caching(directory=tmp_path)
    assert goes_on(again, "a", made.key, document, words(20, 2)) == 20
    reply = again.call(Fetch("f", made.key))
    assert reply is not None and reply.state == made
    third = caching(directory=tmp_path)
    assert ask(third, generate("b", [*document, 5, 6], 1, salt="s")) == 2  # found by its tokens
    assert ask(third, generate("c", [*document, 5, 6], 1)) == 302  # and salt
    assert third.scheduler.checkpoints.disk.shelf.load_seconds
    assert ask(third, generate("d", [*document, 5, 7], 1, salt="s")) == 2
    assert +third.scheduler.checkpoints.found == {"disk": 1, "device": 1}


def test_a_base_that_went_to_the_disk_and_came_again_is_followed_at_once(tmp_path: Path):
    bench, document = caching(directory=tmp_path, slots=1, host_bytes=2 * SIZE), words(300, 1)
    key = state(read(bench, "r", document)).key
    states, checkpoints = bench.scheduler.states, bench.scheduler.checkpoints
    seen = []
    for turn in range(2):
        assert goes_on(bench, f"a{turn}", key, document, words(20, turn)) == 20
        block = checkpoints.get(key).block
        base, _ = states.base(key)
        assert base.digest(base.known) is block.digest and base.tokens.tolist() == document
        seen.append(base)
        for n in range(4):
            ask(bench, generate(f"{turn}-{n}", words(300, 10 + 4 * turn + n), 1))
        assert checkpoints.get(key) is None
    assert seen[0] is not seen[1]


def test_a_damaged_file_is_computed_anew(tmp_path: Path):
    document = words(300, 1)
    first = caching(directory=tmp_path)
    made = state(read(first, "r", document))
    path = first.scheduler.checkpoints.disk.shelf.path(made.key)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    again = caching(directory=tmp_path)
    assert ask(again, generate("a", [*document, 5], 1)) == 301
    assert +again.scheduler.checkpoints.misses == {"damaged": 1}
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    other = caching(directory=tmp_path)
    with pytest.raises(ValueError, match="there is no state"):
        other.add(Read(id="x", tokens=b"", base=made.key))


def test_a_base_that_turns_out_damaged(tmp_path: Path):
    made = state(read(caching(directory=tmp_path), "r", words(300, 1)))
    again = caching(directory=tmp_path)
    path = again.scheduler.checkpoints.disk.shelf.path(made.key)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    message = generate("a", 5)
    message.base = made.key
    again.add(message)
    assert "a" in again.scheduler
    again.finish()
    assert again.finish_of("a") == "error" and "damaged" in again.outputs["a"][-1].error
    reply = again.call(Fetch("f", made.key))
    assert reply is not None and reply.trouble is not None and reply.trouble.status == 410


def test_what_the_host_gives_up_goes_to_the_disk(tmp_path: Path):
    bench = caching(directory=tmp_path, slots=1, host_bytes=2 * SIZE)
    for n in range(6):
        ask(bench, generate(str(n), words(300, n), 1))
    shelf = bench.scheduler.checkpoints.disk.shelf
    assert len(shelf.entries) >= 3
    assert ask(bench, generate("old", words(300, 0), 1)) == 1
    assert bench.scheduler.checkpoints.stats().bytes["disk"] == sum(
        path.stat().st_size for path in (tmp_path / "states").iterdir()
    )


def test_no_host_memory_but_a_disk(tmp_path: Path):
    bench = caching(directory=tmp_path, slots=1, host_bytes=0)
    made = state(read(bench, "r", words(300, 1)))
    assert not bench.scheduler.checkpoints.tiers.host and not bench.runner.saved
    ask(bench, generate("other", words(300, 2), 1))  # takes the only slot
    assert goes_on(bench, "a", made.key, words(300, 1), words(9, 3)) == 9


@pytest.mark.parametrize("slots", [2, 4])
def test_a_state_is_read_once_though_the_host_cannot_keep_it(tmp_path: Path, slots: int):
    """It is fetched, and only then asked for."""
    made = state(read(caching(directory=tmp_path), "r", words(300, 1)))
    bench = caching(directory=tmp_path, slots=slots, host_bytes=0)
    ask(bench, generate("other", words(300, 2), 1))
    for n in range(2):
        reply = bench.call(Fetch(f"f{n}", made.key))
        assert reply is not None and reply.state == made
        assert goes_on(bench, f"a{n}", made.key, words(300, 1), words(9, 3)) <= 9
        assert not bench.scheduler.checkpoints.tiers.host and not bench.runner.saved
    assert len(bench.scheduler.checkpoints.disk.shelf.load_seconds) == 1


def test_idle_time_saves_what_is_worth_it(tmp_path: Path):
    bench = caching(directory=tmp_path)
    ask(bench, generate("a", words(300, 1), 1))
    ask(bench, generate("b", words(100, 2), 1))
    for _ in range(5):
        bench.scheduler.states.rest()
        bench.finish()
    assert [e.position for e in bench.scheduler.checkpoints.disk.shelf.entries.values()] == [299]
    again = caching(directory=tmp_path)
    assert ask(again, generate("a", words(300, 1), 1)) == 1


def test_idle_time_makes_room_on_a_full_host(tmp_path: Path):
    """What the host gives up for a state on its way to the disk is gone at once."""
    bench = caching(directory=tmp_path, slots=3, host_bytes=SIZE + 100)
    for n in range(4):
        ask(bench, generate(f"{n}", words(300, n), 1))
    for _ in range(8):
        bench.scheduler.states.rest()
        bench.finish()
    assert len(bench.scheduler.checkpoints.disk.shelf.entries) == 4


def test_a_full_disk_fails_the_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bench = caching(directory=tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(archive.os, "fsync", full)
        output = read(bench, "r", words(300, 1))
        assert output.finish == "error" and output.trouble is not None
        assert output.trouble.status == 507 and "No space left" in output.trouble.message
        assert ask(bench, generate("a", words(300, 2), 3)) == 302
    assert state(read(bench, "again", words(300, 1))).count == 300


def test_files_go_from_server_to_server(bench: Bench, tmp_path: Path):
    document = words(300, 1)
    made = state(read(bench, "r", document))
    file = tmp_path / "exported"
    reply = bench.call(Export("e", made.key, str(file)))
    assert reply is not None and reply.state == made
    for directory in (None, tmp_path / "other"):
        other = caching(directory=directory)
        came = other.call(Import("i", str(file)))
        assert came is not None and came.state == made
        assert goes_on(other, "a", made.key, document, words(5, 2)) == 5
    file.write_bytes(file.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    bad = caching().call(Import("i", str(file)))
    assert bad is not None and bad.trouble is not None and bad.trouble.status == 400
    small = caching(host_bytes=100)
    bench.call(Export("e", made.key, str(file)))
    refused = small.call(Import("i", str(file)))
    assert refused is not None and refused.trouble is not None and refused.trouble.status == 507


def test_what_is_given_up_before_it_is_copied_is_exported_all_the_same(tmp_path: Path):
    bench = caching(slots=1, host_bytes=600)  # one state of 100 tokens, not two
    made = state(read(bench, "r", words(100, 1)))
    ask(bench, generate("a", words(98, 2), 1))
    bench.scheduler.states.call(Pin(made.key, -1))
    cache = bench.scheduler.checkpoints
    assert [checkpoint.key for checkpoint in cache.tiers.host] == [made.key]
    bench.scheduler.states.call(Export("e", made.key, str(tmp_path / "exported")))
    ask(bench, generate("b", words(98, 3), 1))
    assert cache.get(made.key) is None and bench.replies["e"].state == made
    came = caching().call(Import("i", str(tmp_path / "exported")))
    assert came is not None and came.state == made


def test_what_another_server_gave_up_is_saved_again(tmp_path: Path):
    bench = caching(directory=tmp_path)
    ask(bench, generate("a", words(300, 1), 1))
    shelf = bench.scheduler.checkpoints.disk.shelf
    bench.scheduler.states.rest()
    bench.finish()
    [path] = (tmp_path / "states").iterdir()
    path.unlink()
    bench.scheduler.checkpoints.tiers.host_budget = 0
    bench.scheduler.checkpoints.evict()
    bench.scheduler.checkpoints.tiers.trim()
    bench.scheduler.checkpoints.sweep()
    bench.finish()
    assert path.exists() and list(shelf.entries) == [path.name[:64]]


def test_a_state_is_written_once_for_all_who_ask(tmp_path: Path):
    bench = caching(directory=tmp_path)
    ask(bench, generate("a", [*words(300, 1), 5], 1))
    cache = bench.scheduler.checkpoints
    [checkpoint] = cache.tiers.device
    assert cache.tiers.hold(checkpoint)
    told: list[object] = []
    for _ in range(2):
        cache.disk.save(checkpoint, told.append)
    bench.step()
    cache.disk.save(checkpoint, told.append)  # it is being written
    bench.finish()
    assert told == [None] * 3 and len(cache.disk.shelf.save_seconds) == 1


def test_what_is_made_anew_is_saved_though_the_first_was_wrong(tmp_path: Path):
    bench = caching(directory=tmp_path)
    ask(bench, generate("a", [*words(300, 1), 5], 1))
    cache = bench.scheduler.checkpoints
    [checkpoint] = cache.tiers.device
    assert cache.tiers.hold(checkpoint)
    told: list[object] = []
    cache.disk.save(checkpoint, told.append)
    cache.disk.discard(checkpoint.key)  # before its image was filled
    assert told == [WRONG]
    cache.disk.save(checkpoint, told.append)
    bench.step()
    cache.disk.discard(checkpoint.key)  # while it is written
    cache.disk.save(checkpoint, told.append)
    bench.finish()
    assert told == [WRONG, WRONG, None] and checkpoint.key in cache.disk.shelf


def test_a_read_that_is_known_whole_is_a_hit(bench: Bench) -> None:
    read(bench, "r", words(300, 1))
    read(bench, "again", words(300, 1))
    cache = bench.scheduler.checkpoints
    assert (cache.queries, cache.hits, cache.saved_tokens) == (2, 1, 300)


def test_a_wrong_state_leaves_no_file(tmp_path: Path):
    """It was on its way to the disk when it was found out."""
    bench = caching(directory=tmp_path, max_step_tokens=100, slots=1)
    bench.add(generate("a", words(300, 1), 2, boundaries=[100]))
    cache = bench.scheduler.checkpoints
    for _ in range(2):
        bench.step()
    [kept] = cache.tiers.host
    cache.disk.spill(kept)
    request = bench.scheduler.running["a"]
    cache.disown(request, 100)
    assert kept in cache.tiers.host  # what was made before stays
    cache.disown(request, 99)
    bench.finish()
    assert cache.get(kept.key) is None
    assert not cache.disk.shelf.entries and not list((tmp_path / "states").iterdir())
    assert not cache.disk._savings and not cache.disk._writing


def test_a_read_ends_with_its_own_last_step():
    """The last chunk was launched before the one before it was collected."""
    bench = caching(max_step_tokens=64)
    bench.add(Read(id="r", tokens=pack_tokens(words(128, 1))))
    first, last = bench.scheduler.schedule(1.0), bench.scheduler.schedule(2.0)
    for work in (first, last):
        bench.runner.copy(work.copies)
        drawn = bench.runner.step(work.chunks)
        assert "r" in bench.scheduler.running
        bench.gather(bench.scheduler.complete(work, drawn))
    bench.finish()
    assert state(bench.outputs["r"][-1]).count == 128
