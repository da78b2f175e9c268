"""Contexts by id: time to first token from each tier, against a cold prefill; what caching costs.

    python -m benchmarks.contexts [--shape lightning-1b | --model recall] [--tokens 1000000]

Servers are started as a user starts them and asked over HTTP; a time is from sending a request to
the end of its answer of one token, the median of several. Between two of them other prompts take
every slot: so a context leaves the device, for the host or, where that has no memory, for the disk.
The shape is a random checkpoint with the tokenizer of the bundled model, a token a byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.result import Row, write

ROOT = Path(__file__).parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "lightning-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 64000,
        "layer_types": ["linear_attention"] * 16,
    },
}
GOALS = {"device": 30.0, "host": 60.0, "disk": 250.0}  # milliseconds
FILE_GOAL = 22.0  # MB
SLOTS = 4
SAMPLES = 7
DECODERS = 32


def checkpoint(shape: str, directory: Path) -> Path:
    """A random checkpoint of a shape."""
    import torch
    from safetensors.torch import save_file

    config = {
        **SHAPES[shape],
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "eos_token_id": None,
    }
    hidden, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    inner, vocab = config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        expert = f"{layer}.block_sparse_moe.experts.0"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.qkv_proj.weight": (3 * width, hidden),
            f"{layer}.self_attn.output_gate.weight": (width, hidden),
            f"{layer}.self_attn.norm.weight": (width,),
            f"{layer}.self_attn.out_proj.weight": (hidden, width),
            f"{layer}.block_sparse_moe.gate.weight": (1, hidden),
            f"{expert}.w1.weight": (inner, hidden),
            f"{expert}.w2.weight": (hidden, inner),
            f"{expert}.w3.weight": (inner, hidden),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size, dtype=torch.bfloat16)
        if len(size) == 1
        else (torch.randn(size, generator=generator) * size[-1] ** -0.5).bfloat16()
        for name, size in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    for path in (ROOT / "model" / "bundled" / "recall").glob("*token*.json"):
        shutil.copy(path, directory)
    return directory


@contextlib.contextmanager
def serving(model: str, *flags: str) -> Iterator[httpx.Client]:
    """`steadystate serve` as a process of its own."""
    command = [sys.executable, "-m", "server", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(
        [*command, "--log-level", "warning"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?:\d+", process.stdout.readline())
        assert found, "the server did not start"
        with httpx.Client(base_url=found[0], timeout=600) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def first_token(client: httpx.Client, **body: Any) -> tuple[float, int]:
    """Milliseconds to an answer of one token, and the tokens that were not read for it."""
    begin = time.perf_counter()
    answer = post(client, "/v1/completions", max_tokens=1, temperature=0, **body)
    taken = 1000 * (time.perf_counter() - begin)
    return taken, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def text(length: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz    ,.\n", k=length))


def tier(client: httpx.Client, id: str, tokens: int, *, evicted: bool) -> float:
    """The median time to first token behind a context; `evicted`: other prompts had the slots."""
    times = []
    for sample in range(SAMPLES + 1):
        if evicted:
            for other in range(2 * SLOTS):
                first_token(client, prompt=text(100, 1000 * sample + other))
        taken, cached = first_token(client, context=id, prompt=f"Why {sample}?")
        assert cached == tokens, f"{cached} of {tokens} tokens were cached"
        times.append(taken)
    return statistics.median(times[1:])


def tiers(model: str, tokens: int, directory: Path) -> list[Row]:
    """Cold, then by id from the device, the host and the disk; and the file's size."""
    document = text(tokens, 1)
    flags = ["--max-running", str(SLOTS), "--context-directory", str(directory)]
    rows = []
    with serving(model, *flags) as client:
        cold = statistics.median(
            first_token(client, prompt=document + "Why?", cache_salt=f"cold {n}")[0]
            for n in range(2)
        )
        context = post(client, "/v1/contexts", text=document)
        assert context["tokens"] == tokens
        times = {
            "device": tier(client, context["id"], tokens, evicted=False),
            "host": tier(client, context["id"], tokens, evicted=True),
        }
        size = len(client.get(f"/v1/contexts/{context['id']}/file").content)
    with serving(model, *flags, "--host-cache-gb", "0") as client:
        times["disk"] = tier(client, context["id"], tokens, evicted=True)
    for name, taken in times.items():
        rows.append(
            Row(
                work=f"time to first token, context of {tokens:,} tokens, {name}",
                value=taken,
                unit="ms",
                better="lower",
                goal=GOALS[name],
                peers={"cold prefill": cold},
            )
        )
    rows.append(
        Row(
            work=f"file of a context of {tokens:,} tokens",
            value=size / 1e6,
            unit="MB",
            better="lower",
            goal=FILE_GOAL,
        )
    )
    return rows


def costs(model: str, tokens: int) -> list[Row]:
    """Decoding and reading with caching on and never hit, against caching off."""
    speeds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for turn in range(2):
        for caching in (True, False):
            flags = ["--max-running", str(DECODERS), *([] if caching else ["--no-prefix-caching"])]
            with serving(model, *flags) as client, ThreadPoolExecutor(DECODERS) as pool:

                def decode(seed: int, client: httpx.Client = client) -> int:
                    answer = post(
                        client, "/v1/completions", prompt=text(100, seed), max_tokens=256,
                        ignore_eos=True, temperature=0,
                    )  # fmt: skip
                    return int(answer["usage"]["completion_tokens"])

                list(pool.map(decode, range(DECODERS)))
                begin = time.perf_counter()
                count = sum(pool.map(decode, range(1000 * turn, 1000 * turn + 4 * DECODERS)))
                decoding = count / (time.perf_counter() - begin)
                taken, _ = first_token(client, prompt=text(tokens, turn + 2))
                speeds[caching].append((decoding, 1000 * tokens / taken))
    best = {
        caching: [max(s) for s in zip(*pairs, strict=True)] for caching, pairs in speeds.items()
    }
    return [
        Row(
            work=f"{work}, caching on and never hit, over off",
            value=best[True][index] / best[False][index],
            unit="x",
            better="higher",
            goal=0.98,
        )
        for index, work in enumerate(
            (f"decode, {DECODERS} concurrent", f"prefill of {tokens:,} tokens")
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--model", default="recall")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if options.shape is not None:
            (Path(scratch) / options.shape).mkdir()
            model = str(checkpoint(options.shape, Path(scratch) / options.shape))
        rows = tiers(model, options.tokens, Path(scratch) / "contexts")
        rows += costs(model, options.tokens)
        write("contexts", rows, model=options.shape or options.model)


if __name__ == "__main__":
    main()
