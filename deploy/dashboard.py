"""python -m deploy.dashboard: writes deploy/grafana/dashboards/steadystate.json; --check compares.

A row is a title and its panels, a panel a title, a unit and its queries; {} in a query is where
the selection by model and instance goes. Places on the grid are worked out here.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "grafana" / "dashboards" / "steadystate.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
SELECTION = 'job="steadystate", instance=~"$instance"'
WIDTH = 24  # of Grafana's grid
QUANTILES = (0.5, 0.95, 0.99)
INTERVAL = "$__rate_interval"


@dataclass(slots=True, frozen=True)
class Panel:
    """Queries by legend. `kind` is Grafana's; `most` is the top of the axis where it is known."""

    title: str
    unit: str
    queries: dict[str, str]
    help: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    most: float | None = None
    stacked: bool = False

    def json(self, id: int, x: int, y: int) -> dict[str, Any]:
        """The panel in Grafana's words, its upper left corner at x, y."""
        defaults: dict[str, Any] = {"unit": self.unit}
        if self.kind != "heatmap":
            defaults["min"] = 0
        if self.most is not None:
            defaults["max"] = self.most
        if self.kind == "timeseries":
            stacking = {"mode": "normal" if self.stacked else "none"}
            fill = 25 if self.stacked else 5
            defaults["custom"] = {"fillOpacity": fill, "showPoints": "never", "stacking": stacking}
        return {
            "id": id,
            "type": self.kind,
            "title": self.title,
            "description": self.help,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": OPTIONS[self.kind],
            "targets": [
                {
                    "refId": chr(ord("A") + number),
                    "datasource": SOURCE,
                    "expr": query.replace("{}", f"{{{SELECTION}}}").replace(
                        "{,", f"{{{SELECTION},"
                    ),
                    "legendFormat": legend,
                    "format": "heatmap" if self.kind == "heatmap" else "time_series",
                    "range": True,
                }
                for number, (legend, query) in enumerate(self.queries.items())
            ],
        }


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "yAxis": {"unit": "s"},
        "tooltip": {"mode": "single", "showColorScale": True},
    },
}


def stat(title: str, unit: str, query: str, help: str = "") -> Panel:
    """One number."""
    return Panel(title, unit, {"": query}, help, kind="stat", width=4, height=4)


def rate(name: str) -> str:
    """How fast a counter grows, over all chosen servers."""
    return f"sum(rate(steadystate_{name}{{}}[{INTERVAL}]))"


def quantiles(title: str, name: str, unit: str, help: str) -> Panel:
    """Quantiles of a histogram."""
    buckets = f"sum by (le) (rate(steadystate_{name}_bucket{{}}[{INTERVAL}]))"
    queries = {f"p{q * 100:g}": f"histogram_quantile({q}, {buckets})" for q in QUANTILES}
    return Panel(title, unit, queries, help)


def heatmap(title: str, name: str, help: str) -> Panel:
    """All of a histogram of seconds."""
    query = f"sum by (le) (increase(steadystate_{name}_bucket{{}}[{INTERVAL}]))"
    return Panel(title, "short", {"{{le}}": query}, help, kind="heatmap", width=12)


def slow(title: str, name: str, help: str) -> Panel:
    """What the budget alerts look at."""
    queries = {span: f"steadystate:{name}:ratio_rate{span}{{}}" for span in ("5m", "1h", "6h")}
    return Panel(title, "percentunit", queries, help, width=12)


ROWS: dict[str, list[Panel]] = {
    "Now": [
        stat("Servers ready", "short", 'sum(steadystate_server_state{, state="ready"})'),
        stat(
            "Alerts firing",
            "short",
            'count(ALERTS{alertname=~"Steadystate.*", alertstate="firing"}) or vector(0)',
        ),
        stat("Running", "short", "sum(steadystate_num_requests_running{})"),
        stat("Waiting", "short", "sum(steadystate_num_requests_waiting{})"),
        stat("Tokens generated", "short", rate("generation_tokens_total"), "per second"),
        stat("Up for", "s", "min(time() - process_start_time_seconds{})"),
    ],
    "Latency": [
        quantiles(
            "Time to first token",
            "time_to_first_token_seconds",
            "s",
            "From arrival; grows with the prompt and with the queue.",
        ),
        quantiles(
            "Time between tokens",
            "inter_token_latency_seconds",
            "s",
            "Grows with the batch and with the prompts that are read beside it.",
        ),
        quantiles("Whole request", "e2e_request_latency_seconds", "s", "From arrival to end."),
        quantiles("In the queue", "request_queue_time_seconds", "s", "Waiting for a slot."),
        quantiles(
            "Reading the prompt", "request_prefill_time_seconds", "s", "Slot to first token."
        ),
        quantiles("Generating", "request_decode_time_seconds", "s", "First token to last."),
        heatmap("Time to first token, all of it", "time_to_first_token_seconds", ""),
        heatmap("Time between tokens, all of it", "inter_token_latency_seconds", ""),
    ],
    "Budgets": [
        slow("First tokens over 10 s", "first_token_slow", "The budget is 1 %."),
        slow("Tokens over 0.1 s", "inter_token_slow", "The budget is 1 %."),
    ],
    "Throughput": [
        Panel(
            "Tokens per second",
            "short",
            {"read": rate("prompt_tokens_total"), "generated": rate("generation_tokens_total")},
        ),
        Panel(
            "Tokens per engine step",
            "short",
            {
                "mean": rate("iteration_tokens_total_sum")
                + " / "
                + rate("iteration_tokens_total_count"),
                "budget of {{instance}}": "steadystate_step_token_budget{}",
            },
            "At its budget the engine reads prompts as fast as it may: max_step_tokens, or what "
            "target_itl_ms leaves of them.",
        ),
        Panel("Engine steps per second", "short", {"steps": rate("iteration_tokens_total_count")}),
        Panel(
            "Requests",
            "short",
            {
                "running": "sum(steadystate_num_requests_running{})",
                "waiting": "sum(steadystate_num_requests_waiting{})",
            },
            stacked=True,
        ),
        Panel(
            "Ends per second, by reason",
            "short",
            {
                "{{finished_reason}}": "sum by (finished_reason) "
                f"(rate(steadystate_request_success_total{{}}[{INTERVAL}]))"
            },
            stacked=True,
        ),
        Panel(
            "Preemptions per second, by reason",
            "short",
            {
                "{{reason}}": "sum by (reason) "
                f"(rate(steadystate_num_preemptions_total{{}}[{INTERVAL}]))"
            },
            stacked=True,
        ),
        quantiles("Length of prompts", "request_prompt_tokens", "short", "Tokens."),
        quantiles("Length of answers", "request_generation_tokens", "short", "Tokens."),
    ],
    "Cache of states": [
        Panel(
            "Prompt tokens per second",
            "short",
            {
                "looked up": rate("prefix_cache_queries_total"),
                "not read again": rate("prefix_cache_hits_total"),
            },
        ),
        Panel(
            "Requests that found one, by tier",
            "short",
            {
                "{{tier}}": "sum by (tier) "
                f"(rate(steadystate_checkpoint_hits_total{{}}[{INTERVAL}]))"
            },
            stacked=True,
        ),
        Panel(
            "Requests that found none, by reason",
            "short",
            {
                "{{reason}}": "sum by (reason) "
                f"(rate(steadystate_checkpoint_misses_total{{}}[{INTERVAL}]))"
            },
            stacked=True,
        ),
        Panel(
            "States kept",
            "bytes",
            {"{{tier}}": "sum by (tier) (steadystate_checkpoint_bytes{})"},
            stacked=True,
        ),
        Panel("How many", "short", {"{{tier}}": "sum by (tier) (steadystate_checkpoints{})"}),
        Panel(
            "Seconds spent on files, per second",
            "short",
            {
                "writing": rate("checkpoint_save_seconds_sum"),
                "reading": rate("checkpoint_load_seconds_sum"),
            },
        ),
    ],
    "Memory": [
        Panel(
            "State slots",
            "short",
            {
                "used": "sum(steadystate_state_slots_used{})",
                "there are": "sum(steadystate_state_slots_total{})",
            },
        ),
        Panel(
            "States of running sequences",
            "bytes",
            {
                "states": "sum(steadystate_state_slots_used{}"
                " * steadystate_state_bytes_per_sequence{})",
                "preempted, on the host": "sum(steadystate_swapped_state_bytes{})",
            },
            "A state does not grow with its sequence; what waits on the host has its KV with it.",
        ),
        Panel(
            "KV blocks in use",
            "percentunit",
            {"{{instance}}": "steadystate_kv_cache_usage_perc{}"},
            "Of a hybrid's softmax layers; always 0 for a pure model.",
            most=1,
        ),
        Panel(
            "Device memory",
            "bytes",
            {
                "held by the engine": "sum(steadystate_device_memory_bytes{})",
                "free": "sum(steadystate_device_memory_free_bytes{})",
                "there is": "sum(steadystate_device_memory_total_bytes{})",
            },
        ),
        Panel(
            "Memory of the API process",
            "bytes",
            {"{{instance}}": "process_resident_memory_bytes{}"},
        ),
        Panel(
            "CPU of the API process",
            "percentunit",
            {"{{instance}}": f"rate(process_cpu_seconds_total{{}}[{INTERVAL}])"},
            "At 1 it is what holds the engine up.",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The whole of it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        head = {"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place}
        panels.append({**head, "collapsed": False, "panels": []})
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            panels.append(panel.json(len(panels) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    instances = 'label_values(up{job="steadystate"}, instance)'
    return {
        "uid": "steadystate",
        "title": "Steadystate",
        "tags": ["steadystate"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                {
                    "name": "instance",
                    "type": "query",
                    "datasource": SOURCE,
                    "definition": instances,
                    "query": {"query": instances, "refId": "instances"},
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                    "multi": True,
                    "current": {"text": ["All"], "value": ["$__all"]},
                }
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Restarts",
                    "datasource": SOURCE,
                    "enable": True,
                    "iconColor": "red",
                    "expr": 'changes(process_start_time_seconds{job="steadystate"}[1m]) > 0',
                    "titleFormat": "restarted",
                }
            ]
        },
        "panels": panels,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy.dashboard", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the file is another")
    text = json.dumps(dashboard(), indent=1) + "\n"
    if parser.parse_args().check:
        if not FILE.is_file() or FILE.read_text() != text:
            print(f"{FILE} is not what deploy/dashboard.py makes", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
