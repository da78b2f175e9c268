"""The image that tests.deploy.image built, run as an engine would: as its user, with a root that is
read-only, without a capability, with tini as process 1 of its own process namespace."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.utils import canonicalize_name

from tests.deploy.image import BUILD, CONFIG, TREE
from tests.deploy.test_prometheus import free_port
from tests.server.api.live import eventually

pytestmark = pytest.mark.skipif(
    not os.environ.get("TEST_IMAGE"),  # an image that lies there may be of an older tree
    reason="there is no image made for this run: make test-deploy",
)
ROOT = Path(__file__).parents[2]
USER = 10001

# what docker-compose.yml asks an engine for: read_only, tmpfs, volumes
MOUNTS = """
set -e
mount --bind {tree} {tree}
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size=1g tmpfs {tree}/tmp
mount -t proc -o nosuid,nodev,noexec proc {tree}/proc
mount -t tmpfs -o nosuid,mode=755 tmpfs {tree}/dev
for device in null zero random urandom; do
    touch {tree}/dev/$device
    mount --bind /dev/$device {tree}/dev/$device
done
mkdir -m 1777 {tree}/dev/shm
mount --bind {cache} {tree}/var/cache/steadystate
mount --bind {state} {tree}/var/lib/steadystate
mount -o remount,bind,ro {tree}
exec chroot {tree} setpriv --reuid {user} --regid {user} --clear-groups --bounding-set=-all \
    --inh-caps=-all --no-new-privs env -i {command}
"""


class Image:
    """Its configuration, and volumes that outlive the containers."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads(CONFIG.read_text())
        self.cache, self.state = folder / "cache", folder / "state"
        for volume in (self.cache, self.state):
            volume.mkdir()
            os.chown(volume, USER, USER)
        folder.chmod(0o755)

    def container(self, *command: str, **variables: str) -> list[str]:
        """A command line that runs this in a container with the image's environment."""
        given = [*self.config["Env"], *(f"{name}={value}" for name, value in variables.items())]
        script = MOUNTS.format(
            tree=TREE, cache=self.cache, state=self.state, user=USER,
            command=shlex.join(["--chdir=/var/lib/steadystate", *given, *command]),
        )  # fmt: skip
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        return [*unshare, "sh", "-c", script]

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        line = self.container(*command, **variables)
        return subprocess.run(line, capture_output=True, text=True, timeout=120)


class Container:
    """The image's own entry point at work on a port."""

    def __init__(self, image: Image, *arguments: str) -> None:
        self.port = free_port()
        self.image = image
        self.variables = {"STEADYSTATE_PORT": str(self.port), "STEADYSTATE_THREADS": "2"}
        command = [*image.config["Entrypoint"], *arguments]
        self._log = (BUILD / "container.log").open("w")
        self.process = subprocess.Popen(
            image.container(*command, **self.variables), stdout=self._log, stderr=self._log
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def descendants(self) -> dict[int, str]:
        """Process ids under the container's, and their command lines."""
        found: dict[int, str] = {}
        open = [self.process.pid]
        while open:
            for children in Path(f"/proc/{open.pop()}/task").glob("*/children"):
                for pid in map(int, children.read_text().split()):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                    open.append(pid)
        return found

    def pid(self, pattern: str) -> int:
        (pid,) = [pid for pid, line in self.descendants().items() if re.match(pattern, line)]
        return pid

    def healthy(self) -> bool:
        """What the image's health check says."""
        kind, *command = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.image.run(*command, **self.variables).returncode == 0

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, (BUILD / "container.log").read_text()
            try:
                return self.http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        eventually(ready, 90)

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("volumes")
    folder.parent.chmod(0o755)
    return Image(folder)


@pytest.fixture
def container(image: Image) -> Iterator[Container]:
    container = Container(image)
    yield container
    container.close()


def test_what_the_image_says_of_itself(image: Image) -> None:
    config = image.config
    assert config["User"] == f"{USER}:{USER}" and config["StopSignal"] == "SIGTERM"
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    assert set(config["Volumes"]) == {"/var/cache/steadystate", "/var/lib/steadystate"}
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"].startswith("debian:")
    assert (TREE / "opt/steadystate/share/lock/common.txt").is_file()


def test_what_is_installed_is_what_is_locked(image: Image) -> None:
    code = (
        "import importlib.metadata as m;"
        "print(*sorted(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    )
    done = image.run("/opt/steadystate/bin/python3", "-c", code)
    assert done.returncode == 0, done.stderr

    def normal(lines: list[str]) -> set[tuple[str, str]]:
        pairs = (line.split()[0].partition("==") for line in lines)
        return {(canonicalize_name(name), version) for name, _, version in pairs}

    torch = image.config["Labels"]["org.steadystate.torch"]
    files = [TREE / f"opt/steadystate/share/lock/{name}.txt" for name in ("common", torch)]
    text = "".join(file.read_text() for file in files)
    locked = normal(re.findall(r"^[a-zA-Z]\S+==\S+", text, re.MULTILINE))
    assert normal(done.stdout.splitlines()) == locked | {("steadystate", "0.1.0")}


@pytest.mark.parametrize("tool", ["pip", "make", "g++", "curl", "wget", "git", "debootstrap"])
def test_what_is_not_in_it(image: Image, tool: str) -> None:
    assert image.run("sh", "-c", f"command -v {tool}").returncode != 0


def test_the_root_is_read_only_and_the_user_nobody(image: Image) -> None:
    places = "/ /opt/steadystate /models /etc /usr/bin"
    script = f"for d in {places}; do ! touch $d/x 2>/dev/null || echo $d; done; id -u; touch /tmp/x"
    done = image.run("sh", "-c", script)
    assert done.stdout.split() == [str(USER)] and done.returncode == 0
    # not only because of the mount: in the tree nothing but the volumes' places is the user's
    found = image.run("find", "/", "-xdev", "-user", str(USER)).stdout.split()
    assert {"/var/cache/steadystate", "/var/lib/steadystate"} >= set(found)


COMPILE = """
import os, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.build import _build
from kernels.rmsnorm import _rmsnorm_kernel as kernel

constants = {n: v for n, v in {"eps": 1e-6, "BLOCK_D": 128}.items() if n in kernel.arg_names}
kinds = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000)
with tempfile.TemporaryDirectory() as folder:
    file = os.path.join(folder, "launcher.c")
    with open(file, "w") as launcher:
        launcher.write("#include <Python.h>\\nPyObject *f(void) { return PyLong_FromLong(1); }")
    print(os.path.getsize(_build("launcher", file, folder, [], [], [], [])) > 1000)
"""


def test_triton_compiles_and_a_restart_does_not(image: Image) -> None:
    """For a card that is not here; the launcher in C too, which needs gcc and Python's headers."""

    def compiled() -> dict[Path, int]:
        done = image.run("python3", "-c", COMPILE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["True", "True"]
        return {file: file.stat().st_mtime_ns for file in image.cache.rglob("*.*")}

    first = compiled()
    assert any(file.suffix == ".cubin" for file in first)
    assert compiled() == first


def test_it_serves_and_drains(container: Container) -> None:
    assert not container.healthy()
    container.wait_ready()
    assert container.healthy()

    tini = container.pid("tini ")
    engine = container.pid(r"\S*python3?( -P)? -m server\.engine")
    for pid in (tini, engine):
        status = dict(re.findall(r"^(\w+):\s+(.*)$", Path(f"/proc/{pid}/status").read_text(), re.M))
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(USER)}
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        mounts = Path(f"/proc/{pid}/mounts").read_text().splitlines()
        (root,) = [line.split()[3] for line in mounts if line.split()[1] == "/"]
        assert "ro" in root.split(",")

    question = re.search(r'"content": "(It was a cold[^"]*)"', (ROOT / "README.md").read_text())
    assert question
    messages = [{"role": "user", "content": question[1]}]
    answer = container.http.post(
        "/v1/chat/completions", json={"model": "recall", "temperature": 0, "messages": messages}
    )
    assert "71432" in answer.json()["choices"][0]["message"]["content"]

    ends: list[str] = []

    def stream() -> None:
        body = {"prompt": "abc", "max_tokens": 700, "ignore_eos": True, "stream": True}
        url = f"http://127.0.0.1:{container.port}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            ends.append([line for line in response.iter_lines() if line][-1])

    thread = threading.Thread(target=stream)
    thread.start()
    running = "steadystate_num_requests_running{"
    eventually(
        lambda: any(
            line.startswith(running) and line.endswith(" 1.0")
            for line in container.http.get("/metrics").text.splitlines()
        )
    )
    os.kill(tini, signal.SIGTERM)  # the image's STOPSIGNAL, to process 1
    eventually(lambda: container.http.get("/health").status_code == 503)
    assert not container.healthy()
    thread.join(60)
    assert ends == ["data: [DONE]"]
    assert container.process.wait(30) == 0


def test_a_killed_engine_ends_the_container(container: Container) -> None:
    container.wait_ready()
    os.kill(container.pid(r"\S*python3?( -P)? -m server\.engine"), signal.SIGKILL)
    assert container.process.wait(15) == 1


def test_sigterm_while_it_is_still_importing(container: Container) -> None:
    def imports() -> bool:
        lines = container.descendants().values()
        return any(re.match(r"\S*python3? \S*steadystate serve", line) for line in lines)

    eventually(imports)
    os.kill(container.pid("tini "), signal.SIGTERM)
    assert container.process.wait(10) != 0
