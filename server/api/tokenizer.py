"""Text to ids and ids to text, by the checkpoint's own tokenizer and chat template.

Encoding runs in threads, off the event loop. Control tokens inside a chat's contents are text.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from server.api.reasoning import CLOSE, OPEN
from server.api.template import ChatTemplate, Marked
from server.sentencepiece import load_tokenizer

T = TypeVar("T")

CONTEXT = 6  # prompt tokens that a detokenizer without bytes looks back on
THREADS = 4


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
        self._plain = _without(spec, self.template.controls)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self.size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = _eos_ids(path, tokenizer.eos_token_id)

    def close(self) -> None:
        """Wait for no one: what is still being encoded has no reader any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        """Ids of a raw prompt, in which the text of a control token is that token."""
        return await self.run(lambda: self._encode(self._backend, text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> array[int]:
        """Ids of a conversation. Raises RequestError when the template refuses it."""

        def work() -> array[int]:
            rendered = self.template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                kwargs=kwargs or {},
            )
            if not rendered.marked:
                return self._encode(self._backend, rendered.text, add_special_tokens)
            return self._encode_marked(rendered, add_special_tokens)

        return await self.run(work)

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
                if self._encode(self._backend, begin, False) != before:
                    continue
                whole = self._encode(self._backend, begin + text, False)
                same = next(
                    (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
                    min(len(before), len(whole)),
                )
                return len(before) - same, whole[same:]
            return 0, self._encode(self._backend, text, False)

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

    @staticmethod
    def _encode(backend: Backend, text: str, add_special_tokens: bool) -> array[int]:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return array("i", encoding.ids)

    def _encode_marked(self, rendered: Marked, add_special_tokens: bool) -> array[int]:
        """The template's control tokens by id, and all text between them as plain text."""
        ids = array("i")
        for text, control in rendered.parts():
            if text:
                ids.extend(self._encode_inner(text))
            if control is not None:
                ids.append(control)
        if add_special_tokens:
            affix = self._encode(self._backend, "", add_special_tokens=True)
            ids = affix + ids  # a beginning-of-sequence token, where the tokenizer has one
        return ids

    def _encode_inner(self, text: str) -> array[int]:
        """Plain text from the middle of a prompt: no space is put before it."""
        ids: array[int] | None = None
        if self._bytes is None:
            newline = self._encode(self._plain, "\n", add_special_tokens=False)
            after = self._encode(self._plain, "\n" + text, add_special_tokens=False)
            if after[: len(newline)] == newline:
                ids = after[len(newline) :]
        if ids is None:
            ids = self._encode(self._plain, text, add_special_tokens=False)
        controls = self.template.control_ids
        if controls.isdisjoint(ids):
            return ids
        out = array("i")  # the vocabulary itself spells a control token: take it letter by letter
        for char in text:
            out.extend(self._encode(self._plain, char, add_special_tokens=False))
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


def _without(spec: dict[str, Any], controls: Mapping[str, int]) -> Backend:
    """A copy of the tokenizer that reads the text of control tokens as text."""
    tokens = [
        {**token, "special": token["special"] or token["content"] in controls}
        for token in spec["added_tokens"]
    ]
    plain = Backend.from_str(json.dumps({**spec, "added_tokens": tokens}))
    plain.encode_special_tokens = True
    return plain


def _eos_ids(path: Path, of_tokenizer: int | None) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's, and generation_config.json's, else config.json's."""
    ids = set() if of_tokenizer is None else {of_tokenizer}
    for name in ("generation_config.json", "config.json"):
        file = path / name
        given = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if given is not None:
            ids.update(given if isinstance(given, list) else [given])
            break
    return tuple(sorted(ids))
