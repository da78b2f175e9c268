"""The bundled model through the engine process, beside transformers' generate of the same files.

    python -m benchmarks.bundled [--model recall] [--device cpu] [--new-tokens 64]

Each request is a prompt of 2,048 bytes and a fixed number of greedy tokens; nothing ends early.
The engine is the one that serves: own process, messages over a socket, scheduler, sampler.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from dataclasses import dataclass

from benchmarks.result import Row, write
from model.chunk import Sampling
from server.api.client import EngineClient
from server.protocol import Generate, pack_tokens
from server.settings import Settings

PROMPT = 2048
WORDS = "the of and to in a was he that it his her with as had for she not at but on all".split()


def prompts(count: int) -> list[list[int]]:
    """Byte-level prompts of PROMPT ids, all different."""
    rng = random.Random(7)
    texts = (" ".join(rng.choices(WORDS, k=PROMPT)) for _ in range(count))
    return [list(text.encode()[:PROMPT]) for text in texts]


@dataclass(slots=True)
class Timing:
    """Seconds of a job: to the first token of the last request, and to the end of all."""

    first: float
    end: float
    tokens: int  # generated in all


async def job(client: EngineClient, ids: list[list[int]], new_tokens: int) -> Timing:
    """Submit all prompts at once and read every token."""
    begin = time.perf_counter()
    firsts: list[float] = []
    count = 0

    async def one(number: int, tokens: list[int]) -> int:
        request = Generate(
            id=f"{begin}-{number}",
            tokens=pack_tokens(tokens),
            sampling=Sampling(temperature=0.0),
            max_tokens=new_tokens,
        )
        received = 0
        async with client.submit(request) as stream:
            async for output in stream:
                if output.error:
                    raise RuntimeError(output.error)
                if output.tokens and not received:
                    firsts.append(time.perf_counter() - begin)
                received += len(output.tokens) // 4
        return received

    count = sum(await asyncio.gather(*(one(i, tokens) for i, tokens in enumerate(ids))))
    return Timing(max(firsts), time.perf_counter() - begin, count)


async def engine(settings: Settings, new_tokens: int) -> dict[int, Timing]:
    """The best of three jobs at 1 and at 32 concurrent requests."""
    client = await EngineClient.start(settings)
    try:
        await client.ready()
        timings = {}
        for count in (1, 32):
            runs = [await job(client, prompts(count), new_tokens) for _ in range(4)][1:]
            timings[count] = min(runs, key=lambda run: run.end)
        return timings
    finally:
        await client.close()


def transformers_generate(settings: Settings, new_tokens: int) -> dict[int, Timing]:
    """The same prompts as one batch through transformers' own classes, best of two."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if settings.threads:
        torch.set_num_threads(settings.threads)
    oracle = (
        AutoModelForCausalLM.from_pretrained(settings.model_path, dtype=dtype).to(device).eval()
    )

    def run(ids: torch.Tensor, tokens: int) -> float:
        begin = time.perf_counter()
        out = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        assert out.shape[1] == ids.shape[1] + tokens
        return time.perf_counter() - begin

    timings = {}
    for count in (1, 32):
        ids = torch.tensor(prompts(count), device=device)
        run(ids, 2)
        first = min(run(ids, 1) for _ in range(2))
        end = min(run(ids, new_tokens) for _ in range(2))
        timings[count] = Timing(first, end, count * new_tokens)
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--model", default="recall")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    settings = Settings(
        model=options.model, device=options.device, threads=threads, prefix_caching=False
    )
    ours = asyncio.run(engine(settings, options.new_tokens))
    theirs = transformers_generate(settings, options.new_tokens)
    rows = []
    for count in (1, 32):
        a, b = ours[count], theirs[count]
        works = {
            "prefill": (PROMPT * count / a.first, PROMPT * count / b.first),
            "decode": (
                (a.tokens - count) / (a.end - a.first),
                (b.tokens - count) / (b.end - b.first),
            ),
            "whole job, generated": (a.tokens / a.end, b.tokens / b.end),
        }
        for work, (value, peer) in works.items():
            name = f"{work}, {count} concurrent x {PROMPT} bytes"
            peers = {"transformers generate": peer}
            rows.append(Row(work=name, value=value, unit="tokens/s", better="higher", peers=peers))
    write("bundled", rows)


if __name__ == "__main__":
    main()
