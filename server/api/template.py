"""The checkpoint's chat template, in transformers' sandbox.

Control tokens written inside messages are replaced by private stand-ins before rendering, so that
afterwards they can be told from those that the template writes.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from server.errors import RequestError

RESERVED = frozenset(  # the arguments of apply_chat_template and of what it calls
    (
        *("self", "conversation", "conversations", "messages", "tools", "documents"),
        *("chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
PROBE = "probe7b1e"


@dataclass(slots=True, frozen=True)
class Marked:
    """A rendered conversation; `marked` says whether messages contained control tokens' text."""

    text: str
    marked: bool
    mark: str
    template: ChatTemplate

    def parts(self) -> Iterator[tuple[str, int | None]]:
        """Text as it was given, and the control token that the template put after it, or None."""
        strip_left = False
        parts = self.template.pattern.split(self.text)
        for text, control in zip(parts[::2], [*parts[1::2], None], strict=True):
            if strip_left:
                text = text.lstrip()
            token = None if control is None else self.template.added[control]
            if token is not None and token.lstrip:
                text = text.rstrip()
            strip_left = token is not None and token.rstrip
            yield (
                self.template.restore(text, self.mark),
                None if control is None else self.template.controls[control],
            )


class ChatTemplate:
    """Renders messages. `controls` are the strings that a message may not use as tokens: the
    special tokens, and the added tokens that the template itself writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, added: Mapping[int, AddedToken]) -> None:
        self._tokenizer = tokenizer
        self._source = _source(tokenizer)
        self._tools_source = _source(tokenizer, tools=[{}])
        self.added = {token.content: token for token in added.values()}
        self.controls = {
            token.content: id
            for id, token in added.items()
            if token.special or (self.mentions(token.content) and not token.content.isspace())
        }
        self.control_ids = frozenset(self.controls.values())
        self.names = sorted(self.controls, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, self.names)) or '(?!)'})")
        self._lists = bool(self._source) and self._wants_lists()
        self.closing = self._closing()
        self._reserved = RESERVED | set(tokenizer.special_tokens_map)

    def mentions(self, text: str) -> bool:
        """Whether a text stands in the template, or in the one for tools."""
        return text in self._source or text in self._tools_source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Marked:
        """Raises RequestError when there is no template, when it refuses the messages, or when it
        would pass over tools, their calls or arguments of its own."""
        if not self._source:
            raise RequestError("the model has no chat template; use /v1/completions")
        for name in kwargs:
            if name in self._reserved:
                raise RequestError(
                    f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs"
                )
        self._check_read(messages, tools, kwargs)
        mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(8))
        marker = _Marker(self, mark)
        marked = [
            {
                name: marker(value if name != "content" else self._content(message))
                for name, value in message.items()
            }
            for message in messages
        ]
        try:
            text = self._apply(
                marked,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=marker(list(tools)) if tools else None,
                **{name: marker(value) for name, value in kwargs.items()},
            )
        except Exception as error:  # whatever a template does wrong, it is about these messages
            reason = str(error).replace(mark, "").partition("Final message to continue:")[0]
            raise RequestError(
                f"messages: the chat template refuses them: {reason[:300]}", param="messages"
            ) from error
        return Marked(text, marker.used, mark, self)

    def restore(self, text: str, mark: str) -> str:
        """Text with its stand-ins, a mark and a character each, replaced by what they stand for."""
        stand_in = re.compile(f"{mark}([\U000f0000-\U000ffffd])")
        text = stand_in.sub(lambda found: self.names[ord(found[1]) - 0xF0000], text)
        escaped = _escaped(mark)  # in JSON in ASCII, and where a template shows a dict
        if escaped in text:
            for index, name in enumerate(self.names):
                for written in _escaped, _shown:
                    text = text.replace(escaped + written(chr(0xF0000 + index)), written(name))
            text = text.replace(escaped, "")
        return text.replace(mark, "")

    def _check_read(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Raise RequestError for what the template does not read."""
        source = self._tools_source if tools else self._source
        given = [("tools", "tools")] if tools else []
        if any("tool_calls" in message for message in messages):
            given.append(("tool_calls", "messages"))
        for name in kwargs:
            is_effort = name == "reasoning_effort"  # which has a field of its own
            given.append((name, name if is_effort else "chat_template_kwargs"))
        for name, param in given:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise RequestError(
                    f"{param}: the model's chat template knows no {name[:100]}",
                    param=param,
                    code="unsupported_parameter",
                )

    def _apply(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        conversation = [dict(message) for message in messages]
        text = self._tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)
        assert isinstance(text, str)
        return text

    def _content(self, message: Mapping[str, Any]) -> Any:
        """A message's text in the form that the template reads: a string, or a list of one part.

        Parts are joined here: what a template put together itself could become a control token.
        """
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(content or [])
        if not self._lists:
            return text
        part = {"type": "text", "text": text}
        named = message["role"] == "tool" and "name" in message  # MiniMax looks for it here
        return [part | {"name": message["name"]} if named else part]

    def _wants_lists(self) -> bool:
        """Whether the template shows the text of parts and not that of a string."""
        as_string = self._try(PROBE)
        as_list = self._try([{"type": "text", "text": PROBE}])
        return PROBE not in as_string and PROBE in as_list and "'text'" not in as_list

    def _closing(self) -> int | None:
        """The control token that the template puts last into a message, or after it."""
        text = self._try([{"type": "text", "text": PROBE}] if self._lists else PROBE)
        after = self.pattern.findall(text.partition(PROBE)[2])
        return self.controls[after[0]] if after else None

    def _try(self, content: Any) -> str:
        try:
            return self._apply([{"role": "user", "content": content}], add_generation_prompt=False)
        except Exception:
            return ""


class _Marker:
    """Puts stand-ins for the text of control tokens, in every string of a value, keys included."""

    def __init__(self, template: ChatTemplate, mark: str) -> None:
        self._pattern = template.pattern
        self._stand_ins = {
            name: mark + chr(0xF0000 + index) for index, name in enumerate(template.names)
        }
        self.used = False

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            text, count = self._pattern.subn(lambda found: self._stand_ins[found[0]], value)
            self.used |= count > 0
            return text
        if isinstance(value, dict):
            return {self(name): self(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        return value


def _source(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None = None) -> str:
    try:
        return tokenizer.get_chat_template(tools=tools) or ""
    except ValueError:  # no template, or several and none of them the default
        return ""


def _escaped(text: str) -> str:
    """As it stands inside a JSON string in ASCII."""
    return json.dumps(text)[1:-1]


def _shown(text: str) -> str:
    """As it stands inside a string of a dict that is written as Python shows it."""
    return repr(text)[1:-1]
