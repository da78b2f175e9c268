"""A server to be measured: the real command around a checkpoint, or around random weights.

    python -m benchmarks.served --directory DIR     the engine process, its weights drawn

A directory without weights gets a tokenizer whose every id has a text, and random weights.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from server.api.detokenizer import _byte_alphabet
from server.engine.__main__ import load
from server.engine.process import run_engine
from server.settings import Settings

ENGINE = [sys.executable, "-m", "benchmarks.served"]
SERVE = "import sys; from server.cli.serve import run; from server.settings import Settings; \
sys.exit(run(Settings.model_validate_json(sys.stdin.read()), command={!r}))"


@contextmanager
def checkpoint(model: str) -> Iterator[Settings]:
    """Settings for a model to serve; `model` may be a directory with a config.json alone."""
    settings = Settings(model=model)
    path = settings.model_path
    if any(path.glob("*.safetensors")):
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="served-") as directory:
        made = Path(directory) / path.resolve().name
        made.mkdir()
        shutil.copy(path / "config.json", made)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (path / name).is_file():
                shutil.copy(path / name, made)
        if not (made / "tokenizer.json").is_file():
            config = json.loads((path / "config.json").read_text())
            write_tokenizer(made, config["vocab_size"])
        yield Settings(model=str(made))


def write_tokenizer(path: Path, size: int) -> None:
    """Bytes, and words without merges for the rest of the ids."""
    vocab = {char: byte for char, byte in _byte_alphabet().items()}
    vocab |= {f"Ġ{number:x}": number for number in range(256, size)}
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False,
    }  # fmt: skip
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def engine_command(settings: Settings) -> list[str] | None:
    """What runs the engine; None: the usual one."""
    return None if any(settings.model_path.glob("*.safetensors")) else ENGINE


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """A server's URL, once it is ready. It is ended afterwards."""
    with launched(settings) as (url, _):
        yield url


@contextmanager
def launched(settings: Settings, *, apart: bool = False) -> Iterator[tuple[str, int]]:
    """The same, and the id of its process; `apart`: which is then that of a group of its own.
    A signal to the group of this process does not reach it: let SIGTERM raise an exception here."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE.format(engine_command(settings))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            process_group=0 if apart else None,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(settings.model_dump_json())
            process.stdin.close()
            line = process.stdout.readline()  # said when it is ready
            if " at http" not in line:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-2000:]}")
            print(line.strip())
            yield line.partition(" at ")[2].split()[0], process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()  # its engine sees that and ends
            process.stdout.close()


def main() -> int:
    directory = Path(sys.argv[sys.argv.index("--directory") + 1])
    return run_engine(directory, partial(load, seed=0))


if __name__ == "__main__":
    sys.exit(main())
