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
PICKLES = "pytorch_model.bin.index.json"


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

    def checkpoint(self, *, pickles: bool = False) -> Path:
        """A local directory with everything that serving reads.

        With pickles, the weights are *.bin files, for who converts them. Raises HubError.
        """
        kind, index = ("bin", PICKLES) if pickles else ("safetensors", DESCRIPTION[2])
        path = self._fetch(self.revision, *DESCRIPTION, index)
        if not (path / "config.json").is_file():
            raise self._error("there is no config.json in it")
        try:
            shards = _shards(path / index, kind)
        except ValueError as error:
            raise self._error(str(error)) from error
        self._fetch(path.name, *shards)  # of the same commit
        if not list(path.glob(f"*.{kind}")):
            hint = "" if pickles else "; `steadystate convert` makes them of pickles"
            raise self._error(f"there are no *.{kind} files at its top{hint}")
        return path

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


def _shards(index: Path, kind: str) -> list[str]:
    """Patterns for the weight files that an index names, or for all where there is none.

    Raises ValueError for an index that is none."""
    if not index.is_file():
        return [f"*.{kind}"]
    return [glob.escape(name) for name in indexed_files(index) if name.endswith(f".{kind}")]


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
