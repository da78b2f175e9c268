"""Pieces joined are the text of the whole, and no piece ends in half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from server.api.detokenizer import HELD, ByteDetokenizer, ByteVocabulary, PrefixDetokenizer
from server.api.tokenizer import Tokenizer
from tests.server.api.checkpoint import END, SPECIALS, VOCAB

NONE: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


def byte_fallback() -> Backend:
    """Byte tokens 0-255 as sentencepiece vocabularies have them, and a few words."""
    words = ["▁the", "▁cat", "s", "▁", "é", "▁日本"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + index for index, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


FALLBACK = byte_fallback()


@given(st.lists(st.integers(0, VOCAB - 1), max_size=60))
def test_any_ids_give_what_decoding_the_whole_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    for skip in (False, True):
        detokenizer = tokenizer.detokenizer([], skip_special_tokens=skip)
        pieces = [detokenizer.push(id) for id in ids] + [detokenizer.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_pieces_of_text_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@given(st.binary(max_size=40))
def test_what_cannot_become_a_character_is_not_held_back(data: bytes) -> None:
    vocabulary = ByteVocabulary(Backend(models.BPE()))
    vocabulary._bytes = {byte: bytes([byte]) for byte in range(256)}
    detokenizer = ByteDetokenizer(vocabulary, NONE)
    for position, byte in enumerate(data):
        detokenizer.push(byte)
        assert len(detokenizer._decoder.getstate()[0]) <= 3, data[: position + 1]


def test_tokens_outside_of_the_byte_alphabet_stand_for_themselves() -> None:
    backend = Backend(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["<｜end▁of▁sentence｜>", "a b", "é"])
    detokenizer = ByteDetokenizer(ByteVocabulary(backend), NONE)
    text = "".join(detokenizer.push(id) for id in (0, 1, 2)) + detokenizer.flush()
    assert text == backend.decode([0, 1, 2])
    assert text.startswith("<｜end▁of▁sentence｜>a b")


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "▁", "é", "▁日本", "日", "🙂", "ñ"])))
def test_byte_fallback_text_joins_to_the_whole(words: list[str]) -> None:
    ids = []
    for word in words:
        id = FALLBACK.token_to_id(word)
        ids += list(word.encode()) if id is None else [id]
    detokenizer = PrefixDetokenizer(FALLBACK, NONE)
    pieces = [detokenizer.push(id) for id in ids]
    assert "".join(pieces) + detokenizer.flush() == FALLBACK.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_leading_space_is_kept_after_a_prompt() -> None:
    the, cat = FALLBACK.token_to_id("▁the"), FALLBACK.token_to_id("▁cat")
    assert PrefixDetokenizer(FALLBACK, NONE).push(cat) == "cat"
    assert PrefixDetokenizer(FALLBACK, NONE, [the]).push(cat) == " cat"


def test_invalid_bytes_hold_a_prefix_detokenizer_back_for_a_few_tokens_only() -> None:
    detokenizer = PrefixDetokenizer(FALLBACK, NONE)
    text = ""
    for pushed in range(1, 100):
        text += detokenizer.push(0xFF)
        assert pushed - len(text) < HELD
    assert len(detokenizer._window) <= 2 * HELD


def test_special_tokens_are_skipped_on_demand(tokenizer: Tokenizer) -> None:
    kept = tokenizer.detokenizer([], skip_special_tokens=False)
    assert kept.push(END) == SPECIALS[-1]
    assert tokenizer.detokenizer([], skip_special_tokens=True).push(END) == ""


def test_half_a_character_at_the_end_is_replaced(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
    assert detokenizer.push("é".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"
