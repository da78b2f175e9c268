"""Memory while a prompt is read: state pool and device memory at 1 k tokens against 1 M.

    python -m benchmarks.memory [--model recall] [--tokens 1000000]

Device memory on a GPU is the most that the engine process had reserved at any step. On the CPU it
is the median over the steps of its resident bytes, less the prompt's token ids (4 bytes each); the
C library is told to give back at once what is freed, as it otherwise keeps what it likes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics

from benchmarks.result import Row, write
from model.chunk import Sampling
from server.api.client import EngineClient
from server.protocol import Generate, Step, pack_tokens
from server.settings import Settings


async def reading(client: EngineClient, length: int) -> tuple[float, int]:
    """Device memory, and most slots, that were seen while a prompt of `length` was read."""
    seen: list[tuple[int, int]] = []

    def observe(step: Step) -> None:
        seen.append((step.stats.device_memory, step.stats.slots_used))

    client.observers.append(observe)
    rng = random.Random(length)
    request = Generate(
        id=f"memory-{length}",
        tokens=pack_tokens([rng.randrange(256) for _ in range(length)]),
        sampling=Sampling(temperature=0.0),
        max_tokens=4,
    )
    async with client.submit(request) as stream:
        async for output in stream:
            if output.error:
                raise RuntimeError(output.error)
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
    settings = Settings(model=options.model, device=options.device)
    write("memory", asyncio.run(measure(settings, options.tokens)))


if __name__ == "__main__":
    main()
