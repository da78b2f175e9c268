"""python -m tests.deploy.image: builds the Dockerfile without an engine, into build/image.

The base is a Debian made by debootstrap, buildah follows the Dockerfile in it, step by step in a
chroot, and the result lies as a directory tree at build/image/root with its configuration beside
it. As root; pip finds packages where this machine's pip does, so torch's CPU build if there is one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "image"
TREE = BUILD / "root"
CONFIG = BUILD / "config.json"
DEBIAN = "bookworm"
MIRROR = os.environ.get("DEBIAN_MIRROR", "")  # debootstrap's own choice if empty


def base_name() -> str:
    """The CPU image's base, as docker-compose.yml names it."""
    found = re.search(r"BASE: (debian:\S+)", (ROOT / "docker-compose.yml").read_text())
    assert found and DEBIAN in found[1]
    return found[1]


def buildah(*words: str | Path, **more: Any) -> str:
    """Run buildah, with a store of its own; what it printed."""
    storage = BUILD / "storage.conf"
    driver = os.environ.get("STORAGE_DRIVER", "overlay")
    storage.write_text(
        f'[storage]\ndriver = "{driver}"\n'
        f'graphroot = "{BUILD / "store"}"\nrunroot = "{BUILD / "run"}"\n'
    )
    environment = os.environ | {
        "CONTAINERS_STORAGE_CONF": str(storage),
        "BUILDAH_ISOLATION": "chroot",
    }
    command = ["buildah", *map(str, words)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def make_base(name: str) -> None:
    """Import a minimal Debian under the name of the base image."""
    if name in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    tree = BUILD / "debian"
    shutil.rmtree(tree, ignore_errors=True)
    command = ["debootstrap", "--variant=minbase", DEBIAN, str(tree), *([MIRROR] if MIRROR else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    container = buildah("from", "scratch")
    mounted = buildah("mount", container)
    subprocess.run(["cp", "-a", f"{tree}/.", mounted], check=True)
    buildah("commit", "--quiet", "--rm", container, f"docker.io/library/{name}")
    shutil.rmtree(tree)


def pip_configuration() -> tuple[Path, list[str]]:
    """This machine's pip configuration as a file, and mounts of the local places it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    options: dict[str, str] = {}
    for line in listed.splitlines():  # global.cert='...', :env:.timeout='...'
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("cert", "find-links", "index-url", "extra-index-url", "default-timeout"):
            options[key] = " ".join(shlex.split(value)).strip()
    mounts = []
    if "cert" in options:
        mounts += ["--volume", f"{options['cert']}:/run/pip-ca.pem:ro"]
        options["cert"] = "/run/pip-ca.pem"
    for place in options.get("find-links", "").split():
        if place.startswith("/"):
            mounts += ["--volume", f"{place}:{place}:ro"]
    options.pop("extra-index-url" if "file:" in options.get("extra-index-url", "") else "", None)
    file = BUILD / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in options.items()))
    return file, mounts


def torch_build() -> str:
    """What TORCH says; else cpu where pip finds that wheel, else cuda."""
    if "TORCH" in os.environ:
        return os.environ["TORCH"]
    line = (ROOT / "deploy" / "lock" / "cpu.txt").read_text().splitlines()[1]
    wanted = ["--no-deps", "--python-version", "3.11", "--only-binary", ":all:", "--target", "none"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *wanted]
    done = subprocess.run([*command, line.split()[0]], capture_output=True)
    return "cpu" if done.returncode == 0 else "cuda"


def main() -> int:
    if os.geteuid() != 0 or not (shutil.which("buildah") and shutil.which("debootstrap")):
        print("building the image needs root, buildah and debootstrap", file=sys.stderr)
        return 1
    BUILD.mkdir(parents=True, exist_ok=True)
    base = base_name()
    make_base(base)
    configuration, mounts = pip_configuration()
    arguments = [f"BASE={base}", f"TORCH={torch_build()}", "REVISION=test"]
    buildah(
        *("build", "--layers", "--pull=never", "--format", "docker", "--network", "host"),
        *("--secret", f"id=pip,src={configuration}", *mounts),
        *(word for argument in arguments for word in ("--build-arg", argument)),
        *("--tag", "steadystate:test", ROOT),
    )
    inspected = json.loads(buildah("inspect", "--type", "image", "steadystate:test"))
    CONFIG.write_text(json.dumps(inspected["Docker"]["config"], indent=1))
    container = buildah("from", "--pull=never", "steadystate:test")
    mounted = buildah("mount", container)
    shutil.rmtree(TREE, ignore_errors=True)
    subprocess.run(["cp", "-a", mounted, TREE], check=True)
    buildah("rm", container)
    return 0


if __name__ == "__main__":
    sys.exit(main())
