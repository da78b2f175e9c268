"""SentencePiece models in the tokenizers library, against the sentencepiece library itself."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.tokenizer import Tokenizer
from server.sentencepiece import SentencePieceModel, backend_of, load_tokenizer
from tests.server.pieces import ROOT, oracle_of, train

RULES: dict[str, dict[str, Any]] = {
    "baichuan": {},
    "no-prefix": {"add_dummy_prefix": False},
    "squeezed": {"remove_extra_whitespaces": True},
    "nmt-nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no-bytes": {"byte_fallback": False},
    "symbols": {"user_defined_symbols": ["<tool>", "<tool>>", "a b", "\t"]},
    "control": {"control_symbols": ["<sep>"], "pad_id": 3},
}
TEXTS = (
    "",
    " ",
    "    ",
    "a",
    " a",
    "a ",
    "Hello world",
    "  Hello   world  ",
    "The state is a slot, 12345 times 67.",
    "line\nline\n\n\ttabs\r\n",
    "深い川 川川 𝕬 é e\u0301 ﬁ ① \u3000 \U0001f600\U0001f468\u200d\U0001f469",
    "\u2581 already \u2581\u2581",
    "<tool>a<tool>> a b<tool> <tool>>>x a ba b",
    "\x00\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababab abab",
)


@cache
def model_of(rule: str) -> bytes:
    return train(**RULES[rule])


@pytest.fixture(scope="module", params=RULES)
def rule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def texts() -> list[str]:
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/decay.md", "Makefile")]
    return [*TEXTS, *pages]


def test_ids_are_the_librarys(rule: str) -> None:
    data = model_of(rule)
    backend, oracle = backend_of(SentencePieceModel.parse(data)), oracle_of(data)
    assert backend.get_vocab_size() == oracle.get_piece_size()
    for text in texts():
        assert backend.encode(text).ids == oracle.encode(text), text[:60]


def test_decoding_is_the_librarys(rule: str) -> None:
    data = model_of(rule)
    backend, oracle = backend_of(SentencePieceModel.parse(data)), oracle_of(data)
    for text in texts():
        ids = [id for id in oracle.encode(text) if not oracle.is_unknown(id)]
        assert backend.decode(ids) == oracle.decode(ids), text[:60]


ALPHABET = st.sampled_from(
    [*"aeinotsrdlh  .,\n0123<>|_-`", "th", "the ", "state", "川", "é", "\U0001f600"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ALPHABET, max_size=40).map("".join))
def test_ids_of_any_text(text: str) -> None:
    assert _backend().encode(text).ids == _oracle().encode(text)


@cache
def _backend() -> Any:
    return backend_of(SentencePieceModel.parse(model_of("baichuan")))


@cache
def _oracle() -> Any:
    return oracle_of(model_of("baichuan"))


def test_the_special_ids_are_the_models(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_of("control"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 3
    assert tokenizer.encode("a</s>")[-1] == 2
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2], skip_special_tokens=True) == "a b"


@pytest.mark.parametrize(
    ("given", "first", "last"),
    [
        ({}, False, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_affixes_are_as_the_checkpoint_says(
    tmp_path: Path, given: dict[str, bool], first: bool, last: bool
) -> None:
    data = model_of("baichuan")
    (tmp_path / "tokenizer.model").write_bytes(data)
    # remote code in there is named, and never loaded
    given = {"tokenizer_class": "BaichuanTokenizer", **given}  # type: ignore[dict-item]
    automatic = {"auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**given, **automatic}))
    (tmp_path / "tokenization_baichuan.py").write_text("raise SystemExit('remote code ran')")
    want = [1] * first + oracle_of(data).encode("the state") + [2] * last
    assert load_tokenizer(tmp_path)("the state")["input_ids"] == want


def test_a_directory_with_nothing_else_serves(tmp_path: Path) -> None:
    """Streaming gives the text back, spaces and characters of several tokens included."""
    data = model_of("baichuan")
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = Tokenizer(tmp_path)
    text = "The state of 川 is \U0001f600 and  so on"
    prompt = asyncio.run(tokenizer.encode("It was ", add_special_tokens=True))
    assert prompt.tolist() == oracle_of(data).encode("It was ")
    ids = oracle_of(data).encode(text)
    stream = tokenizer.detokenizer(prompt, skip_special_tokens=True)
    pieces = [stream.push(id) for id in [*ids, 2]] + [stream.flush()]
    assert "".join(pieces) == " " + text
    assert tokenizer.eos_ids == (2,)
    tokenizer.close()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no pieces"),
        (b"IQ== 0\nIg== 1\n", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "not in SentencePiece's format"),
        (b"\x0a" + b"\x80" * 11, "not in SentencePiece's format"),
        (train(model_type="unigram", vocab_size=400), "model_type is 1, 2"),
        (train(treat_whitespace_as_suffix=True), "whitespace"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=why):
        load_tokenizer(tmp_path)
