"""The real Prometheus, with deploy/'s own files, scraping the real server at work.

Intervals are a sixtieth of what they are in the files, so that an hour passes in a minute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.dashboard import FILE as DASHBOARD
from tests.server.api.checkpoint import write_checkpoint
from tests.server.api.live import PATIENCE, eventually, in_thread

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
KEY = "key-of-prometheus"
HASTE = 60

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus is not installed: make test-deploy",
)


def hurried(rules: str) -> str:
    """Rules with every duration divided by HASTE."""

    def divide(match: re.Match[str]) -> str:
        seconds = int(match[2]) * {"s": 1, "m": 60, "h": 3600}[match[3]]
        return f"{match[1]}{seconds * 1000 // HASTE}ms"

    return re.sub(r"(\[|for: )(\d+)([smh])\b", divide, rules)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Server:
    """`steadystate serve` with keys in a file and two slots; it may be started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(
            base_url=self.url, timeout=30, headers={"authorization": f"Bearer {KEY}"}
        )
        keys = folder / "keys"
        keys.write_text(f"another\n{KEY}\n")
        settings = {"port": self.port, "api-key-file": keys, "max-running": 2, "threads": 1}
        flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self._command = [sys.executable, "-m", "server", "serve", *flags]
        self._log = (folder / "server.log").open("w")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=self._log, stderr=self._log)
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def engine(self) -> int:
        """The engine's process id."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        (pid,) = [
            int(pid)
            for children in tasks
            for pid in children.read_text().split()
            if b"server.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


class Load:
    """Six clients for two slots, until it is closed; errors are no concern of theirs."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(6)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        body = {"prompt": "The boats lay still. " * 30, "max_tokens": 200, "ignore_eos": True}
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=self._url, headers=headers, timeout=PATIENCE) as client:
            while not self._over.is_set():
                try:
                    client.post("/v1/completions", json=body)
                except httpx.TransportError:
                    self._over.wait(0.2)

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


class Prometheus:
    """Started on deploy/'s files, with other addresses and in haste."""

    def __init__(self, folder: Path, target: str, key: str) -> None:
        port = free_port()
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {f"{what}_interval": "250ms" for what in ("scrape", "evaluation")}
        server, itself = config["scrape_configs"]
        server["static_configs"][0]["targets"] = [target]
        server["authorization"]["credentials_file"] = str(folder / "metrics-key")
        itself["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
        (folder / "metrics-key").write_text(key)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(hurried((PROMETHEUS / "rules.yml").read_text()))
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=PATIENCE)
        self._log = (folder / "prometheus.log").open("w")
        command = [
            *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
            *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
        ]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None
        try:
            return self.http.get("/targets").is_success and bool(self.query("up == 1"))
        except httpx.TransportError:
            return False

    def query(self, query: str) -> list[dict[str, Any]]:
        """The samples of an instant query, those that are not numbers left out."""
        answer = self.http.get("/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return [sample for sample in found if sample["value"][1] != "NaN"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        alerts = self.http.get("/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def close(self) -> None:
        self.http.close()
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._log.close()


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def server(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Server:
    server = Server(tmp_path_factory.mktemp("server"))
    stack.callback(server.close)
    return server


@pytest.fixture(scope="module")
def prometheus(
    stack: ExitStack, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Prometheus:
    folder = tmp_path_factory.mktemp("prometheus")
    prometheus = Prometheus(folder, server.url.removeprefix("http://"), KEY + "\n")
    stack.callback(prometheus.close)
    return prometheus


@pytest.fixture
def load(server: Server) -> Iterator[Load]:
    load = Load(server.url)
    yield load
    load.close()


def rules(kind: str) -> dict[str, str]:
    """Expressions of the alerts or records, as they are in the hurried file."""
    groups = yaml.safe_load(hurried((PROMETHEUS / "rules.yml").read_text()))["groups"]
    return {rule[kind]: rule["expr"] for group in groups for rule in group["rules"] if kind in rule}


def left(expression: str) -> str:
    """An alert's expression without its comparisons: what it looks at."""
    return re.sub(r"\s*(==|!=|<=|>=|<|>)\s*[\d.]+", "", expression)


def parts(expression: str) -> list[str]:
    """What an alert combines, one by one; what is asked for only when it is absent left out."""
    pieces = re.split(r"\s(?:and|or)\s(?:on \([^)]*\))?", left(expression))
    return [piece.strip() for piece in pieces if not piece.strip().startswith("absent(")]


def panels() -> dict[str, str]:
    """Queries of the dashboard, with its variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text())
    queries = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "5s")
            queries[f"{panel['title']} {target['refId']}"] = query
    return queries


def test_what_is_evaluated_is_what_is_written() -> None:
    assert (
        hurried("rate(a[5m]) > 0\nfor: 1h\n:rate5m") == "rate(a[5000ms]) > 0\nfor: 60000ms\n:rate5m"
    )
    assert left('a{b="c"} == 1 and rate(d[5m]) / e > 0.03') == 'a{b="c"} and rate(d[5m]) / e'
    assert parts("up == 0 or absent(up) and on (job, x) f >= 2") == ["up", "f"]
    assert len(panels()) > 40 and len(rules("alert")) >= 12 and len(rules("record")) == 8


def test_files_pass_promtool(tmp_path: Path) -> None:
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    config = tmp_path / "prometheus" / "prometheus.yml"
    (tmp_path / "key").touch()
    config.write_text(config.read_text().replace("/run/secrets/metrics_key", str(tmp_path / "key")))
    for command in (
        ["promtool", "check", "config", config],
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", PROMETHEUS / "rules.yml"],
        ["promtool", "test", "rules", ROOT / "tests" / "deploy" / "rules_test.yml"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((ROOT / "tests" / "deploy" / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == set(rules("alert"))


def test_metrics_pass_promtool(server: Server) -> None:
    text = server.http.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    complaints = {line.split()[0] for line in done.stderr.decode().splitlines()}
    # the field's own names: dashboards made for them port by a change of prefix
    assert complaints == {"steadystate_iteration_tokens_total", "steadystate_state_slots_total"}


def test_every_expression_has_data_under_load(
    server: Server, prometheus: Prometheus, load: Load
) -> None:
    wanted = panels()
    wanted |= rules("record")
    for name, expression in rules("alert").items():
        wanted[f"{name}, whole"] = left(expression)
        for number, part in enumerate(parts(expression)):
            wanted[f"{name}, part {number}"] = part

    def missing() -> list[str]:
        return [f"{name}: {query}" for name, query in wanted.items() if not prometheus.query(query)]

    try:
        eventually(lambda: not missing())
    except AssertionError:
        pytest.fail("no data: " + "\n".join(missing()))
    assert not prometheus.firing() & {"SteadystateEngineDead", "SteadystateEngineStalled"}
    (generated,) = prometheus.query(panels()["Tokens per second B"])
    assert float(generated["value"][1]) > 10
    (waiting,) = prometheus.query("steadystate_num_requests_waiting")
    assert int(waiting["value"][1]) >= 1


def test_an_engine_that_hangs(server: Server, prometheus: Prometheus, load: Load) -> None:
    eventually(lambda: bool(prometheus.query("steadystate_num_requests_running > 0")))
    engine = server.engine
    os.kill(engine, signal.SIGSTOP)
    try:
        eventually(lambda: "SteadystateEngineStalled" in prometheus.firing())
        assert "SteadystateEngineDead" not in prometheus.firing()
    finally:
        os.kill(engine, signal.SIGCONT)
    eventually(lambda: "SteadystateEngineStalled" not in prometheus.firing())


def test_an_engine_that_is_killed(server: Server, prometheus: Prometheus) -> None:
    before = prometheus.firing()
    assert not before & {"SteadystateEngineDead", "SteadystateRestarted"}
    os.kill(server.engine, signal.SIGKILL)
    assert server.process.wait(PATIENCE) == 1  # whoever supervises it starts it again
    eventually(lambda: "SteadystateEngineDead" in prometheus.firing())
    server.start()
    eventually(lambda: "SteadystateRestarted" in prometheus.firing())
    eventually(lambda: "SteadystateEngineDead" not in prometheus.firing())


def test_a_server_without_keys_and_an_empty_key_file(tmp_path: Path) -> None:
    """As docker-compose.yml has it where no key file is named."""
    key = (ROOT / "deploy" / "none").read_text()
    with in_thread(write_checkpoint(tmp_path / "tiny")) as live:
        prometheus = Prometheus(tmp_path, live.url.removeprefix("http://"), key)
        try:
            eventually(lambda: bool(prometheus.query('up{job="steadystate"} == 1')))
        finally:
            prometheus.close()
