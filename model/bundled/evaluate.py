"""Asks a running server for hidden facts and counts exact answers.

python -m model.bundled.evaluate CORPUS_DIR --base-url http://127.0.0.1:8000 --bar 0.95
With --offline the checkpoint is scored by its training network instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch

from model.bundled.checkpoint import END_OF_TEXT, encode, load
from model.bundled.facts import Case, Library, Message, case
from model.bundled.network import Network

RECALL = Path(__file__).parent / "recall"
FORMS = ("single", "follow-up", "nameless")


@torch.no_grad()
def exact_answers(network: Network, cases: Sequence[Case], *, tokens: int = 1 << 14) -> list[bool]:
    """Whether greedy decoding would write each case's answer and end it there.

    One forward pass over prompts with their answers: greedy decoding is exact where every token
    of the answer is the most likely one. `tokens` bounds a batch.
    """
    device = next(network.parameters()).device
    right: list[bool] = []
    start = 0
    coded = [encode([*c.messages, Message("assistant", c.answer)])[0] for c in cases]
    longest = max(map(len, coded))
    while start < len(cases):
        rows = coded[start : start + max(1, tokens // longest)]
        ids = torch.full((len(rows), longest), END_OF_TEXT)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        best = network(ids[:, :-1].to(device)).argmax(-1).cpu()
        for i, row in enumerate(rows):
            written = len(cases[start + i].answer) + 1
            span = slice(len(row) - written, len(row))
            right.append(best[i, span.start - 1 : span.stop - 1].tolist() == row[span])
        start += len(rows)
    return right


def make_cases(library: Library, options: argparse.Namespace) -> list[Case]:
    """Cases with 1 to `facts` facts in turn, the same for the same seed."""
    rng = Random(options.seed)
    forms = FORMS if options.form == "all" else (options.form,)
    return [
        case(
            rng,
            library,
            size=options.bytes,
            facts=1 + i % options.facts,
            form=forms[i // options.facts % len(forms)],
        )
        for i in range(options.cases)
    ]


async def ask(cases: Sequence[Case], options: argparse.Namespace) -> list[bool]:
    """Whether a server answers each case with its number, several asked at a time."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(
        base_url=options.base_url.rstrip("/") + "/v1", api_key=options.api_key, timeout=600
    )
    gate = asyncio.Semaphore(options.concurrent)
    model = options.model or (await client.models.list()).data[0].id

    async def one(case: Case) -> bool:
        async with gate:
            reply = await client.chat.completions.create(
                model=model,
                messages=[asdict(message) for message in case.messages],
                temperature=0,
                max_tokens=96,
            )
        return re.findall(r"\d+", reply.choices[0].message.content or "") == [case.number]

    async with client:
        return list(await asyncio.gather(*map(one, cases)))


def main() -> None:
    """Print one line of JSON; exit 1 under the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder of books, *.txt")
    parser.add_argument("--hold-out", default="news-from-nowhere.txt", help="the book to use")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--checkpoint", type=Path, default=RECALL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--facts", type=int, default=4, help="cases have 1 to this many")
    parser.add_argument("--form", choices=(*FORMS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--bar", type=float, default=0.0, help="least share of exact answers")
    options = parser.parse_args()
    library = Library.read(options.corpus, hold_out=options.hold_out, held_out=True)
    cases = make_cases(library, options)
    if options.offline:
        network = load(options.checkpoint, getattr(torch, options.dtype))
        right = exact_answers(network, cases)
    else:
        right = asyncio.run(ask(cases, options))
    by_facts: dict[int, list[bool]] = defaultdict(list)
    for i, correct in enumerate(right):
        by_facts[1 + i % options.facts].append(correct)
    share = sum(right) / len(right)
    result = {
        "cases": len(right),
        "bytes": options.bytes,
        "form": options.form,
        "exact": round(share, 4),
        "by_facts": {facts: round(sum(x) / len(x), 4) for facts, x in by_facts.items()},
    }
    print(json.dumps(result))
    sys.exit(share < options.bar)


if __name__ == "__main__":
    main()
