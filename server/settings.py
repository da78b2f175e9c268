"""One frozen Settings object: its fields are flags of the command and STEADYSTATE_* variables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # a name, or owner/name


class Settings(BaseSettings):
    """What a server is started with. Flags win over variables, variables over defaults."""

    model_config = SettingsConfigDict(
        env_prefix="STEADYSTATE_", frozen=True, extra="forbid", protected_namespaces=()
    )

    model: str = Field(
        "recall", description="checkpoint directory, name of a bundled model, or id on the hub"
    )
    served_model_name: str | None = Field(
        None,
        description="id under /v1/models; default: the directory's name, or the id on the hub",
    )
    revision: str | None = Field(
        None,
        description="branch, tag or commit on the hub; default: main",
    )
    hub_token: str | None = Field(
        None,
        repr=False,
        description="for private and gated models; default: HF_TOKEN, or what a login left",
    )
    hub_cache: Path | None = Field(
        None,
        description="where models from the hub are kept; default: HF_HUB_CACHE, or under HF_HOME",
    )
    hub_offline: bool = Field(
        False, description="take models from the cache alone, as with HF_HUB_OFFLINE=1"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_workers: int = Field(
        1, ge=1, le=64, description="processes that speak HTTP behind the one port"
    )
    api_key: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="accepted API keys, comma separated; none here nor in a file: open to all",
    )
    api_key_file: Path | None = Field(
        None,
        description="file of more accepted API keys, one a line; read once, at the start",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="least level logged",
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: CUDA where there is one",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights and activations; auto: bfloat16 on CUDA, float32 on the CPU"
    )
    quantization: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="of experts and linear layers, as they load; docs/quantization.md says what it "
        "costs and saves",
    )
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the states; docs/state-dtype.md says which models bfloat16 suits"
    )
    ring: int | None = Field(
        None,
        ge=0,
        le=64,
        description="tokens that decoding keeps beside a state before it folds them; default: 16 on"
        " CUDA, 0 on the CPU, where each is folded at once",
    )
    decay_layer_factor: Literal["auto", "sglang", "hf", "mlx"] = Field(
        "auto",
        description="of Ring-linear's decay, where published code disagrees: docs/decay.md; "
        "auto: what config.json says, else sglang",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of the engine; default: all cores",
    )

    max_running: int = Field(
        256,
        ge=1,
        description="sequences computed at a time, one state slot each",
    )
    memory_fraction: float = Field(
        0.9,
        gt=0,
        le=1,
        description="of device memory, for weights, states and KV blocks",
    )
    state_memory_gb: float | None = Field(
        None,
        gt=0,
        description="GB for states and KV blocks; default: what memory_fraction leaves (CPU: 4)",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="most tokens of a sequence; default: unbounded, a hybrid: what its blocks hold",
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        description="token budget of one engine step; default: 8192 on CUDA, 2048 on the CPU",
    )
    target_itl_ms: float | None = Field(
        None,
        gt=0,
        description="milliseconds between tokens to aim at: while anyone decodes, prompts get what "
        "of a step fits into it, at least 64 tokens; default: all of max_step_tokens",
    )
    swap_gb: float = Field(
        8.0,
        ge=0,
        description="GB of host memory for sequences that leave their slot to more urgent ones",
    )

    prefix_caching: bool = Field(
        True, description="keep checkpoints of states, so that a prefix is read once"
    )
    context_directory: Path | None = Field(
        None, description="where states and contexts are kept as files; default: in memory only"
    )
    disk_cache_gb: float = Field(
        100.0, ge=0, description="GB of files in context_directory, contexts included"
    )
    host_cache_gb: float = Field(
        4.0, ge=0, description="GB of host memory for checkpoints that leave the device"
    )

    default_max_tokens: int = Field(
        4096,
        ge=1,
        description="chat: tokens generated when the request names no bound",
    )
    reasoning_parser: Literal["auto", "think", "none"] = Field(
        "auto",
        description="think: chats tell what stands in <think>...</think> as reasoning_content; "
        "auto: where the chat template or the tokenizer has these tags",
    )
    max_queue_requests: int = Field(
        1024,
        ge=1,
        description="requests waiting for a slot before 429",
    )
    max_queue_tokens: int = Field(64_000_000, ge=1, description="prompt tokens waiting before 429")
    max_body_bytes: int = Field(256_000_000, ge=1024, description="largest request body")
    max_n: int = Field(128, ge=1, description="most completions of one request: n times prompts")
    keepalive_seconds: float = Field(
        10.0,
        gt=0,
        description="an SSE comment after so long a silence",
    )
    drain_seconds: float = Field(
        60.0,
        ge=0,
        description="after SIGTERM: how long running requests may finish",
    )

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        keys = tuple(key.strip() for key in value.split(",") if key.strip())
        if not keys:
            raise ValueError("no key in it; leave it out for a server that is open to all")
        return keys

    @model_validator(mode="after")
    def _of_the_hub(self) -> Self:
        if self.revision is not None and self.hub_id is None:
            raise ValueError(f"revision is for models on the hub, and {self.model!r} is none")
        return self

    @field_validator("api_key_file")
    @classmethod
    def _check_key_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            keys_of(value)
        return value

    @property
    def keys(self) -> tuple[str, ...]:
        """Every accepted API key; none: the server is open to all."""
        return self.api_key + (keys_of(self.api_key_file) if self.api_key_file else ())

    @property
    def keyless(self) -> Settings:
        """The same without any API key, for other processes."""
        return self.model_copy(update={"api_key": (), "api_key_file": None})

    @property
    def target_seconds(self) -> float | None:
        """Seconds between tokens to aim at."""
        return None if self.target_itl_ms is None else self.target_itl_ms / 1000

    @property
    def swap_bytes(self) -> int:
        """Bytes of host memory for preempted sequences."""
        return int(self.swap_gb * 1e9)

    @property
    def host_cache_bytes(self) -> int:
        """Bytes of host memory for checkpoints."""
        return int(self.host_cache_gb * 1e9)

    @property
    def disk_cache_bytes(self) -> int:
        """Bytes of files for checkpoints and contexts."""
        return int(self.disk_cache_gb * 1e9)

    @property
    def bundled(self) -> Path:
        """Directory of the models that ship with the package."""
        return Path(__file__).parent.parent / "model" / "bundled"

    @property
    def model_path(self) -> Path:
        """Directory of the checkpoint."""
        bundled = self.bundled / self.model
        if "/" not in self.model and bundled.is_dir() and not Path(self.model).is_dir():
            return bundled
        return Path(self.model)

    @property
    def hub_id(self) -> str | None:
        """The model's id on the hub; None when it is a directory, or can only be one."""
        if self.model_path.is_dir() or not HUB_ID.fullmatch(self.model):
            return None
        return self.model

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""
        return self.served_model_name or self.hub_id or self.model_path.resolve().name


def keys_of(file: Path) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises ValueError, which quotes none of them."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError("is no text in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1:
            raise ValueError(f"line {number}: a key has no spaces in it")
    keys = tuple(line for line in lines if line)
    if not keys:
        raise ValueError("no key in it; leave it out for a server that is open to all")
    return keys
