"""SentencePiece BPE models (tokenizer.model) as tokenizers of the tokenizers library.

Reads the file's protobuf itself: no code of a checkpoint runs and no library is needed. The format
is sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"  # what a space is in a piece
BPE = 2  # of TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of SentencePiece.Type


@dataclass(slots=True)
class SentencePieceModel:
    """What encoding and decoding need of a model: pieces (text, score, type) by id, and rules."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = 1
    byte_fallback: bool = False
    suffix: bool = False  # whitespace ends a word instead of beginning one
    special: dict[str, int] = field(
        default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    )
    charsmap: bytes = b""
    prefix: bool = True  # a space is put before the text
    squeeze: bool = True  # runs of spaces become one, those at the ends none
    escape: bool = True

    @classmethod
    def parse(cls, data: bytes) -> SentencePieceModel:
        """Raises ValueError when the bytes are not a SentencePiece model."""
        model = cls()
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_piece(_bytes(value)))
            elif number == 2:
                model._train(_bytes(value))
            elif number == 3:
                model._normalize(_bytes(value))
        if not model.pieces:
            raise ValueError("it has no pieces")
        return model

    def _train(self, data: bytes) -> None:
        ids = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
        for number, value in _fields(data):
            if number == 3:
                self.kind = _int(value)
            elif number == 24:
                self.suffix = bool(value)
            elif number == 35:
                self.byte_fallback = bool(value)
            elif number in ids:
                self.special[ids[number]] = _int(value)

    def _normalize(self, data: bytes) -> None:
        for number, value in _fields(data):
            if number == 2:
                self.charsmap = _bytes(value)
            elif number == 3:
                self.prefix = bool(value)
            elif number == 4:
                self.squeeze = bool(value)
            elif number == 5:
                self.escape = bool(value)

    def token(self, name: str) -> str | None:
        """The piece that is "unk", "bos", "eos" or "pad"."""
        index = self.special[name]
        return self.pieces[index][0] if 0 <= index < len(self.pieces) else None


def backend_of(model: SentencePieceModel) -> Tokenizer:
    """The same encoding and decoding in the tokenizers library. ValueError: it cannot do that.

    Differs in one thing, on purpose: the text of a control piece is that token.
    """
    if model.kind != BPE:
        raise ValueError(f"its model_type is {model.kind}, {BPE} (BPE) is due")
    if model.suffix or not model.escape:
        raise ValueError("it treats whitespace in a way that is not supported")
    if any(kind == UNUSED for _, _, kind in model.pieces):
        raise ValueError("it has pieces of type UNUSED, which are not supported")
    vocab = {text: index for index, (text, _, _) in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise ValueError("it has a piece twice")
    symbols = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(model.pieces),
            unk_token=model.token("unk"),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(symbols),  # a symbol is a whole word, and no merge makes it
        )
    )
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeeze:
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if symbols:
        longest = sorted(symbols, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest)))
        backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    decode: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if model.prefix or model.squeeze:
        decode.append(decoders.Strip(" ", 1 << 20 if model.squeeze else 1, 0))
    backend.decoder = decoders.Sequence(decode)
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, _, kind in model.pieces
            if kind in (CONTROL, UNKNOWN)
        ]
    )
    return backend


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of directory/tokenizer.model, with the settings of its tokenizer_config.json.

    Raises ValueError that says why it cannot be had.
    """
    path = directory / "tokenizer.model"
    try:
        model = SentencePieceModel.parse(path.read_bytes())
        backend = backend_of(model)
    except ValueError as error:
        raise ValueError(f"{path} is not a SentencePiece BPE model to serve: {error}") from error
    settings: dict[str, Any] = {}
    for name in ("config.json", "tokenizer_config.json"):
        file = directory / name
        settings |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before, after = (
        model.token(name) if settings.get(f"add_{name}_token") is True else None
        for name in ("bos", "eos")
    )
    affixes = [token for token in (before, after) if token is not None]
    if affixes:
        template = " ".join(filter(None, (before, "$A", after)))
        special = [(token, backend.token_to_id(token)) for token in affixes]
        backend.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokens = {f"{name}_token": model.token(name) for name in model.special}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=settings.get("chat_template"),
        **{name: token for name, token in tokens.items() if token is not None},
    )


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, that with the best score first."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges: list[tuple[float, int, str, str]] = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                merges.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _int(value)
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers, and values as integers or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("it is not in SentencePiece's format")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is not in SentencePiece's format")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("it is not in SentencePiece's format")
    return value


def _int(value: int | bytes) -> int:
    """An int32: negative ones are written as 64 bits."""
    if not isinstance(value, int):
        raise ValueError("it is not in SentencePiece's format")
    return value - (1 << 64) if value >= 1 << 63 else value
