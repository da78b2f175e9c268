"""Checkpoints from the hub, by huggingface_hub: what of a repository is fetched, and its errors.

Only data is fetched: configuration, tokenizer, chat template and safetensors from the top of a
repository, never code. `python -m server.hub` fetches one checkpoint in a process of its own,
which can be ended at any time: a line of settings on stdin, a line of JSON on stdout.
"""

from __future__ import annotations

import glob
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import errors, snapshot_download

from model.index import indexed_files
from model.progress import Progress
from server import __version__
from server.logs import configure, log
from server.settings import Settings

DESCRIPTION = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
SAFETENSORS = "model.safetensors.index.json", "*.safetensors"  # index, and files without one
PICKLES = "pytorch_model.bin.index.json", "pytorch_model*.bin"
PAPERS = "LICENSE*", "README.md"


class Download(Progress):
    """Of the bars that huggingface_hub draws, one is enough for a log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """As Progress."""
        if self.bar or self.desc.startswith("Download"):
            return super().display(msg, pos)
        return None


class HubError(ValueError):
    """A checkpoint cannot be had from the hub; the message names id and revision."""


class Repository:
    """One model on the hub at one revision, seen through the local cache."""

    def __init__(self, settings: Settings) -> None:
        assert settings.hub_id is not None
        self.id = settings.hub_id
        self.revision = settings.revision
        self._options: dict[str, Any] = {
            "token": settings.hub_token,  # None: what HF_TOKEN or a login says
            "cache_dir": settings.hub_cache,
            "local_files_only": settings.hub_offline,
            "library_name": "steadystate",
            "library_version": __version__,
            "tqdm_class": Download,
        }

    def checkpoint(self) -> Path:
        """A local directory with everything that serving reads. Raises HubError."""
        path = self._described()
        if not self._weights(path, *SAFETENSORS):
            raise self._error(
                "there are no *.safetensors files at its top; `steadystate convert` makes them of "
                "pickles"
            )
        return path

    def release(self) -> Path:
        """A local directory with everything that converting reads: weights in pickles, or where
        there are none in safetensors. Raises HubError."""
        path = self._described(PICKLES[0], *PAPERS)
        if not self._weights(path, *PICKLES) and not self._weights(path, *SAFETENSORS):
            raise self._error(f"there are no {PICKLES[1]} or {SAFETENSORS[1]} files at its top")
        return path

    def _described(self, *more: str) -> Path:
        """A local directory with everything but weights, and more files that match."""
        path = self._fetch(self.revision, *DESCRIPTION, *more)
        if not (path / "config.json").is_file():
            raise self._error("there is no config.json in it")
        return path

    def _weights(self, path: Path, index: str, pattern: str) -> bool:
        """Fetch the weight files that an index names, or without one those that match, of the same
        commit. Whether there are any."""
        names = [pattern]
        if (path / index).is_file():
            try:
                named = indexed_files(path / index)
            except ValueError as error:
                raise self._error(str(error)) from error
            names = [glob.escape(name) for name in named if name.endswith(Path(pattern).suffix)]
        self._fetch(path.name, *names)
        return any(any(path.glob(name)) for name in names)

    def config(self) -> Path:
        """A local directory with config.json. Raises HubError."""
        path = self._fetch(self.revision, "config.json")
        if not (path / "config.json").is_file():
            raise self._error("there is no config.json in it")
        return path

    def _fetch(self, revision: str | None, *patterns: str) -> Path:
        """The snapshot's directory, once the files that match lie in it."""
        options = {**self._options, "allow_patterns": list(patterns), "ignore_patterns": "*/*"}
        try:
            return Path(snapshot_download(self.id, revision=revision, **options))
        except errors.GatedRepoError as error:
            raise self._error(
                "access to it must be asked for on its page, and a token given (hub_token or "
                "HF_TOKEN)"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise self._error(
                "there is neither a directory of this name here nor such a repository there, or "
                "it is private and the token (hub_token or HF_TOKEN) does not open it"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise self._error("the repository has no such revision") from error
        except errors.LocalEntryNotFoundError as error:
            why = "it is not in the local cache, or not whole"
            if not isinstance(error.__cause__, errors.OfflineModeIsEnabled | None):
                raise self._error(
                    f"{why}, and the hub cannot be reached: {_line(error)}"
                ) from error
            raise self._error(f"{why}, and offline mode is on") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            raise self._error(f"the hub answers with status {status}: {_line(error)}") from error
        except Exception as error:  # its HTTP library's, the disk's: which differs by version
            raise self._error(f"{type(error).__name__}: {_line(error)}") from error

    def _error(self, why: str) -> HubError:
        revision = self.revision or "main"
        return HubError(f"model {self.id!r} at revision {revision!r} on the hub: {why}")


def _line(error: Exception) -> str:
    """The first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else repr(error)


def main() -> int:
    """Fetch what stdin's first line names; end when stdin does, for then nobody waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, who decides
    settings = Settings.model_validate_json(sys.stdin.buffer.readline())
    configure(settings.log_level)

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    log.info(
        "fetching from the hub",
        extra={"fields": {"model": settings.hub_id, "revision": settings.revision or "main"}},
    )
    try:
        answer = {"path": str(Repository(settings).checkpoint())}
    except HubError as error:
        answer = {"error": str(error)}
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    sys.stdout.buffer.flush()
    os._exit(0)  # past the interpreter's end, at which two threads would fight over stdin


if __name__ == "__main__":
    sys.exit(main())
