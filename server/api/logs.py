"""The record that a request fills in for its log line."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """What one request's log line tells. Times are seconds since its arrival."""

    request_id: str
    method: str
    path: str
    arrived: float = field(default_factory=time.monotonic)
    status: int | None = None
    error: str | None = None
    stream: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    started: float | None = None
    first_token: float | None = None

    def fields(self) -> dict[str, object]:
        """The line, without what does not apply."""
        line: dict[str, object] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.monotonic() - self.arrived, 6),
        }
        if self.choices:
            line |= {
                "stream": self.stream,
                "choices": self.choices,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "completion_tokens": self.completion_tokens,
            }
        if self.started is not None:
            line["queue_seconds"] = round(self.started - self.arrived, 6)
        if self.first_token is not None:
            line["first_token_seconds"] = round(self.first_token - self.arrived, 6)
        if self.error is not None:
            line["error"] = self.error
        return line
