"""Draws the pictures of docs/ from benchmarks/results/*.json.

    python -m benchmarks.plot [CARD]

Needs matplotlib (the extra `bench`). CARD is the end of the result files' names, h100 for example.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from typing import Any

from benchmarks.result import RESULTS, ROOT

ONE_SEQUENCE = re.compile(r"(prefill|softmax attention \(cuDNN\)) 1 x (\d+) tokens, 16 heads")


def time_per_token(result: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Microseconds a token by number of tokens, of each way to read one sequence."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in result["rows"]:
        found = ONE_SEQUENCE.match(row["work"])
        if found is None or ("layer" in row["work"] and "layer 8 " not in row["work"]):
            continue
        tokens = int(found[2])
        name = "lightning_prefill" if found[1] == "prefill" else found[1]
        values = {name: row["value"], **row["peers"]}
        if row["floor"]:
            values["floor: q, k, v, o copied once"] = row["floor"]
        for line, value in values.items():
            lines[line][tokens] = value * 1000 / tokens
    return lines


def draw_kernels(card: str) -> None:
    """docs/kernels.svg."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    result = json.loads((RESULTS / f"kernels-{card}.json").read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for name, points in time_per_token(result).items():
        tokens = sorted(points)
        style = "k:" if name.startswith("floor") else "o-"
        axes.loglog(tokens, [points[n] for n in tokens], style, label=name, markersize=4)
    axes.set_xlabel("tokens of one sequence")
    axes.set_ylabel("microseconds a token")
    axes.set_title(
        f"Reading one sequence, 16 heads of 128, {result['gpu']}, commit {result['commit']}"
    )
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "kernels.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("card", nargs="?", default="h100")
    draw_kernels(parser.parse_args().card)


if __name__ == "__main__":
    main()
