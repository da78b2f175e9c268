"""A checkpoint from the hub, fetched by a process of its own while this one answers /health."""

from __future__ import annotations

from asyncio.subprocess import PIPE, create_subprocess_exec
from pathlib import Path

import msgspec

from server.api.launch import python
from server.settings import Settings


async def fetch(settings: Settings) -> Path:
    """The directory with the checkpoint that settings.hub_id names. ValueError says why not.

    When cancelled, the fetching ends too.
    """
    process = await create_subprocess_exec(*python(), "-m", "server.hub", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(settings.keyless.model_dump_json().encode() + b"\n")  # and stays open
        said = await process.stdout.read()
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code != 0 or not said:
        raise ValueError(f"model: fetching {settings.hub_id!r} ended with exit code {code}")
    answer: dict[str, str] = msgspec.json.decode(said)
    if "error" in answer:
        raise ValueError(answer["error"])
    return Path(answer["path"])
