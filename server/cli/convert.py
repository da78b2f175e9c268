"""`steadystate convert`: a release in pickles and SentencePiece becomes a checkpoint to serve.

1. weights: pytorch_model*.bin become safetensors; safetensors are copied
2. tokenizer: tokenizer.model becomes tokenizer.json where there is none
3. config.json and what else is neither weights nor code are copied

Exit codes: 0; 1 when the source does not load safely or misses something.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from server.cli.flags import add_flags, settings_of
from server.settings import Settings

SETTINGS = "revision", "hub_token", "hub_cache", "hub_offline"
COPIED = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "README.md"),
)


def add_parser(commands: Any) -> None:
    """Add this command to the console script."""
    parser = commands.add_parser(
        "convert",
        help="make safetensors and a tokenizer.json of a release in other formats",
        description="Make a checkpoint that can be served of a release whose weights are pickles "
        "(pytorch_model*.bin) or whose tokenizer is SentencePiece (tokenizer.model). No code of "
        "the release is run, and a pickle that holds more than tensors is refused.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="directory of the release, or its id on the hub"
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="directory to make")
    add_flags(parser, SETTINGS)
    parser.set_defaults(run=lambda arguments: _command(parser, arguments))


def _command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        settings = settings_of(arguments, model=arguments.source)
    except ValueError as error:
        parser.error(str(error))
    return run(settings, arguments.target)


def run(settings: Settings, target: Path) -> int:
    """Convert, and return the exit code. The target appears when it is complete, or not at all."""
    try:
        source = settings.model_path
        if target.exists():
            raise ValueError(f"TARGET: {str(target)!r} is there already")
        if settings.hub_id is not None:
            from server.hub import Repository

            source = Repository(settings).release()
        if not (source / "config.json").is_file():
            raise ValueError(f"SOURCE: no config.json in {str(source)!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            files = _convert(source, made)
            made.replace(target)
    except (ValueError, OSError) as error:
        print(f"steadystate convert: {error}", file=sys.stderr)
        return 1
    print(f"{target}: {', '.join(files)}")
    return 0


def _convert(source: Path, target: Path) -> list[str]:
    # Imported here so that --help does not wait for torch.
    from model.convert import convert_weights

    files = convert_weights(source, target)
    if not (source / "tokenizer.json").is_file() and (source / "tokenizer.model").is_file():
        from server.sentencepiece import load_tokenizer

        load_tokenizer(source).save_pretrained(target)
        files.append("tokenizer.json")
    for path in sorted(source.iterdir()):
        copied = path.name in COPIED or path.name.startswith("LICENSE")
        if copied and path.is_file() and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
            files.append(path.name)
    return files
