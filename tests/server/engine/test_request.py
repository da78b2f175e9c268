"""What a request accepts, and when it ends."""

from __future__ import annotations

import msgspec
import pytest

from model.chunk import Sampling
from server.engine.request import accept
from tests.server.engine.bench import generate


@pytest.mark.parametrize(
    "message, error",
    [
        (generate("a", []), "tokens: the prompt is empty"),
        (generate("a", 10), "tokens: a prompt of 10 leaves no room in 10 tokens"),
        (generate("a", [3, 97]), "tokens: id 97 is not below the vocabulary's 97"),
        (generate("a", [3, -1]), "tokens: id -1 is negative"),
        (generate("a", 3, 0), "max_tokens: 0 is less than 1"),
        (generate("a", 3, stop=[99]), "stop_token_ids: id 99 is not below the vocabulary's 97"),
        (
            msgspec.structs.replace(generate("a", 3), sampling=Sampling(logit_bias={-4: 1.0})),
            "logit_bias: id -4 is negative",
        ),
        (msgspec.structs.replace(generate("a", 3), tokens=b"12345"), "tokens: 5 bytes"),
        (msgspec.structs.replace(generate("a", 3), base="ab", more=True), "more: a prompt with a"),
    ],
)
def test_the_impossible_is_named(message, error):
    with pytest.raises(ValueError, match=error):
        accept(message, max_length=10, vocab_size=97)


def test_length_is_bounded_by_both():
    assert accept(generate("a", 3, 5), max_length=None, vocab_size=97).length_limit == 8
    assert accept(generate("a", 3, 5), max_length=100, vocab_size=97).length_limit == 8
    assert accept(generate("a", 3, 500), max_length=100, vocab_size=97).length_limit == 100


def test_it_ends_at_a_stop_id_but_not_before_min_tokens():
    request = accept(generate("a", 3, 9, min_tokens=2, stop=[5]), max_length=None, vocab_size=97)
    assert request.suppress == (5,)
    request.append(5)
    request.append(6)
    assert request.finish is None and request.suppress == ()
    request.append(5)
    assert request.finish == "stop" and request.generated == 3


def test_a_stop_id_as_the_last_token_is_a_stop():
    request = accept(generate("a", 3, 1, stop=[5]), max_length=None, vocab_size=97)
    request.append(5)
    assert request.finish == "stop"
