"""Metrics before and after known work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.api.metrics import FIRST_TOKEN_SECONDS, STATES
from tests.server.api.live import Live, eventually, in_thread

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)


def states(live: Live) -> dict[str, float]:
    metrics = live.metrics()
    return {state: metrics[f'server_state{{state="{state}"}}'] for state in STATES}


def test_known_work_is_counted(echo: Live) -> None:
    echo.wait_idle()
    before = echo.metrics()

    def work(number: int) -> None:
        match number % 3:
            case 0:  # 7 tokens read, 7 and an end generated
                assert echo.complete("a" * 7, max_tokens=20).status_code == 200
            case 1:  # two prompts of 5 tokens read twice, 3 tokens generated for each
                assert echo.complete(["b" * 5] * 2, n=2, max_tokens=3).status_code == 200
            case 2:  # 4 + 3 tokens read, 2 generated: a stop string
                assert echo.chat("cdef", stop="c", stream=True).status_code == 200

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(36)))
    echo.wait_idle()
    ends = 12 * (1 + 4 + 1)
    total = sum(
        echo.metrics()[f'request_success_total{{finished_reason="{reason}"}}']
        - before[f'request_success_total{{finished_reason="{reason}"}}']
        for reason in ("stop", "length", "abort", "error")
    )
    assert total == ends

    def grew(name: str) -> float:
        return echo.metrics()[name] - before[name]

    assert grew('request_success_total{finished_reason="stop"}') == 24
    assert grew('request_success_total{finished_reason="length"}') == 48
    assert grew("prompt_tokens_total") == 12 * (7 + 20 + 7)
    # a stop string is found here, so the engine may have been a few tokens ahead of it
    generated = grew("generation_tokens_total")
    assert 12 * (8 + 12 + 2) <= generated <= 12 * (8 + 12 + 7)
    for name in HISTOGRAMS:
        assert grew(name + "_count") == ends, name
        assert echo.metrics()[name + '_bucket{le="+Inf"}'] >= ends
    assert grew("request_prompt_tokens_sum") == 12 * (7 + 20 + 7)
    assert grew("request_generation_tokens_sum") == generated
    assert grew("inter_token_latency_seconds_count") == generated - ends
    eventually(lambda: grew("iteration_tokens_total_sum") >= 12 * (7 + 20 + 7))
    assert grew('num_preemptions_total{reason="blocks"}') == 0


def test_an_engine_that_dies_is_an_error_of_its_requests(checkpoint: Path) -> None:
    with in_thread(checkpoint, "--crash-after", "40", "--step-seconds", "0.01") as live:
        body = {"max_tokens": 100_000, "ignore_eos": True}
        assert live.complete("a", **body, n=2).status_code == 503
        metrics = live.metrics()
    assert metrics['request_success_total{finished_reason="error"}'] == 2
    assert metrics['request_success_total{finished_reason="abort"}'] == 0


def test_gauges(slow: Live) -> None:
    slow.wait_idle()
    gauges = slow.metrics()
    assert gauges["state_slots_total"] == 1 and gauges["state_slots_used"] == 0
    assert gauges["state_bytes_per_sequence"] == 1024
    assert gauges["num_requests_running"] == 0 and gauges["num_requests_waiting"] == 0
    assert gauges["kv_cache_usage_perc"] == 0 and gauges["device_memory_bytes"] > 0
    free, total = gauges["device_memory_free_bytes"], gauges["device_memory_total_bytes"]
    assert (free, total) == (3_000_000, 4_000_000)
    assert states(slow) == {"starting": 0, "ready": 1, "draining": 0, "dead": 0}
    assert gauges["process_start_time_seconds"] > 1e9
    assert gauges['startup_seconds{phase="load"}'] == 0
    body = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True, "n": 2}
    with slow.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        names = ("num_requests_running", "num_requests_waiting", "state_slots_used")
        with ThreadPoolExecutor(1) as pool:
            metrics = pool.submit(Live(slow.url, slow.model).metrics).result()
        assert next(lines, None) is not None
        assert [metrics[name] for name in names] == [1, 1, 1]
    slow.wait_idle()


def test_first_tokens_may_take_the_better_part_of_an_hour() -> None:
    assert FIRST_TOKEN_SECONDS[-1] == 2560
    assert list(FIRST_TOKEN_SECONDS) == sorted(FIRST_TOKEN_SECONDS)
