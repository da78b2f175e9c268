"""The files of deploy/ against what they must agree with, and against their schemas."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.dashboard import FILE as DASHBOARD
from server.settings import Settings

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
HADOLINT = Path(sys.executable).parent / "hadolint"
VARIABLES = {f"STEADYSTATE_{name.upper()}" for name in Settings.model_fields}
HUB = {"HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def needs(module: str) -> pytest.MarkDecorator:
    package = module.partition(".")[0]
    absent = not importlib.util.find_spec(package) or not importlib.util.find_spec(module)
    return pytest.mark.skipif(absent, reason=f"{module} is not installed: make test-deploy")


def locked(name: str) -> dict[str, str]:
    """Versions of a lock file by name; every one of them must have a hash."""
    text = (ROOT / "deploy" / "lock" / name).read_text().replace("\\\n", " ")
    versions = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        requirement, *hashes = line.split()
        package, _, version = requirement.partition("==")
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), line
        versions[canonicalize_name(package)] = version
    return versions


def test_locks_say_what_the_constraints_say() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        pins[canonicalize_name(name)] = version
    common, cuda, cpu = (locked(f"{name}.txt") for name in ("common", "cuda", "cpu"))
    assert not common.keys() & (cuda.keys() | cpu.keys())
    for lock in (common, cuda, cpu):
        for name, version in lock.items():
            assert version.removesuffix("+cpu") == pins.get(name, version), name
    assert {n for n in cuda if n not in pins and not n.startswith(("nvidia-", "cuda-"))} == set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    for torch in (cuda, cpu):
        assert not asked - common.keys() - torch.keys()


@pytest.mark.parametrize("maker", ["dashboard", "prometheusrule"])
def test_made_files_are_what_their_makers_make(maker: str) -> None:
    command = [sys.executable, "-m", f"deploy.{maker}", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    """And its panels lie side by side, none on another."""
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    text = (provisioning / "datasources" / "prometheus.yml").read_text()
    (source,) = yaml.safe_load(text)["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "steadystate.yml").read_text())[
        "providers"
    ]
    grafana = compose()["services"]["grafana"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in grafana["volumes"])
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"]) and home.name == DASHBOARD.name
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in compose()["services"] and port == "9090"

    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        right, bottom = place["x"] + place["w"], place["y"] + place["h"]
        assert right <= 24
        own = {(x, y) for x in range(place["x"], right) for y in range(place["y"], bottom)}
        assert not own & cells, panel["title"]
        cells |= own
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == source["uid"]
    selected = re.findall(r'job="([^"]*)"', DASHBOARD.read_text().replace('\\"', '"'))
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert (
        set(selected)
        == {"steadystate"}
        == {job["job_name"] for job in jobs["scrape_configs"]} - {"prometheus"}
    )


def test_compose_passes_on_settings_that_exist_and_all_that_make_sense() -> None:
    senseless = {
        "API_KEY_FILE",
        "DEVICE",
        "HUB_CACHE",
        "HUB_OFFLINE",
        "HUB_TOKEN",
    }  # as flag or HF_*
    for name in ("server", "server-cpu"):
        given = compose()["services"][name]["environment"]
        assert given.keys() - HUB <= VARIABLES
        assert VARIABLES - given.keys() == {f"STEADYSTATE_{field}" for field in senseless}
        assert given["STEADYSTATE_PORT"] == "8000"  # whatever the host publishes it as
    container = compose()["services"]["server"]
    drain = Settings(drain_seconds=container["environment"]["STEADYSTATE_DRAIN_SECONDS"])
    assert int(container["stop_grace_period"].rstrip("s")) > drain.drain_seconds + 5


def test_only_the_api_is_open_beyond_loopback() -> None:
    services = compose()["services"]
    ports = {name: service["ports"] for name, service in services.items()}
    for name, published in ports.items():
        for port in published:
            assert port.startswith("127.0.0.1:") or name.startswith("server"), (name, port)
    assert ports["server"] == ["${STEADYSTATE_PORT:-8000}:8000"]
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "unless-stopped" and service["mem_limit"], name
        assert "network_mode" not in service and "privileged" not in service, name


def test_what_variables_there_are_is_written_down() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", (ROOT / "docker-compose.yml").read_text()))
    written = (ROOT / ".env").read_text()
    assert len(used) > 8
    for name in used:
        assert f"{name}=" in written, name
        assert f"`{name}`" in OPERATIONS, name


def test_every_alert_and_metric_is_explained() -> None:
    rules = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(alerts) >= 12
    for alert in alerts:
        assert f"`{alert}`" in OPERATIONS, alert
    from server.api.metrics import Metrics

    families = [family.name for family in Metrics("m").registry.collect()]
    names = {name.removeprefix("steadystate_") for name in families if "steadystate" in name}
    assert len(names) > 20
    for name in names:
        assert re.search(rf"`{name}(_total)?[`{{]", OPERATIONS), name


def test_the_manual_names_only_settings_that_exist() -> None:
    named = set(re.findall(r"STEADYSTATE_[A-Z_]+", OPERATIONS))
    known = set(re.findall(r"STEADYSTATE_[A-Z_]+", (ROOT / ".env").read_text()))
    assert named <= VARIABLES | known


@needs("check_jsonschema")
def test_compose_by_its_schema(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, "docker-compose.yml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("mem_limit", "mem_limt"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


def compose_command() -> list[str] | None:
    """Compose of version 2 or later, which needs no engine to say what it would do."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version"], capture_output=True, text=True)
            found = re.search(r"version v?(\d+)", done.stdout)
            if done.returncode == 0 and found and int(found[1]) >= 2:
                return command
    return None


@pytest.mark.skipif(compose_command() is None, reason="no Compose of version 2 is installed")
def test_compose_as_compose_reads_it(tmp_path: Path) -> None:
    command = compose_command()
    assert command is not None
    keys = tmp_path / "keys"
    keys.write_text("a\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STEADYSTATE", "COMPOSE"))}

    def config(*flags: str, **variables: str) -> dict[str, Any]:
        done = subprocess.run(
            [*command, *flags, "config", "--format", "json"],
            cwd=ROOT, env=clean | variables, capture_output=True, text=True, check=True,
        )  # fmt: skip
        loaded: dict[str, Any] = yaml.safe_load(done.stdout)
        return loaded

    plain = config()
    assert set(plain["services"]) == {"server", "prometheus", "grafana"}
    server = plain["services"]["server"]
    assert server["command"] in ([], None) and server["environment"]["STEADYSTATE_MODEL"] is None
    assert plain["secrets"]["metrics_key"]["file"] == str(ROOT / "deploy" / "none")
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]

    other = config(
        *("--profile", "cpu"),
        STEADYSTATE_KEY_FILE=str(keys), STEADYSTATE_PORT="9000", STEADYSTATE_MODEL="/models/a",
        STEADYSTATE_HOST_CACHE_GB="7", STEADYSTATE_MODELS="/srv/models",
    )  # fmt: skip
    assert set(other["services"]) == {"server-cpu", "prometheus", "grafana"}
    server = other["services"]["server-cpu"]
    assert server["command"] == ["--api-key-file=/run/secrets/api_keys"]
    assert server["environment"]["STEADYSTATE_MODEL"] == "/models/a"
    assert server["environment"]["STEADYSTATE_HOST_CACHE_GB"] == "7"
    assert [port["published"] for port in server["ports"]] == ["9000"]
    assert "reservations" not in server.get("deploy", {}).get("resources", {})
    assert "/srv/models" in [volume["source"] for volume in server["volumes"]]
    secrets = other["secrets"]
    assert secrets["api_keys"]["file"] == secrets["metrics_key"]["file"] == str(keys)


@pytest.mark.skipif(not HADOLINT.is_file(), reason="hadolint is not installed: make test-deploy")
def test_the_dockerfile_by_hadolint() -> None:
    # DL3008 wants versions of Debian's packages, of which an archive keeps only the newest
    command = [str(HADOLINT), "--ignore", "DL3008", "Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs("kubernetes_validate")
@pytest.mark.parametrize("name", ["deployment", "service", "hpa", "pvc"])
def test_manifests_by_kubernetes_schemas(name: str) -> None:
    import kubernetes_validate

    manifest = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
    newest = kubernetes_validate.latest_version()
    for version in ("1.31", newest):
        kubernetes_validate.validate(manifest, version, strict=True)
    manifest["spec"]["no-such-field"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, newest, strict=True)


@needs("cloudcoil.models.prometheus_operator")
@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_manifests_by_the_operators_schemas(kind: str) -> None:
    """These drop what they do not know, so that a manifest comes back whole only if all is."""
    from cloudcoil.models.prometheus_operator import v1

    manifest = yaml.safe_load((KUBERNETES / f"{kind.lower()}.yaml").read_text())
    parsed = getattr(v1, kind).model_validate(manifest)
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest


def test_manifests_agree_with_each_other_and_the_image() -> None:
    def load(name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
        return loaded

    deployment, service = load("deployment"), load("service")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert (
        load("servicemonitor")["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    )
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in [p["name"] for p in container["ports"]]
    assert load("servicemonitor")["spec"]["endpoints"][0]["port"] == port["name"]
    assert load("hpa")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]  # fmt: skip # noqa: E501
    assert claims == [load("pvc")["metadata"]["name"]]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes

    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables.keys() <= VARIABLES
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(variables["STEADYSTATE_DRAIN_SECONDS"]) + 5 + 5
    probe = container["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > grace
    # a service of this name would set STEADYSTATE_PORT to a URL
    assert pod["spec"]["enableServiceLinks"] is False
    user = re.search(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user and pod["spec"]["securityContext"]["runAsUser"] == int(user[1])

    metric = load("hpa")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    from server.api.metrics import Metrics

    assert metric in {family.name for family in Metrics("m").registry.collect()}
    kept = load("kustomization")["resources"]
    there = {file.name for file in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kept) == there


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_them() -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == [
        *("Deployment", "HorizontalPodAutoscaler", "PersistentVolumeClaim"),
        *("PrometheusRule", "Service", "ServiceMonitor"),
    ]
    assert "image: steadystate:0.1.0" in done.stdout
