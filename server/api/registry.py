"""The registry of contexts: which have a name and an owner, until when, and which state is theirs.

With a directory a context is one small file, contexts/ID.KEY.json, which comes and goes by one
rename or unlink; the name of the file keeps the state of KEY from being given up. All servers of
one model that compute alike and share the directory see it. Without a directory the registry is a
dictionary.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from server.engine.archive import sync, write_whole
from server.engine.shelf import locked
from server.errors import ConflictError, GoneError, NotFoundError

log = logging.getLogger(__name__)

TAIL = 64  # last tokens of a text, kept to see how more text joins on


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One context. identity is that of the Capacity of servers that can use its state, owner and
    salt are digests; messages is what it was made from, or None."""

    id: str
    key: str
    identity: str
    owner: str
    kind: str
    count: int
    bytes: int
    salt: str
    created: float
    name: str | None = None
    expires: float | None = None
    messages: list[dict[str, Any]] | None = None
    template: dict[str, Any] = {}
    tail: list[int] = []

    @property
    def expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires

    def shown(self, model: str) -> dict[str, object]:
        """As clients see it."""
        return {
            "id": self.id,
            "object": "context",
            "name": self.name,
            "model": model,
            "kind": self.kind,
            "tokens": self.count,
            "bytes": self.bytes,
            "digest": self.key,
            "created_at": int(self.created),
            "expires_at": None if self.expires is None else int(self.expires),
        }


class Registry:
    """All methods may take the time of a disk: call them in a thread."""

    def __init__(self, directory: Path | None, identity: str) -> None:
        self.directory = directory
        self._identity = identity
        self._records: dict[str, Record] = {}  # by file name, or by id without a directory
        self._alone = threading.RLock()

    def get(self, id: str, owner: str) -> Record:
        """NotFoundError unless there is one, and it is this owner's."""
        for record in self._all():
            if record.id == id and record.owner == owner and not record.expired:
                return record
        raise NotFoundError(
            f"context: there is no context {id[:100]!r}", param="context", code="context_not_found"
        )

    def owned(self, owner: str) -> list[Record]:
        """An owner's, the oldest first."""
        mine = [r for r in self._all() if r.owner == owner and not r.expired]
        return sorted(mine, key=lambda record: record.created)

    def put(self, record: Record, *, instead: Record | None = None) -> None:
        """Enter a context, or its next state in place of one. ConflictError: its name is taken, or
        it is not what it was; GoneError: its state was given up meanwhile."""
        if self.directory is None:
            with self._alone:
                self._put(record, instead)
                self._records[record.id] = record
            return
        with locked(self.directory):
            self._put(record, instead)
            if not (self.directory / "states" / f"{record.key}.safetensors").exists():
                raise GoneError("the context's state was given up at once: try again")
            content = msgspec.json.encode(record)
            digest = hashlib.sha256(content).hexdigest().encode()
            write_whole(self._path(record), [digest, b"\n", content])
            if instead is not None and instead.key != record.key:
                self._path(instead).unlink(missing_ok=True)
                sync(self.directory / "contexts")

    def remove(self, record: Record) -> bool:
        """Take a context out; whether it was there."""
        if self.directory is None:
            return self._records.pop(record.id, None) is not None
        with locked(self.directory):
            there = self._path(record).exists()
            self._path(record).unlink(missing_ok=True)
            sync(self.directory / "contexts")
        return there

    def purge(self) -> list[Record]:
        """Take out those whose time has come."""
        return [record for record in list(self._all()) if record.expired and self.remove(record)]

    def _put(self, record: Record, instead: Record | None) -> None:
        present = [other for other in self._all() if not other.expired]
        if instead is not None and instead not in present:
            raise ConflictError(f"context {record.id} was changed or deleted meanwhile")
        for other in present:
            same = other.owner == record.owner and other.name == record.name
            if record.name is not None and same and other.id != record.id:
                raise ConflictError(
                    f"name: there is a context named {record.name!r}, {other.id}",
                    param="name",
                    code="context_exists",
                )

    def _all(self) -> Iterator[Record]:
        """Every record that is of use here, read once a file: a file never changes."""
        if self.directory is None:
            yield from list(self._records.values())
            return
        found: dict[str, Record] = {}
        for path in (self.directory / "contexts").glob("*.*.json"):
            record = self._records.get(path.name) or self._read(path)
            if record is not None and record.identity == self._identity:
                found[path.name] = record
        self._records = found
        yield from found.values()

    def _read(self, path: Path) -> Record | None:
        try:
            digest, _, content = path.read_bytes().partition(b"\n")
            if digest.decode() != hashlib.sha256(content).hexdigest():
                raise ValueError("its checksum is wrong")
            record = msgspec.json.decode(content, type=Record)
            if self._path(record).name != path.name:
                raise ValueError(f"it is of context {record.id}")
            return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.DecodeError) as error:
            assert self.directory is not None
            log.error("refused %s, put away: %s", path, error)
            with contextlib.suppress(OSError):
                path.rename(self.directory / "quarantine" / f"{path.name}.{time.time_ns()}")
            return None

    def _path(self, record: Record) -> Path:
        assert self.directory is not None
        return self.directory / "contexts" / f"{record.id}.{record.key}.json"


def owner_of(key: str) -> str:
    """An API key as records name it."""
    return hashlib.sha256(b"owner\0" + key.encode()).hexdigest()[:32]
