"""Metrics of the prefix cache: what was asked for, what was saved, why not, what lies where."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.protocol import CacheStats

PREFIX = "steadystate_"
TRANSFER_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class CacheMetrics:
    """The engine tells sums since it started; here they become counters."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        self._told = CacheStats()
        names = ["model_name"]

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, help, [*names, *labels], registry=registry)

        self._queries = counter("prefix_cache_queries_total", "prompt tokens looked up").labels(
            model
        )
        self._hits = counter("prefix_cache_hits_total", "prompt tokens not read again").labels(
            model
        )
        self._found = counter("checkpoint_hits_total", "requests that found one", "tier")
        self._misses = counter("checkpoint_misses_total", "requests that found none", "reason")
        self._bytes = Gauge(
            PREFIX + "checkpoint_bytes",
            "of states kept",
            [*names, "tier"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._count = Gauge(
            PREFIX + "checkpoints",
            "states kept",
            [*names, "tier"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._seconds = {
            kind: Histogram(
                PREFIX + f"checkpoint_{kind}_seconds", help, names,
                buckets=TRANSFER_SECONDS, registry=registry,
            ).labels(model)
            for kind, help in (("save", "writing a file"), ("load", "reading and checking a file"))
        }  # fmt: skip

    def update(self, stats: CacheStats) -> None:
        """Count what happened since the last news."""
        if stats == self._told:
            return
        told, self._told = self._told, stats
        self._queries.inc(stats.queried - told.queried)
        self._hits.inc(stats.saved - told.saved)
        for tier, count in stats.hits.items():
            self._found.labels(self._model, tier).inc(count - told.hits.get(tier, 0))
        for reason, count in stats.misses.items():
            self._misses.labels(self._model, reason).inc(count - told.misses.get(reason, 0))
        _set(self._bytes, self._model, stats.bytes)
        _set(self._count, self._model, stats.checkpoints)
        for kind, seconds in (("save", stats.save_seconds), ("load", stats.load_seconds)):
            for value in seconds:
                self._seconds[kind].observe(value)


def _set(gauge: Gauge, model: str, values: Mapping[str, int]) -> None:
    for tier, value in values.items():
        gauge.labels(model, tier).set(value)
