"""Files of states: whole or not there, believed once checked, put away when they are not good."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy
import pytest

from model.chunk import Capacity, Image, Layout, Tensor
from server.engine import archive
from server.engine.archive import ArchiveError
from server.engine.chain import Chain, root_of, salt_digest
from server.engine.jobs import Jobs
from server.engine.shelf import Shelf
from server.protocol import Trouble

ROOT = Path(__file__).parents[3]
SALT = salt_digest("")
CAPACITY = Capacity(
    slots=1,
    state_bytes=400,
    vocab_size=300,
    fingerprint="f" * 64,
    slot_layout=(Layout("state.0", "F32", (2, 5, 7)), Layout("keys.1", "BF16", (3, 4))),
)


def chain(length: int, seed: int = 0) -> Chain:
    rng = Random(seed)
    tokens = array("i", [rng.randrange(300) for _ in range(length)])
    return Chain(root_of(CAPACITY.identity, SALT), tokens)


def image(seed: int = 0) -> Image:
    rng = numpy.random.default_rng(seed)
    state = rng.standard_normal(70).astype("<f4")
    keys = (rng.standard_normal(12).astype("<f4").view("<u4") >> 16).astype("<u2")
    return Image([
        Tensor("state.0", "F32", (2, 5, 7), state.view(numpy.uint8).data),
        Tensor("keys.1", "BF16", (3, 4), keys.view(numpy.uint8).data),
    ])  # fmt: skip


def write(path: Path, length: int = 40, seed: int = 0) -> Chain:
    made = chain(length, seed)
    metadata = archive.describe(CAPACITY, made, length, salt=SALT)
    tokens = archive.narrow(made.tokens, CAPACITY.vocab_size)
    archive.write(path, metadata, [tokens, *image(seed).tensors])
    return made


def shelf(directory: Path, budget: int = 1 << 30) -> Shelf:
    return Shelf(directory, CAPACITY, Jobs(), budget=budget)


def save(kept: Shelf, length: int = 40, seed: int = 0) -> Trouble | None:
    told: list[Trouble | None] = []
    kept.save(lambda: chain(length, seed), length, image(seed), SALT, told.append)
    kept.jobs.wait()
    return told[0]


def load(kept: Shelf, key: str) -> archive.State | Trouble:
    told: list[archive.State | Trouble] = []
    kept.load(key, told.append)
    kept.jobs.wait()
    return told[0]


@pytest.mark.parametrize("length", [1, 63, 257, 781])
def test_what_is_written_is_read(tmp_path: Path, length: int) -> None:
    made = write(tmp_path / "a", length)
    state = archive.read(tmp_path / "a", CAPACITY)
    assert state.chain.tokens == made.tokens and state.key == made.key(length)
    assert [bytes(t.data) for t in state.image.tensors] == [bytes(t.data) for t in image().tensors]
    assert state.bytes == (tmp_path / "a").stat().st_size


@pytest.mark.parametrize("empty", ["keys.1", "state.0"])
def test_zeros_take_no_room(tmp_path: Path, empty: str) -> None:
    """A ring that holds nothing is in no file, and comes back."""
    full = image().tensors
    tensors = [
        replace(t, data=memoryview(bytes(t.data.nbytes))) if t.name == empty else t for t in full
    ]
    for name, given in (("full", full), ("less", tensors)):
        contents = archive.contents(CAPACITY, chain(40), 40, Image(given), salt=SALT)
        archive.write(tmp_path / name, *contents)
        state = archive.read(tmp_path / name, CAPACITY)
        assert state.image.tensors == given and state.key == chain(40).key(40)
    size = next(t.data.nbytes for t in full if t.name == empty)
    assert (tmp_path / "less").stat().st_size < (tmp_path / "full").stat().st_size - size


def test_zeros_of_another_server_are_left_alone(tmp_path: Path) -> None:
    """One without rings shares a directory with one that has them."""
    state, keys = image().tensors
    empty = Image([state, replace(keys, data=memoryview(bytes(keys.data.nbytes)))])
    kept, told = shelf(tmp_path), []
    kept.save(lambda: chain(40), 40, empty, SALT, told.append)
    kept.jobs.wait()
    assert told == [None] and "keys.1" in archive.read_header(kept.path(*kept.entries)).zeros
    other = replace(CAPACITY, slot_layout=CAPACITY.slot_layout[:1])
    assert not Shelf(tmp_path, other, Jobs(), budget=1 << 30).entries
    assert not list((tmp_path / "quarantine").iterdir()) and list(shelf(tmp_path).entries)


def test_what_grows_with_a_sequence_is_never_left_out(tmp_path: Path) -> None:
    """Else a small file of many tokens would take any amount of memory."""
    growing = replace(CAPACITY, block_size=8, block_layout=(Layout("kv", "F32", (64,)),))
    made = Chain(root_of(growing.identity, SALT), chain(40).tokens)
    blocks = Tensor("kv", "F32", (5, 64), memoryview(bytes(5 * 256)))
    given = Image([*image().tensors, blocks])
    metadata, tensors = archive.contents(growing, made, 40, given, salt=SALT)
    archive.write(tmp_path / "a", metadata, tensors)
    assert archive.read(tmp_path / "a", growing).image.tensors[-1] == blocks
    archive.write(tmp_path / "a", {**metadata, "zeros": "kv"}, tensors[:-1])
    with pytest.raises(ArchiveError, match="'kv' is said to be zeros"):
        archive.read(tmp_path / "a", growing)


def test_the_library_reads_it_too(tmp_path: Path) -> None:
    from safetensors import safe_open

    made = write(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata()["count"] == "40"
        assert file.get_tensor("tokens").tolist() == made.tokens.tolist()
        assert str(file.get_tensor("keys.1").dtype) == "torch.bfloat16"
        state = numpy.frombuffer(image().tensors[0].data, dtype="<f4")
        assert (file.get_tensor("state.0").numpy().ravel() == state).all()


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(256, "U8"), (272, "U16"), (65_536, "U16"), (65_537, "I32")]
)
def test_token_ids_are_narrow(vocab: int, dtype: str) -> None:
    ids = array("i", [0, 1, vocab - 1])
    narrow = archive.narrow(ids, vocab)
    assert narrow.dtype == dtype
    assert numpy.frombuffer(narrow.data, archive.WIDTHS[dtype]).tolist() == list(ids)


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    """Any byte of the file, changed in any way: refused, or the same state."""
    write(tmp_path / "a", 5)
    good = (tmp_path / "a").read_bytes()
    want = archive.read(tmp_path / "a", CAPACITY)
    rng = Random(1)
    harmless = 0  # none: the header has a checksum, the tensors have one
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        (tmp_path / "b").write_bytes(bad)
        try:
            state = archive.read(tmp_path / "b", CAPACITY)
        except ArchiveError:
            continue
        harmless += 1
        assert state.key == want.key and state.chain.tokens == want.chain.tokens
        assert [bytes(t.data) for t in state.image.tensors] == [
            bytes(t.data) for t in want.image.tensors
        ]
    assert harmless == 0


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a", 5)
    good = (tmp_path / "a").read_bytes()
    for length in [*range(0, len(good), 7), len(good) - 1]:
        (tmp_path / "b").write_bytes(good[:length])
        with pytest.raises(ArchiveError):
            archive.read(tmp_path / "b", CAPACITY)
    (tmp_path / "b").write_bytes(good + b"\0")
    with pytest.raises(ArchiveError, match="are due"):
        archive.read(tmp_path / "b", CAPACITY)


def forge(path: Path, **changes: object) -> None:
    """A file whose checksum is right, and something else is not."""
    made = chain(40)
    metadata = archive.describe(CAPACITY, made, 40, salt=SALT)
    tensors = [archive.narrow(made.tokens, 300), *image().tensors]
    for name, value in changes.items():
        if name == "tensors":
            tensors = value(tensors)  # type: ignore[operator]
        else:
            metadata[name] = str(value)
    archive.write(path, metadata, tensors)


def changed(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> object:
    def change(tensors: list[Tensor]) -> list[Tensor]:
        return [
            Tensor(name, dtype, shape, memoryview(data)) if tensor.name == name else tensor
            for tensor in tensors
        ]

    return change


NAN = struct.pack("<70f", *[0.0] * 69, float("nan"))
INFINITE = struct.pack("<12H", *[0] * 11, 0x7F80)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"fingerprint": "e" * 64}, "fingerprint"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"version": "1"}, "version"),
        ({"zeros": "state.0"}, "'state.0' is said to be zeros"),
        ({"zeros": "tokens"}, "'tokens' is said to be zeros"),
        ({"zeros": "messages"}, "'messages' is said to be zeros"),
        ({"identity": "e" * 64}, "lays states out otherwise"),
        ({"block": "0" * 64}, "block"),
        ({"trail": "00" * 8}, "trail"),
        ({"format": "pt"}, "format"),
        ({"count": 39}, "tokens"),
        ({"count": -1}, "count"),
        ({"count": "1" * 5000}, "count"),
        ({"key": "0" * 64}, "key"),
        ({"salt": "x"}, "salt"),
        ({"salt": "0" * 64}, "key"),
        ({"tensors": changed("state.0", "F32", (2, 5, 7), NAN)}, "finite"),
        ({"tensors": changed("keys.1", "BF16", (3, 4), INFINITE)}, "finite"),
        ({"tensors": changed("state.0", "F32", (2, 7, 5), bytes(280))}, "shape|is due"),
        ({"tensors": changed("state.0", "I32", (2, 5, 7), bytes(280))}, "is due"),
        ({"tensors": changed("tokens", "U16", (40,), struct.pack("<40H", *[300] * 40))}, "ids"),
        ({"tensors": lambda tensors: tensors[:-1]}, "missing"),
        ({"tensors": lambda t: [*t, Tensor("x", "U8", (1,), memoryview(b"a"))]}, "nothing is due"),
    ],
)
def test_forged_files_are_refused(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    forge(tmp_path / "good")
    archive.read(tmp_path / "good", CAPACITY)
    forge(tmp_path / "a", **changes)
    with pytest.raises(ArchiveError, match=why):
        archive.read(tmp_path / "a", CAPACITY)


@pytest.mark.parametrize(
    "head",
    [
        b"[]", b"{}", b'{"__metadata__":[]}', b"[" * 5000, b'{"__metadata__":{"a":1}}', b"\xff" * 9,
        b'{"__metadata__":{},"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{},"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"__metadata__":{},"a":{"dtype":"F32","shape":[1e9],"data_offsets":[0,4]}}',
    ],
)  # fmt: skip
def test_headers_that_make_no_sense(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a").write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(ArchiveError):
        archive.read_header(tmp_path / "a")


def test_a_shelf_is_found_again(tmp_path: Path) -> None:
    first = shelf(tmp_path)
    assert save(first, 300) is None and save(first, 50, seed=1) is None
    again = shelf(tmp_path)
    assert again.entries.keys() == first.entries.keys() and again.bytes == first.bytes
    found = again.find(Chain(chain(0).digest(0), chain(300).tokens + array("i", [7])), 300, 1)
    assert found is not None and found.position == 300
    state = load(again, found.key)
    assert isinstance(state, archive.State) and state.chain.tokens == chain(300).tokens
    assert again.find(chain(300), 299, 1) is None and again.find(chain(300, 2), 300, 1) is None


def test_what_is_damaged_is_put_away_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = shelf(tmp_path)
    save(kept)
    key = chain(40).key(40)
    data = bytearray(kept.path(key).read_bytes())
    data[-1] ^= 1
    kept.path(key).write_bytes(data)
    trouble = load(kept, key)
    assert isinstance(trouble, Trouble) and trouble.status == 410
    assert "checksum" in trouble.message and key in caplog.text
    assert key not in kept and kept.bytes == 0
    assert [path.name[:64] for path in (tmp_path / "quarantine").iterdir()] == [key]
    assert save(kept) is None and isinstance(load(kept, key), archive.State)


def test_foreign_files_are_left_alone_or_put_away(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    forge(tmp_path / "states" / "foreign.safetensors", fingerprint="e" * 64)
    forge(tmp_path / "states" / "renamed.safetensors")
    (tmp_path / "states" / "noise.safetensors").write_bytes(b"noise" * 100)
    (tmp_path / "states" / "tmp-1-a").write_bytes(b"being written")
    os.utime(tmp_path / "states" / "tmp-1-a", (1, 1))
    (tmp_path / "states" / "tmp-1-b").write_bytes(b"being written")
    assert not shelf(tmp_path).entries and not kept.entries
    left = {path.name for path in (tmp_path / "states").iterdir()}
    assert left == {"foreign.safetensors", "tmp-1-b"}
    assert len(list((tmp_path / "quarantine").iterdir())) == 2


OTHERS = [
    replace(CAPACITY, fingerprint="e" * 64),
    replace(CAPACITY, dtype="bfloat16"),
    replace(CAPACITY, slot_layout=(Layout("state.0", "BF16", (2, 5, 7)), CAPACITY.slot_layout[1])),
    replace(CAPACITY, slot_layout=CAPACITY.slot_layout[:1]),
]


@pytest.mark.parametrize("other", OTHERS)
def test_servers_that_compute_otherwise_leave_one_anothers_files_alone(
    tmp_path: Path, other: Capacity
) -> None:
    ours = shelf(tmp_path)
    assert save(ours) is None
    [key] = ours.entries
    theirs = Shelf(tmp_path, other, Jobs(), budget=1 << 30)
    assert not theirs.entries
    trouble = load(theirs, key)
    assert isinstance(trouble, Trouble) and "left alone" in trouble.message
    assert isinstance(load(ours, key), archive.State)
    assert not list((tmp_path / "quarantine").iterdir())
    # the same tokens have another name there
    assert Chain(root_of(other.identity, SALT), chain(40).tokens).key(40) != key


def test_a_good_file_that_came_meanwhile_is_not_put_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = shelf(tmp_path)
    save(kept)
    [key] = kept.entries

    def too_late(path: Path, capacity: Capacity) -> archive.State:
        write(path)  # as another server does
        raise ArchiveError("its checksum is wrong")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "read", too_late)
        assert isinstance(load(kept, key), Trouble)
    assert kept.path(key).exists() and not list((tmp_path / "quarantine").iterdir())
    assert list(shelf(tmp_path).entries) == [key]


def test_what_cannot_be_made_to_last_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails when the name is to be written; a file that had the name stays."""
    kept = shelf(tmp_path)
    save(kept)

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(archive, "sync", fail)
    for seed in (0, 1):
        trouble = save(kept, seed=seed)
        assert trouble is not None and trouble.status == 507
    assert [path.name[:64] for path in (tmp_path / "states").iterdir()] == list(kept.entries)
    assert len(kept.entries) == 1 and kept.bytes == next(iter(kept.entries.values())).bytes


def test_what_killed_writers_left_goes_when_it_is_old(tmp_path: Path) -> None:
    shelf(tmp_path)
    for name in ("states", "contexts"):
        for age in ("old", "new"):
            path = tmp_path / name / f"{archive.TEMPORARY}{age}"
            path.write_bytes(b"x")
            if age == "old":
                os.utime(path, (1, 1))
    shelf(tmp_path)
    for name in ("states", "contexts"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["tmp-new"]


def test_the_budget_holds_whatever_is_written_at_once(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    save(kept)
    size = kept.bytes
    assert size == kept.path(chain(40).key(40)).stat().st_size
    kept = shelf(tmp_path, budget=5 * size)
    sizes, told = [], []
    for seed in range(60):
        kept.save(lambda seed=seed: chain(40, seed), 40, image(seed), SALT, told.append)
        kept.jobs.done()
        sizes.append(kept.bytes)
    kept.jobs.wait()
    assert told == [None] * 60 and max(sizes) <= kept.budget
    assert kept.bytes == 5 * size == sum(p.stat().st_size for p in (tmp_path / "states").iterdir())


def test_a_file_that_another_server_gave_up_is_missed(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    save(kept)
    [key] = kept.entries
    assert key in kept
    kept.path(key).unlink()
    assert key not in kept and kept.bytes == 0 and not kept.entries
    assert kept.find(chain(40), 40, 1) is None


def test_the_least_recently_used_go_first_and_contexts_never(tmp_path: Path) -> None:
    kept = shelf(tmp_path)
    save(kept)
    size = kept.bytes
    kept = shelf(tmp_path, budget=3 * size + 100)
    keys = [chain(40, seed).key(40) for seed in range(8)]
    (tmp_path / "contexts" / f"name.{keys[0]}.json").write_text("{}")
    for seed in range(1, 4):
        assert save(kept, seed=seed) is None
    kept.touch(keys[2])
    assert save(kept, seed=4) is None
    assert list(kept.entries) == [keys[0], keys[2], keys[4]]
    for seed in (2, 4):
        (tmp_path / "contexts" / f"name.{keys[seed]}.json").write_text("{}")
    trouble = save(kept, seed=5)
    assert trouble is not None and trouble.status == 507 and "disk_cache_gb" in trouble.message
    assert set(kept.entries) == {keys[0], keys[2], keys[4]}
    assert kept.bytes == sum(entry.bytes for entry in kept.entries.values())
    assert kept.bytes == sum(p.stat().st_size for p in (tmp_path / "states").iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = shelf(tmp_path)
    save(kept)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(archive.os, "fsync", full)
        trouble = save(kept, seed=1)
    assert trouble is not None and trouble.status == 507 and "No space left" in trouble.message
    assert len(list((tmp_path / "states").iterdir())) == len(kept.entries) == 1
    assert save(kept, seed=1) is None


WRITER = """
import sys
from pathlib import Path
from tests.server.engine.test_archive import save, shelf
kept = shelf(Path(sys.argv[1]), budget=int(sys.argv[3]))
print("ready", flush=True)
for seed in range(int(sys.argv[2]), 10**9):
    assert save(kept, 500, seed) is None
    print(seed, flush=True)
"""


def writer(directory: Path, start: int, budget: int = 1 << 30) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory), str(start), str(budget)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def killed_at(line: int, path: Path) -> bool:
    """Write a file in a process that is killed before so many lines of archive.py; whether it
    was, or had come to its end."""
    made, left = chain(300), line

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != archive.__file__:
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    metadata = archive.describe(CAPACITY, made, 300, salt=SALT)
    tensors = [archive.narrow(made.tokens, CAPACITY.vocab_size), *image().tensors]
    child = os.fork()
    if child == 0:
        try:
            sys.settrace(trace)
            archive.write(path, metadata, tensors)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def kill_at_every_line(directory: Path) -> None:
    """Under a new name, and again where a file of the name stands."""
    path, key = directory / "state", chain(300).key(300)
    for old in (False, True):
        left, line = set(), 1
        while killed_at(line, path):
            [*temporary] = directory.glob(archive.TEMPORARY + "*")
            assert len(temporary) <= 1 and len(list(directory.iterdir())) <= 2
            if path.exists():
                assert archive.read(path, CAPACITY).key == key
            left.add((path.exists(), bool(temporary)))
            for file in [*temporary, *([] if old else [path])]:
                file.unlink(missing_ok=True)
            line += 1
        # before, while and after the file was written; one that stands is there all the time
        assert left == {(old, False), (old, True), (True, False)}, left
        assert line > 20 and [*directory.iterdir()] == [path]


def kill_at_random(directory: Path, times: int) -> None:
    """Writers that tell of every file once it stands, each killed somewhere in what it does next:
    what was told is there, and what is there is good, but for the one that was being written."""
    rng, made = Random(5), chain(300)
    metadata = archive.describe(CAPACITY, made, 300, salt=SALT)
    tensors = [archive.narrow(made.tokens, CAPACITY.vocab_size), *image().tensors]
    for _ in range(times):
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(source)
                for number in range(10**9):
                    archive.write(directory / str(number), metadata, tensors)
                    os.write(sink, f"{number}\n".encode())
            finally:
                os._exit(1)
        os.close(sink)
        with os.fdopen(source) as pipe:
            told = [pipe.readline().strip() for _ in range(rng.randrange(4))]
            for _ in range(rng.randrange(50_000)):
                pass
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            told += pipe.read().split()
        assert told == [str(number) for number in range(len(told))]
        files = {path.name for path in directory.iterdir()}
        temporary = {name for name in files if name.startswith(archive.TEMPORARY)}
        stand = files - temporary
        assert stand in (set(told), {*told, str(len(told))}) and len(temporary) <= 1
        for name in stand:
            assert archive.read(directory / name, CAPACITY).key == made.key(300)
        for name in files:
            (directory / name).unlink()


@pytest.mark.parametrize("call", ["kill_at_every_line(at)", "kill_at_random(at, 100)"])
def test_killed_at_any_moment_nothing_is_wrong(tmp_path: Path, call: str) -> None:
    """In a process of its own, without threads, so that forks of it are whole."""
    code = "import sys, pathlib; from tests.server.engine.test_archive import *\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}at = pathlib.Path(sys.argv[1]); {call}", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_two_processes_on_one_directory(tmp_path: Path) -> None:
    """Both write the same states and give up files for want of room; a third one reads."""
    budget = 30_000
    processes = [writer(tmp_path, start, budget) for start in (0, 5)]
    try:
        lines = []
        for process in processes:
            assert process.stdout is not None
            lines += [process.stdout.readline() for _ in range(60)]
        assert all(lines)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    kept = shelf(tmp_path)
    assert kept.entries and not list((tmp_path / "quarantine").iterdir())
    for key in list(kept.entries):
        assert isinstance(load(kept, key), archive.State)
    shutil.rmtree(tmp_path / "states")
    [key] = [json.dumps(kept.directory.name)]  # a directory that vanished is no crash
    assert isinstance(load(kept, key), Trouble)
