"""Memory while a prompt is read: state pool and device memory at 1 k tokens against 1 M.

    python -m benchmarks.memory [--model recall] [--tokens 1000000]

The engine measures its memory twice a second, so prompts of one length follow one another for some
seconds, and what was measured before they began does not count. Device memory on a GPU is the most
that was reserved. On the CPU it is the median of the resident bytes, less the prompt's token ids (4
bytes each); the C library is told to give back at once what is freed, as it otherwise keeps it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time

from benchmarks.result import Row, write
from model.chunk import Sampling
from server.api.client import EngineClient
from server.protocol import Generate, Step, pack_tokens
from server.settings import Settings

SECONDS = 4.0  # how long prompts of one length are read, at least
STALE_SECONDS = 1.0  # until a measurement is surely of these prompts


async def reading(client: EngineClient, length: int) -> tuple[float, int]:
    """Device memory, and most slots, that were seen while prompts of `length` were read."""
    seen: list[tuple[int, int]] = []
    begin = time.monotonic()

    def observe(step: Step) -> None:
        if time.monotonic() - begin > STALE_SECONDS:
            seen.append((step.stats.device_memory, step.stats.slots_used))

    rng = random.Random(length)
    tokens = pack_tokens([rng.randrange(256) for _ in range(length)])
    client.observers.append(observe)
    for number in itertools.count():
        request = Generate(
            id=f"memory-{begin}-{number}",
            tokens=tokens,
            sampling=Sampling(temperature=0.0),
            max_tokens=4,
        )
        async with client.submit(request) as stream:
            async for output in stream:
                if output.error:
                    raise RuntimeError(output.error)
        if time.monotonic() - begin > SECONDS:
            break
    client.observers.remove(observe)
    memory = [m for m, _ in seen]
    on_cpu = client.capacity.device == "cpu"
    held = statistics.median(memory) - 4 * length if on_cpu else max(memory)
    return held, max(s for _, s in seen)


async def measure(settings: Settings, long: int) -> list[Row]:
    client = await EngineClient.start(settings)
    try:
        await client.ready()
        await reading(client, long // 4)  # allocators reach their working size
        rows = []
        for length in (1000, long):
            memory, slots = await reading(client, length)
            rows += [
                Row(
                    work=f"device memory, prompt of {length:,} tokens",
                    value=memory / 1e6,
                    unit="MB",
                    better="lower",
                ),
                Row(
                    work=f"state held, prompt of {length:,} tokens",
                    value=slots * client.capacity.state_bytes / 1e6,
                    unit="MB",
                    better="lower",
                ),
            ]
        ratio = rows[2].value / rows[0].value
        rows.append(
            Row(
                work="device memory, long over short",
                value=ratio,
                unit="x",
                better="lower",
                goal=1.01,
            )
        )
        return rows
    finally:
        await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="recall")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    os.environ.update(MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
    settings = Settings(model=options.model, device=options.device, prefix_caching=False)
    write("memory", asyncio.run(measure(settings, options.tokens)))


if __name__ == "__main__":
    main()
