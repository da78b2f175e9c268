"""Text to ids and ids to text, by the checkpoint's own tokenizer and chat template.

Encoding runs in threads, off the event loop, and what is long in pieces, several at a time. Control
tokens inside a chat's contents are text.
"""

from __future__ import annotations

import asyncio
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.api.detokenizer import (
    ByteDetokenizer,
    ByteVocabulary,
    Detokenizer,
    PrefixDetokenizer,
)
from server.api.encoder import FIRST, MOST, Encoder, encode
from server.api.pieces import Pieces, Work
from server.api.reasoning import CLOSE, OPEN
from server.api.template import ChatTemplate, Marked
from server.sentencepiece import load_tokenizer

T = TypeVar("T")

CONTEXT = 6  # prompt tokens that a detokenizer without bytes looks back on
THREADS = 4  # for what is short: first pieces, bodies, texts of ids
AHEAD = max(2, min(8, os.cpu_count() or 1))  # pieces of long prompts encoded at a time


@dataclass(slots=True, frozen=True)
class TokenText:
    """How a token is shown. `bytes` may be part of a character, `text` then holds U+FFFD."""

    text: str
    bytes: bytes


class Tokenizer:
    """A checkpoint's tokenizer. Methods that take a prompt's worth of work are coroutines.

    `thinks` says whether the model is one that reasons between tags before it answers.
    """

    def __init__(self, path: Path) -> None:
        tokenizer = _load(path)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{path} has no tokenizer that the tokenizers library can run")
        self._backend: Backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        tags = {id: token.content for id, token in added.items() if token.content in (OPEN, CLOSE)}
        self._tags = frozenset(tags)
        spec = json.loads(self._backend.to_str())
        self._bytes = ByteVocabulary(self._backend) if _is_byte_level(spec["decoder"]) else None
        self.template = ChatTemplate(tokenizer, added)
        self.thinks = len(tags) == 2 or any(map(self.template.mentions, (OPEN, CLOSE)))
        plain = _without(spec, self.template.controls)
        self._plain = Backend.from_str(json.dumps(plain))
        self._plain.encode_special_tokens = True
        self._raw_text = Encoder(self._backend, spec)
        self._plain_text = Encoder(self._plain, plain, plain=True)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self.most_bytes = self._raw_text.cuts.most_bytes()  # that one token stands for, if known
        self._long = ThreadPoolExecutor(AHEAD, thread_name_prefix="tokenize-long")
        self.size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = _eos_ids(path, tokenizer.eos_token_id)

    def close(self) -> None:
        """Wait for no one: what is still being encoded has no reader any more."""
        for pool in (self._pool, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    def pieces(self, text: str, *, add_special_tokens: bool) -> Pieces:
        """A raw prompt, in which the text of a control token is that token."""
        return self._pieces(self._raw_works(text, add_special_tokens), [text])

    async def chat_pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Pieces:
        """A conversation. Raises RequestError when the template refuses it."""

        def render() -> tuple[Marked, list[tuple[str, int | None]]]:
            rendered = self.template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                kwargs=kwargs or {},
            )
            return rendered, list(rendered.parts()) if rendered.marked else []

        rendered, parts = await self.run(render)
        if not rendered.marked:
            return self.pieces(rendered.text, add_special_tokens=add_special_tokens)
        texts = [text for text, _ in parts]
        return self._pieces(self._marked_works(parts, add_special_tokens), texts)

    async def encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        """Ids of a raw prompt, all of them."""
        return await self.pieces(text, add_special_tokens=add_special_tokens).all()

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> array[int]:
        """Ids of a conversation, all of them; options are those of chat_pieces()."""
        return await (await self.chat_pieces(messages, **options)).all()

    def boundaries(self, tokens: array[int]) -> list[int]:
        """Where the messages of an encoded conversation end: positions after a closing token."""
        if self.template.closing is None:
            return []
        ids = numpy.frombuffer(tokens, dtype=numpy.int32)
        ends: list[int] = (numpy.flatnonzero(ids == self.template.closing) + 1).tolist()
        return ends

    async def encode_after(self, tail: array[int], text: str) -> tuple[int, array[int]]:
        """How text goes on after tokens: how many of these become others, and all that follow.

        The end of what was there is encoded again together with the text. Where it does not come
        out as the tokens that were there, text begins with a token of its own.
        """

        def work() -> tuple[int, array[int]]:
            for start in range(min(8, len(tail))):
                before = tail[start:]
                begin = self.decode(before)
                if encode(self._backend, begin) != before:
                    continue
                whole = encode(self._backend, begin + text)
                same = next(
                    (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
                    min(len(before), len(whole)),
                )
                return len(before) - same, whole[same:]
            return 0, encode(self._backend, text)

        return await self.run(work)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids, all at once."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    async def decode_long(self, tokens: Sequence[int]) -> str:
        """Text of a prompt's worth of ids, control tokens included."""
        return await self.run(lambda: self.decode(tokens))

    def detokenizer(
        self, prompt: Sequence[int], *, skip_special_tokens: bool, keep_tags: bool = False
    ) -> Detokenizer:
        """For the text that follows a prompt. Tags around reasoning may be special tokens too."""
        skipped = self._special if skip_special_tokens else frozenset()
        if keep_tags:
            skipped -= self._tags
        if self._bytes is not None:
            return ByteDetokenizer(self._bytes, skipped)
        return PrefixDetokenizer(self._backend, skipped, prompt[-CONTEXT:])

    def show(self, token: int) -> TokenText:
        """A single token, for lists of log-probabilities."""
        if self._bytes is not None:
            data = self._bytes[token]
            return TokenText(data.decode(errors="replace"), data)
        text = self._backend.decode([token], skip_special_tokens=False)
        return TokenText(text, text.encode())

    async def run(self, work: Callable[[], T]) -> T:
        """The result of work done in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _pieces(self, works: Iterator[Work], texts: Sequence[str]) -> Pieces:
        return Pieces(works, texts, first=self._pool, later=self._long, ahead=AHEAD)

    def _raw_works(self, text: str, add_special_tokens: bool) -> Iterator[Work]:
        encoder = self._raw_text
        if not encoder.cuts.possible:
            whole = partial(encode, self._backend, text, add_special_tokens=add_special_tokens)
            yield len(text), whole
            return
        nothing = array("i")
        read = 0
        for piece in encoder.pieces(text):
            work = encoder.later if read else encoder.first
            read += len(piece)
            before = encoder.prefix if add_special_tokens and read == len(piece) else nothing
            after = encoder.suffix if add_special_tokens and read == len(text) else nothing
            yield len(piece), partial(_between, before, partial(work, piece), after)

    def _marked_works(
        self, parts: Sequence[tuple[str, int | None]], add_special_tokens: bool
    ) -> Iterator[Work]:
        """The template's control tokens by id, and all text between them as plain text.

        A beginning-of-sequence token comes first, where the tokenizer has one. Short parts are
        encoded together.
        """
        affix = encode(self._backend, "", add_special_tokens=True) if add_special_tokens else ()
        batch: list[Callable[[], array[int]]] = [partial(array, "i", affix)]
        characters, enough = 0, FIRST
        for text, control in parts:
            for number, piece in enumerate(self._plain_text.pieces(text) if text else ()):
                batch.append(partial(self._encode_inner, piece, number == 0))
                characters += len(piece)
                if characters >= enough:
                    yield characters, partial(_in_a_row, batch)
                    batch, characters, enough = [], 0, min(2 * enough, MOST)
            if control is not None:
                batch.append(partial(array, "i", [control]))
        if batch:
            yield characters, partial(_in_a_row, batch)

    def _encode_inner(self, text: str, first: bool) -> array[int]:
        """Plain text from the middle of a prompt: no space is put before it. If not `first`, it is
        a later piece of such text."""
        ids = None if first else self._plain_text.later(text)
        if ids is None and self._bytes is None:
            newline = encode(self._plain, "\n")
            after = encode(self._plain, "\n" + text)
            if after[: len(newline)] == newline:
                ids = after[len(newline) :]
        if ids is None:
            ids = self._plain_text.first(text)
        controls = self.template.control_ids
        if controls.isdisjoint(ids):
            return ids
        out = array("i")  # the vocabulary itself spells a control token: take it letter by letter
        for char in text:
            out.extend(encode(self._plain, char))
        return array("i", [id for id in out if id not in controls])


def _load(path: Path) -> PreTrainedTokenizerBase:
    if (path / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if (path / "tokenizer.model").is_file():
        return load_tokenizer(path)
    # Other formats are converted on loading. This import brings torch along: 200 MB, two seconds.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _between(before: array[int], work: Callable[[], array[int]], after: array[int]) -> array[int]:
    return before + work() + after


def _in_a_row(works: Sequence[Callable[[], array[int]]]) -> array[int]:
    ids = array("i")
    for work in works:
        ids.extend(work())
    return ids


def _without(spec: dict[str, Any], controls: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json of a tokenizer whose special tokens are all that may not be text."""
    tokens = [
        {**token, "special": token["special"] or token["content"] in controls}
        for token in spec["added_tokens"]
    ]
    return {**spec, "added_tokens": tokens}


def _eos_ids(path: Path, of_tokenizer: int | None) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's, and generation_config.json's, else config.json's.

    Negative ones stand for none. Raises ValueError for what are no ids.
    """
    ids = set() if of_tokenizer is None else {of_tokenizer}
    for name in ("generation_config.json", "config.json"):
        file = path / name
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        given = content.get("eos_token_id") if isinstance(content, dict) else None
        if given is not None:
            listed = given if isinstance(given, list) else [given]
            if not all(type(id) is int for id in listed):
                raise ValueError(
                    f"{file}: eos_token_id is {given!r}, an id or a list of ids is due"
                )
            ids.update(id for id in listed if id >= 0)
            break
    return tuple(sorted(ids))
