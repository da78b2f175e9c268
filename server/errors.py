"""The exceptions of the server, and what each becomes over HTTP.

SteadystateError
├── RequestError            400  the body names something impossible: field, limit, value
│   ├── ContextLengthError  400  prompt (and max_tokens) beyond the model's maximum length
│   ├── AuthenticationError 401  no key, or a wrong one
│   ├── NotFoundError       404  no such model, context or route
│   ├── ConflictError       409  a context's name is taken, or it was changed meanwhile
│   ├── GoneError           410  a context's state is gone or damaged
│   └── TooLargeError       413  the body is larger than max_body_bytes
├── QueueFullError          429  with Retry-After; safe to repeat
├── StorageFullError        507  no memory or disk has room for a context
├── GenerationError         500  this request failed in the engine, others go on
└── EngineDeadError         503  the engine process is gone, or not ready, or draining
"""

from __future__ import annotations


class SteadystateError(Exception):
    """Anything that has a form over HTTP: status, OpenAI's `type`, `code` and `param`."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object, all four keys present."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RequestError(SteadystateError):
    status = 400
    type = "invalid_request_error"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class AuthenticationError(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(RequestError):
    status = 404
    type = "not_found_error"


class ConflictError(RequestError):
    status = 409
    type = "conflict_error"
    code = "context_changed"


class GoneError(RequestError):
    status = 410
    code = "context_gone"


class StorageFullError(SteadystateError):
    status = 507
    type = "storage_full_error"
    code = "storage_full"


class TooLargeError(RequestError):
    status = 413
    code = "request_too_large"


class QueueFullError(SteadystateError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class GenerationError(SteadystateError):
    code = "generation_failed"


class EngineDeadError(SteadystateError):
    status = 503
    type = "service_unavailable_error"
    code = "engine_unavailable"
