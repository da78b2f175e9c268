"""Prometheus metrics, computed here from the engine's messages and the lives of requests.

Of several API processes each keeps its counts in files of its own, which whichever is scraped adds
up (prometheus_client's multiprocess mode, on where PROMETHEUS_MULTIPROC_DIR is set).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from server.api.cache import CacheMetrics
from server.api.client import EngineClient
from server.protocol import Output, Stats, Step

PREFIX = "steadystate_"
STATES = ("starting", "ready", "draining", "dead")
PREEMPTION_REASONS = ("blocks", "priority")
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
        self._together = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._model = model
        self._preempted: dict[str, int] = {}

        counter, histogram = self._counter, self._histogram
        self._prompt = counter("prompt_tokens", "prompt tokens read")
        self._generation = counter("generation_tokens", "tokens generated")
        self._preemptions = Counter(
            PREFIX + "num_preemptions",
            "requests moved out of their slot, by reason",
            ["model_name", "reason"],
            registry=self.registry,
        )
        for reason in PREEMPTION_REASONS:
            self._preemptions.labels(model, reason)
        self._success = Counter(
            PREFIX + "request_success",
            "generations that ended, by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self._success.labels(model, reason)

        self._gauges = Gauges(model)
        self._cache = CacheMetrics(self.registry, model)
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
        self._shown = self.registry
        if self._together:
            self._shown = CollectorRegistry()
            self._shown.register(_Together(self.registry))
        self._shown.register(self._gauges)
        # of the API process; where there are several, of the one that looks after them
        ProcessCollector(pid=os.getppid if self._together else os.getpid, registry=self._shown)

    def watch(self, condition: Callable[[], str]) -> None:
        """Ask for the server's state, one of STATES, when scraped."""
        self._gauges.condition = condition

    def attach(self, client: EngineClient) -> None:
        """Read gauges off a ready engine when scraped, and count what its steps do; of several API
        processes the first one counts these, because it hears of all."""
        self._gauges.client = client
        if client.worker == 0:
            if client.stats.cache is not None:
                self._cache.update(client.stats.cache)
            client.observers.append(self.step)

    def step(self, step: Step) -> None:
        """Count an engine step."""
        if step.stats.step_tokens:
            self._iteration.observe(step.stats.step_tokens)
        for reason, count in step.stats.preemptions.items():
            new = max(0, count - self._preempted.get(reason, 0))
            self._preemptions.labels(self._model, reason).inc(new)
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
        return generate_latest(self._shown)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(PREFIX + name, help, ["model_name"], registry=self.registry).labels(
            self._model
        )

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            PREFIX + name, help, ["model_name"], buckets=buckets, registry=self.registry
        ).labels(self._model)


class Gauges(Collector):
    """What the engine and the API processes have at the moment of the scrape; 0 before that."""

    def __init__(self, model: str) -> None:
        self.client: EngineClient | None = None
        self.condition: Callable[[], str] = lambda: STATES[0]
        self._model = model

    def collect(self) -> Iterator[Metric]:
        client = self.client
        stats = Stats(running=0, waiting=0, slots_used=0, slots_total=0)
        stats = stats if client is None else client.stats
        capacity = None if client is None else client.capacity
        values: dict[str, tuple[str, float]] = {
            "num_requests_running": (
                "generations that hold a slot", client.running if client else 0
            ),
            "num_requests_waiting": (
                "generations that wait for a slot", client.waiting_requests if client else 0
            ),
            "state_slots_total": ("state slots", capacity.slots if capacity else 0),
            "state_slots_used": ("state slots in use", stats.slots_used),
            "state_bytes_per_sequence": (
                "size of a state slot", capacity.state_bytes if capacity else 0
            ),
            "kv_cache_usage_perc": (
                "share of the KV blocks in use, 0 to 1",
                stats.blocks_used / (stats.blocks_total or 1),
            ),
            "step_token_budget": ("tokens that a step may have now", stats.step_budget),
            "swapped_state_bytes": (
                "host memory of preempted generations", stats.swapped_bytes
            ),
            "device_memory_bytes": ("device memory held by the engine", stats.device_memory),
            "device_memory_free_bytes": ("device memory that nobody holds", stats.device_free),
            "device_memory_total_bytes": ("device memory there is", stats.device_total),
        }  # fmt: skip
        for name, (help, value) in values.items():
            family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        family = GaugeMetricFamily(
            PREFIX + "server_state",
            "1 for the state that the server is in",
            labels=["model_name", "state"],
        )
        for state in STATES:
            family.add_metric([self._model, state], float(self.condition() == state))
        yield family
        family = GaugeMetricFamily(
            PREFIX + "startup_seconds",
            "what the start of the engine took, by phase",
            labels=["model_name", "phase"],
        )
        for phase, seconds in client.seconds.items() if client is not None else ():
            family.add_metric([self._model, phase], seconds)
        yield family


class _Together(Collector):
    """The counts of all API processes, with the help texts of this one's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._texts = {metric.name: metric.documentation for metric in registry.collect()}

    def collect(self) -> Iterator[Metric]:
        files: Any = MultiProcessCollector
        for metric in files(CollectorRegistry()).collect():
            metric.documentation = self._texts.get(metric.name, metric.documentation)
            yield metric
