"""Pieces of a text have the ids of the whole, whatever the tokenizer and however odd the text."""

from __future__ import annotations

import asyncio
import json
import random
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from server.api import encoder as sizes
from server.api.cuts import GPT2, NEAR, TRIES, Cuts
from server.api.encoder import Encoder, encode
from server.api.pattern import NotUnderstoodError, Pattern
from server.api.tokenizer import Tokenizer as OurTokenizer
from server.sentencepiece import SentencePieceModel, backend_of
from tests.server.api.live import ROOT
from tests.server.pieces import train

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
CASED = (  # o200k's form
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED = ("<|end|>", "<|", "foo", "é<x>", "   ")
WORDS = [
    *("the", "of", "and", "don't", "I'LL", "we've", "foo", "naïve", "été", "Straße", "Ωmega"),
    *("12345", "3.14", "a_b", "x=1;", "//", "...", "!?", "(a)", "\n", "\n\n", "  ", "\t", "。"),
    *(
        "你好",
        "世界",
        "привет",
        "мир",
        "שלום",
        "हिन्दी",
        "한국어",
        "👩‍👩‍👧",
        "🙂",
        "e\u0301",
        "<|en",
    ),
]
FRAGMENTS = [
    *WORDS,
    *ADDED,
    *(token[:cut] for token in ADDED[:2] for cut in (1, 3)),
    *(" ", "    ", " \n ", "\r\n", "\u00a0", "\u2003", "\u200b", "\u200d", "\ufe0f", "\u3000"),
    *(
        "a",
        "aaaaaaaa",
        "A",
        "'",
        "'s",
        "'S",
        "'ſ",
        "ﬁ",
        "ß",
        "\u212a",
        "İ",
        "1",
        "²",
        "Ⅷ",
        "٣",
        "_",
    ),
    *("\u0301", "\u0323", "\u09be", "\u1100\u1161\u11a8", "각", "\u1b06", "ら゙", "\u0000", "\x1c"),
    *("👨‍💻", "🏳️‍🌈", "🇩🇪", "\U0001e030", "\U00016d67", "ᾂ", "α\u0313\u0300\u0345", "▁", "▁a", "�"),
]
TEXT = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.tuples(st.sampled_from(FRAGMENTS), st.integers(2, 9)).map(lambda x: x[0] * x[1]),
        st.text(max_size=3),
    ),
    max_size=24,
).map("".join)


def corpus() -> list[str]:
    rng = random.Random(3)
    return [
        "".join(rng.choice(["", " ", " ", "  "]) + rng.choice(WORDS) for _ in range(40))
        for _ in range(200)
    ]


def trained(
    pre: Any, normalizer: Any = None, model: Any = None, *, byte_level: bool = True, **options: Any
) -> Tokenizer:
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    kind = trainers.UnigramTrainer if isinstance(model, models.Unigram) else trainers.BpeTrainer
    special = {"unk_token": "<unk>"} if kind is trainers.UnigramTrainer else {}
    trainer = kind(
        vocab_size=600,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<s>", "<unk>"],
        **special,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    tokenizer.add_tokens([AddedToken(text, normalized=False, **options) for text in ADDED])
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    return tokenizer


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def levels(*stages: Any, prefix: bool = False) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([*stages, last])


def recall() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "model/bundled/recall/tokenizer.json"))


def llama2(prepend: bool) -> Tokenizer:
    """As SentencePiece's BPE comes: no split at all, spaces spelled, bytes for what is unknown."""
    steps = [normalizers.Prepend("▁")] if prepend else []
    # trained on words, as SentencePiece does, so that no token goes on behind a space
    tokenizer = trained(
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        model=models.BPE(unk_token="<unk>", fuse_unk=True),
        byte_level=False,
    )
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None
    steps.append(normalizers.Replace(" ", "▁"))
    whole = Tokenizer.from_str(json.dumps(spec))
    whole.normalizer = normalizers.Sequence(steps)
    return whole


DEEPSEEK = levels(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(LLAMA3))
FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "recall": recall,
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2, a space before": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: trained(levels(split(LLAMA3))),
    "llama3, whole words": lambda: trained(
        levels(split(LLAMA3)), model=models.BPE(ignore_merges=True)
    ),
    "possessive": lambda: trained(levels(split(POSSESSIVE))),
    "cased": lambda: trained(levels(split(CASED))),
    "composed": lambda: trained(levels(split(LLAMA3)), normalizers.NFC()),
    "compatible": lambda: trained(levels(split(LLAMA3)), normalizers.NFKC()),
    "several stages": lambda: trained(DEEPSEEK),
    "digits": lambda: trained(levels(pre_tokenizers.Digits(True), split(GPT2))),
    "no split": lambda: trained(levels()),
    "added tokens take spaces": lambda: trained(levels(split(LLAMA3)), lstrip=True, rstrip=True),
    "added tokens are words": lambda: trained(levels(split(LLAMA3)), single_word=True),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace(), byte_level=False),
    "metaspace, first": lambda: trained(
        pre_tokenizers.Metaspace(prepend_scheme="first"), byte_level=False
    ),
    "unigram": lambda: trained(
        pre_tokenizers.Metaspace(), model=models.Unigram(), byte_level=False
    ),
    "llama2": lambda: llama2(prepend=True),
    "llama2, nothing before": lambda: llama2(prepend=False),
    "baichuan": lambda: backend_of(SentencePieceModel.parse(train())),
    "whitespace": lambda: trained(pre_tokenizers.WhitespaceSplit(), byte_level=False),
    "not understood": lambda: trained(
        levels(split(r"\b\w+\b|\W+")), normalizers.Sequence([normalizers.StripAccents()])
    ),
}
NO_CUTS = {"not understood"}
EASY = "It was a cold morning, and nobody spoke until the coach left. " * 3


@cache
def family(name: str, plain: bool = False) -> Encoder:
    backend = FAMILIES[name]()
    spec = json.loads(backend.to_str())
    backend.encode_special_tokens = plain
    return Encoder(backend, spec, plain=plain)


def joined(encoder: Encoder, pieces: list[str]) -> array[int]:
    ids = encoder.first(pieces[0])
    for piece in pieces[1:]:
        ids += encoder.later(piece)
    return ids


@pytest.mark.parametrize("name", FAMILIES)
@given(text=TEXT, plain=st.booleans())
@settings(max_examples=60, deadline=None)
@example(text="foo bar foo <|end|> foo   foo", plain=False)
@example(text="a   <|end|>   b  <|<|end|>|>  é<x> e\u0301<x>", plain=True)
def test_both_sides_of_a_safe_point_are_the_whole(name: str, text: str, plain: bool) -> None:
    encoder = family(name, plain)
    whole = encode(encoder.backend, text)
    for point in range(len(text)):
        if encoder.cuts.safe(text, point):
            assert joined(encoder, [text[:point], text[point:]]) == whole, (point, text)


@pytest.mark.parametrize("name", FAMILIES)
@given(text=TEXT)
@settings(max_examples=30, deadline=None)
def test_pieces_are_the_whole(name: str, text: str) -> None:
    encoder = family(name)
    with pytest.MonkeyPatch.context() as patch:
        for size, value in (("WHOLE", 8), ("FIRST", 4), ("MOST", 12)):
            patch.setattr(sizes, size, value)
        pieces = list(encoder.pieces(text))
    assert "".join(pieces) == text
    assert joined(encoder, pieces) == encode(encoder.backend, text)


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_text_is_cut_where_that_is_possible_at_all(name: str) -> None:
    encoder = family(name)
    points = [point for point in range(len(EASY)) if encoder.cuts.safe(EASY, point)]
    assert len(points) == 0 if name in NO_CUTS else len(points) >= 20


LONG: dict[str, str] = {
    "spaces": " " * 1_000_000,
    "one letter": "a" * 300_000,
    "no newline": "the quick brown fox " * 50_000,
    "joined emoji": "👩‍👩‍👧‍👦" * 20_000,
    "marks": "e" + "\u0301\u0323" * 100_000,
    "a token's text": "<|end|>" * 30_000,
    "almost a token": "<|en" * 60_000,
}


@pytest.mark.parametrize("name", ["recall", "gpt2", "llama3", "composed", "metaspace", "baichuan"])
@pytest.mark.parametrize("kind", LONG)
def test_long_monotonous_texts(name: str, kind: str) -> None:
    encoder, text = family(name), LONG[kind]
    pieces = list(encoder.pieces(text))
    assert joined(encoder, pieces) == encode(encoder.backend, text)
    if kind == "no newline" or (name == "recall" and kind != "a token's text"):
        assert len(pieces[0]) <= sizes.FIRST and max(map(len, pieces)) <= sizes.MOST


@pytest.mark.parametrize("kind", LONG)
def test_who_looks_for_a_point_gives_up_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is on the event loop: in a text that has no safe point it takes but a moment."""
    encoder, text, looked = family("llama3"), LONG[kind] * 8, 0
    safe = Cuts.safe

    def counted(cuts: Cuts, text: str, point: int) -> bool:
        nonlocal looked
        looked += 1
        return safe(cuts, text, point)

    monkeypatch.setattr(Cuts, "safe", counted)
    pieces = list(encoder.pieces(text))
    assert len(pieces) == 1 or kind == "no newline"
    assert looked <= len(pieces) * (2 * TRIES + NEAR) * len(text).bit_length()


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, POSSESSIVE, CASED, r"\p{N}{1,3}", r"\s"])
@given(text=TEXT, data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_claimed_of_a_pattern(pattern: str, text: str, data: st.DataObject) -> None:
    """Against the engine that tokenizers runs: no match holds both, none is lost."""
    claims = Pattern(pattern)
    matcher = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    spans = [span for _, span in matcher.pre_tokenize_str(text)]
    inside = {at for low, high in spans for at in range(low, high)}
    for point in range(1, len(text)):
        a, b = text[point - 1], text[point]
        if claims.parts(a, b):
            assert not any(low < point < high for low, high in spans)
        if claims.covers(a):
            assert point - 1 in inside
        if point - 1 in inside:
            assert claims.reads(a)


@pytest.mark.parametrize(
    "pattern",
    [r"\ba", "^a", "a$", "(?<=a)b", r"(a)\1", "[[:alpha:]]", "a*", "[a&&b]", "(?>a)", "a{99}"],
)
def test_patterns_that_are_not_understood(pattern: str) -> None:
    with pytest.raises(NotUnderstoodError):
        Pattern(pattern)


def test_tokenizers_of_which_nothing_is_claimed() -> None:
    spec = json.loads(trained(levels(split(LLAMA3))).to_str())
    assert Cuts(spec).possible
    for change in (
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"pre_tokenizer": {"type": "UnicodeScripts"}},
        {"model": {**spec["model"], "dropout": 0.1}},
        {
            "normalizer": {"type": "NFC"},
            "added_tokens": [{**token, "normalized": True} for token in spec["added_tokens"]],
        },
    ):
        cuts = Cuts({**spec, **change})
        assert not cuts.possible and cuts.find(EASY, 0, 100) is None


def write(path: Path, backend: Tokenizer, template: str) -> OurTokenizer:
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(template)
    return OurTokenizer(path)


@pytest.mark.parametrize("name", ["llama3", "llama2", "metaspace", "not understood"])
def test_prompts_and_conversations_in_pieces(name: str, tmp_path: Path) -> None:
    backend = FAMILIES[name]()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 0), ("<unk>", 1)]
    )
    template = "{% for m in messages %}<s>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = write(tmp_path / "m", backend, template)
    text = "".join(random.Random(1).choices(FRAGMENTS, k=12_000)).replace("<|end|>", "")
    shapes = [["a", text, "b"], ["x <|end|> y", text + "<|end|>", " c"]]

    async def all_of_them() -> list[list[int]]:
        pieces = tokenizer.pieces(text, add_special_tokens=True)
        found = [(await pieces.all()).tolist()]
        for contents in shapes:
            messages = [{"role": "user", "content": content} for content in contents]
            found.append(
                (await tokenizer.encode_chat(messages, add_generation_prompt=False)).tolist()
            )
        return found

    cut = asyncio.run(all_of_them())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "WHOLE", 10**9)
        assert asyncio.run(all_of_them()) == cut
    assert cut[0] == encode(backend, text, add_special_tokens=True).tolist()
    tokenizer.close()
