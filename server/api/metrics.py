"""Prometheus metrics, computed here from the engine's messages and the lives of requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from server.api.cache import CacheMetrics
from server.api.client import EngineClient
from server.protocol import Output, Step

PREFIX = "steadystate_"
STATES = ("starting", "ready", "draining", "dead")
FINISH_REASONS = ("stop", "length", "abort", "error")

# Prompts are long: first tokens may take the better part of an hour.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80, 160, 320, 640, 1280, 2560),
)
INTER_TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_SECONDS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 2560, 7680),
)
REQUEST_TOKENS = tuple(digit * 10**power for power in range(8) for digit in (1, 2, 5))
STEP_TOKENS = tuple(2**power for power in range(0, 18))


@dataclass(slots=True)
class Timeline:
    """When things happened to one generation (time.monotonic()), and how far it has come."""

    arrived: float
    prompt_tokens: int
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    last: float | None = None
    computed: int = 0
    tokens: int = 0
    ended: bool = False


class Metrics:
    """All metrics of one server, in a registry of their own, labelled with the model's name.

    Everything runs on the event loop's thread, so nothing needs a lock.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # of the API process; process_start_time_seconds
        self._model = model
        self._preempted = 0

        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._prompt = counter("prompt_tokens", "prompt tokens read")
        self._generation = counter("generation_tokens", "tokens generated")
        self._preemptions = counter("num_preemptions", "requests moved out of their slot")
        self._success = Counter(
            PREFIX + "request_success",
            "generations that ended, by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self._success.labels(model, reason)

        self._running = gauge("num_requests_running", "generations that hold a slot")
        self._waiting = gauge("num_requests_waiting", "generations that wait for a slot")
        self._slots_total = gauge("state_slots_total", "state slots")
        self._slots_used = gauge("state_slots_used", "state slots in use")
        self._state_bytes = gauge("state_bytes_per_sequence", "size of a state slot")
        self._kv_usage = gauge("kv_cache_usage_perc", "share of the KV blocks in use, 0 to 1")
        self._cache = CacheMetrics(self.registry, model)
        self._device_memory = gauge("device_memory_bytes", "device memory held by the engine")
        self._device_free = gauge("device_memory_free_bytes", "device memory that nobody holds")
        self._device_total = gauge("device_memory_total_bytes", "device memory there is")
        self._state = Gauge(
            PREFIX + "server_state",
            "1 for the state that the server is in",
            ["model_name", "state"],
            registry=self.registry,
        )

        self._ttft = histogram(
            "time_to_first_token_seconds", "arrival to first token", FIRST_TOKEN_SECONDS
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "between two tokens", INTER_TOKEN_SECONDS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "arrival to end", REQUEST_SECONDS)
        self._queue = histogram("request_queue_time_seconds", "waiting for a slot", REQUEST_SECONDS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "slot taken to first token", FIRST_TOKEN_SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "first to last token", REQUEST_SECONDS
        )
        self._prompt_size = histogram("request_prompt_tokens", "prompt length", REQUEST_TOKENS)
        self._generated = histogram(
            "request_generation_tokens", "tokens generated per generation", REQUEST_TOKENS
        )
        self._iteration = histogram(
            "iteration_tokens_total", "tokens computed in an engine step", STEP_TOKENS
        )

    def watch(self, condition: Callable[[], str]) -> None:
        """Ask for the server's state, one of STATES, when scraped."""

        def is_in(state: str) -> float:
            return float(condition() == state)

        for state in STATES:
            self._state.labels(self._model, state).set_function(partial(is_in, state))

    def attach(self, client: EngineClient) -> None:
        """Read gauges off a ready engine when scraped, and count what its steps do."""
        capacity = client.capacity
        self._slots_total.set(capacity.slots)
        self._state_bytes.set(capacity.state_bytes)
        read: list[tuple[Gauge, Callable[[], float]]] = [
            (self._running, lambda: client.running),
            (self._waiting, lambda: client.waiting_requests),
            (self._slots_used, lambda: client.stats.slots_used),
            (self._kv_usage, lambda: client.stats.blocks_used / (client.stats.blocks_total or 1)),
            (self._device_memory, lambda: client.stats.device_memory),
            (self._device_free, lambda: client.stats.device_free),
            (self._device_total, lambda: client.stats.device_total),
        ]
        for metric, value in read:
            metric.set_function(value)
        if client.stats.cache is not None:
            self._cache.update(client.stats.cache)
        client.observers.append(self.step)

    def step(self, step: Step) -> None:
        """Count an engine step."""
        if step.stats.step_tokens:
            self._iteration.observe(step.stats.step_tokens)
        self._preemptions.inc(max(0, step.stats.preemptions - self._preempted))
        self._preempted = step.stats.preemptions
        if step.stats.cache is not None:
            self._cache.update(step.stats.cache)

    def output(self, timeline: Timeline, output: Output, now: float) -> None:
        """News of a generation: its slot, prompt tokens read, tokens generated."""
        if output.started is not None and timeline.started is None:
            timeline.started = output.started
            self._queue.observe(max(0.0, output.started - timeline.submitted))
        new = len(output.tokens) // 4
        computed = timeline.prompt_tokens if new else output.computed
        if computed > timeline.computed:
            self._prompt.inc(computed - timeline.computed)
            timeline.computed = computed
        if not new:
            return
        self._generation.inc(new)
        timeline.tokens += new
        gaps = new
        if timeline.last is None:
            timeline.first = timeline.last = now
            self._ttft.observe(now - timeline.arrived)
            if timeline.started is not None:
                self._prefill.observe(max(0.0, now - timeline.started))
            gaps -= 1
        for _ in range(gaps):
            self._itl.observe((now - timeline.last) / new)
        timeline.last = now

    def end(self, timeline: Timeline, reason: str) -> None:
        """A generation ended, for the first reason given: stop, length, abort or error."""
        if timeline.ended:
            return
        timeline.ended = True
        self._success.labels(self._model, reason).inc()
        self._e2e.observe(time.monotonic() - timeline.arrived)
        self._prompt_size.observe(timeline.prompt_tokens)
        self._generated.observe(timeline.tokens)
        if timeline.first is not None and timeline.last is not None:
            self._decode.observe(timeline.last - timeline.first)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(PREFIX + name, help, ["model_name"], registry=self.registry).labels(
            self._model
        )

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(PREFIX + name, help, ["model_name"], registry=self.registry).labels(
            self._model
        )

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            PREFIX + name, help, ["model_name"], buckets=buckets, registry=self.registry
        ).labels(self._model)
