"""Time to the first token of a long text, beside tokenising alone and reading its ids alone.

    python -m benchmarks.first_token [MODEL] [--text FILE ...] [--bpe 30000] [--bytes 1000000]

MODEL is as in benchmarks.serve. With --bpe a byte-level BPE tokenizer of so many tokens, with
Llama 3's way to split, is trained on the texts, and MODEL's config.json gets this vocabulary and
random weights. The floor is the larger of the two times; everything is the best of --rounds.
`prefill begins` is the time from the request to the engine's first step with its tokens. The file
of results is written after each text and names those that are still to come.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.bundled import WORDS
from benchmarks.result import Row, write
from benchmarks.served import checkpoint, engine_command, served
from model.chunk import Sampling
from server.api.client import EngineClient
from server.api.tokenizer import Tokenizer as OurTokenizer
from server.protocol import Generate, pack_tokens
from server.settings import Settings

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text_of(files: list[Path], size: int) -> str:
    """So many bytes of the files, over and over; of common words without any."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in files) or " ".join(WORDS)
    data = text.encode()
    return (data * (size // len(data) + 1))[:size].decode(errors="ignore")


def with_bpe(model: str, size: int, text: str, directory: Path) -> str:
    """A directory with a tokenizer trained on the text, and a config.json of its vocabulary."""
    path = directory / f"{Path(model).name}-bpe"
    path.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((Settings(model=model).model_path / "config.json").read_text())
    config |= {"vocab_size": -(-size // 16) * 16, "eos_token_id": None, "pad_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


async def tokenising(path: Path, text: str, rounds: int) -> tuple[float, list[int]]:
    """Seconds for all of it in the server's way, and the ids."""
    tokenizer = OurTokenizer(path)
    seconds, ids = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        ids = (await tokenizer.encode(text, add_special_tokens=True)).tolist()
        seconds.append(time.perf_counter() - begin)
    tokenizer.close()
    return min(seconds), ids


async def prefill(settings: Settings, ids: list[int], rounds: int) -> float:
    """Seconds from a request of ids to its token, through the engine process alone."""
    client = await EngineClient.start(settings, engine_command(settings))
    seconds = []
    try:
        await client.ready()
        for number in range(-1, rounds):  # the first one warms up
            request = Generate(
                id=f"r{number}",
                tokens=pack_tokens(ids if number >= 0 else ids[:5000]),
                sampling=Sampling(temperature=0.0),
                max_tokens=1,
            )
            begin = time.perf_counter()
            async with client.submit(request) as stream:
                async for output in stream:
                    if output.error:
                        raise RuntimeError(output.error)
            seconds.append(time.perf_counter() - begin)
    finally:
        await client.close()
    return min(seconds[1:])


def through_http(settings: Settings, text: str, rounds: int) -> tuple[float, float]:
    """Seconds to the first token, and to the engine's first news of the prompt."""
    firsts, begins = [], []
    with served(settings) as url, httpx.Client(base_url=url, timeout=3600) as client:
        body = {"prompt": text[:20_000], "max_tokens": 1, "stream": True, "temperature": 0}
        client.post("/v1/completions", json=body)
        for _ in range(rounds):
            data = json.dumps({**body, "prompt": text}).encode()
            before = queued(client)
            begin = time.perf_counter()
            headers = {"content-type": "application/json"}
            with client.stream(
                "POST", "/v1/completions", content=data, headers=headers
            ) as response:
                response.raise_for_status()
                lines = response.iter_lines()
                next(line for line in lines if line.startswith("data: {"))
                firsts.append(time.perf_counter() - begin)
                assert list(lines)
            begins.append(queued(client) - before)
    return min(firsts), min(begins)


def queued(client: httpx.Client) -> float:
    """Seconds in all that requests have waited from arrival until their prompts were begun: whole
    time to first token less the time since the slot was taken."""
    sums = {}
    for line in client.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        sums[name.partition("{")[0].removeprefix("steadystate_")] = value
    first = float(sums["time_to_first_token_seconds_sum"])
    return first - float(sums["request_prefill_time_seconds_sum"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="recall")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--bpe", type=int, nargs="+", default=[], help="sizes of vocabularies")
    parser.add_argument("--bytes", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    threads = options.threads or len(os.sched_getaffinity(0))
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # and the server ends as well
    missing = {
        (size, vocab): f"{size:,} bytes" + (f", BPE of {vocab:,}" if vocab else "")
        for size in options.bytes
        for vocab in options.bpe or [0]
    }
    for size in options.bytes:
        text = text_of(options.text, size)
        for vocab in options.bpe or [0]:
            with ExitStack() as stack:
                model = options.model
                if vocab:
                    directory = stack.enter_context(tempfile.TemporaryDirectory())
                    model = with_bpe(model, vocab, text, Path(directory))
                settings = stack.enter_context(checkpoint(model)).model_copy(
                    update={
                        "device": options.device, "threads": threads, "port": 0,
                        "log_level": "warning", "max_running": 4, "prefix_caching": False,
                    }
                )  # fmt: skip
                path = settings.model_path
                encoding, ids = asyncio.run(tokenising(path, text, options.rounds))
                reading = asyncio.run(prefill(settings, ids, options.rounds))
                first, begins = through_http(settings, text, options.rounds)
            name = f"{len(text.encode()):,} bytes, {len(ids):,} tokens"
            name += f", BPE of {vocab:,}" if vocab else ""
            alone = max(encoding, reading)
            values = {
                f"tokenising alone, {name}": (encoding, "s", None, None),
                f"prefill alone, {name}": (reading, "s", None, None),
                f"first token through HTTP, {name}": (first, "s", alone, 1.15 * alone),
                f"over the larger of both, {name}": (first / alone, "x", None, 1.15),
                f"prefill begins, {name}": (begins * 1e3, "ms", None, 100.0),
            }
            rows += [
                Row(work=work, value=value, unit=unit, better="lower", floor=floor, goal=goal)
                for work, (value, unit, floor, goal) in values.items()
            ]
            for row in rows[-5:]:
                print(row, flush=True)
            del missing[size, vocab]
            write("first_token", rows, missing=list(missing.values()))


if __name__ == "__main__":
    main()
