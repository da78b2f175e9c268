"""Draws the pictures of docs/ from benchmarks/results/*.json.

    python -m benchmarks.plot [CARD [PICTURE ...]]

Needs matplotlib (the extra `bench`). CARD is the end of the result files' names, h200 for example;
pictures are kernels, fairness, engine and serve; without any, all.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable
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
    pyplot = _pyplot()
    result = json.loads((RESULTS / f"kernels-{card}.json").read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for name, points in time_per_token(result).items():
        tokens = sorted(points)
        style = "k:" if name.startswith("floor") else "o-"
        axes.loglog(tokens, [points[n] for n in tokens], style, label=name, markersize=4)
    axes.set_xlabel("tokens of one sequence")
    axes.set_ylabel("microseconds a token")
    _entitle(
        axes, f"Reading one sequence, 16 heads of 128, {result['gpu']}, commit {result['commit']}"
    )
    _finish(figure, [axes], "kernels")


def draw_fairness(card: str) -> None:
    """docs/fairness.svg."""
    pyplot = _pyplot()
    result = json.loads((RESULTS / f"fairness-{card}.json").read_text(encoding="utf-8"))
    figure, (gaps, budgets) = pyplot.subplots(2, figsize=(7.5, 5.5), sharex=True)
    for name, lines in result["lines"].items():
        gaps.semilogy(*zip(*lines["longest_itl_ms"], strict=True), label=name, linewidth=1)
        times, tokens = zip(*lines["step_token_budget"], strict=True)
        budgets.step(times, tokens, where="post", label=name, linewidth=1)
    gaps.set_ylabel("longest time between tokens, ms")
    budgets.set_ylabel("budget of a step, tokens")
    budgets.set_yscale("log", base=2)
    budgets.set_xlabel("seconds after the first long prompt was sent")
    _entitle(
        gaps,
        f"Long prompts among {result['chats']} chats, {result['model']}, {result['gpu']}, "
        f"commit {result['commit']}",
    )
    _finish(figure, [gaps, budgets], "fairness")


WORK = re.compile(r"\S+ (decode-(?P<batch>\d+)|prefill-(?P<tokens>\d+))$")


def draw_engine(card: str) -> None:
    """docs/engine.svg: every model whose engine was measured on the card, beside floor and goal."""
    pyplot = _pyplot()
    results = _results("engine", card)
    figure, grid = pyplot.subplots(
        len(results), 2, figsize=(7.5, 3.3 * len(results)), squeeze=False
    )
    for (name, result), (decode, prefill) in zip(results.items(), grid, strict=True):
        for axes, size in ((decode, "batch"), (prefill, "tokens")):
            found = [(WORK.match(row["work"]), row) for row in result["rows"]]
            rows = {int(match[size]): row for match, row in found if match and match[size]}
            for kind, style in (("value", "o-"), ("floor", "k:"), ("goal", "x")):
                points = {n: row[kind] for n, row in sorted(rows.items()) if row[kind] is not None}
                label = "Steadystate" if kind == "value" else kind
                axes.loglog(points.keys(), points.values(), style, label=label, markersize=4)
        decode.set_xlabel("sequences that decode")
        decode.set_ylabel("milliseconds a step")
        prefill.set_xlabel("tokens of one prompt")
        prefill.set_ylabel("seconds to its first token")
        _entitle(decode, f"{name}, {result['gpu']}, commit {result['commit']}")
    _finish(figure, grid.flat, "engine")


STREAMS = re.compile(r"(?P<kind>.+), (?P<at>\d+) streams$")
OPEN = re.compile(r"(?P<kind>.+), open loop at (?P<at>\S+) requests/s")


def by_load(result: dict[str, Any], form: re.Pattern[str]) -> dict[str, dict[float, Any]]:
    """Rows of a kind by how much load there was."""
    lines: dict[str, dict[float, Any]] = defaultdict(dict)
    for row in result["rows"]:
        if found := form.match(row["work"]):
            lines[found["kind"]][float(found["at"])] = row
    return lines


def draw_serve(card: str) -> None:
    """docs/serve.svg: every model that was served on the card."""
    pyplot = _pyplot()
    results = _results("serve", card)
    figure, grid = pyplot.subplots(
        len(results), 3, figsize=(10.5, 3.3 * len(results)), squeeze=False
    )
    for (name, result), (rates, times, arrivals) in zip(results.items(), grid, strict=True):
        streams = by_load(result, STREAMS)
        rows = streams["throughput"]
        values = {
            "through HTTP": {n: row["value"] for n, row in rows.items()},
            "engine alone": {n: row["peers"]["engine alone"] for n, row in rows.items()},
            "floor of the card": {n: row["floor"] for n, row in rows.items() if row["floor"]},
        }
        for line, points in values.items():
            if points:
                style = "k:" if line.startswith("floor") else "o-"
                rates.loglog(points.keys(), points.values(), style, label=line, markersize=4)
        rates.set_ylabel("tokens per second")
        for axes, found in ((times, streams), (arrivals, by_load(result, OPEN))):
            for kind in ("TTFT", "ITL", "E2E"):
                for percent, style in ((50, "o-"), (99, "o:")):
                    line = f"{kind} p{percent}"
                    points = {n: row["value"] for n, row in sorted(found.get(line, {}).items())}
                    color = {"TTFT": "C0", "ITL": "C1", "E2E": "C2"}[kind]
                    axes.loglog(
                        points.keys(), points.values(), style, color=color, label=line, markersize=4
                    )
            axes.set_ylabel("milliseconds")
        for axes in (rates, times):
            axes.set_xlabel("streams, closed loop")
        arrivals.set_xlabel("requests per second, open loop")
        _entitle(rates, f"{name}, {result['gpu']}, commit {result['commit']}")
    _finish(figure, grid.flat, "serve")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "steadystate"  # or names in the file differ by run
    from matplotlib import pyplot

    return pyplot


def _results(bench: str, card: str) -> dict[str, dict[str, Any]]:
    """Results of all models that were measured on a card, by their names."""
    found = {
        path.stem.removeprefix(f"{bench}-").removesuffix(f"-{card}"): json.loads(path.read_text())
        for path in sorted(RESULTS.glob(f"{bench}-*-{card}.json"))
    }
    if not found:
        raise SystemExit(f"no {bench}-*-{card}.json in {RESULTS}")
    return found


def _entitle(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")


def _finish(figure: Any, plots: Iterable[Any], name: str) -> None:
    for axes in plots:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / f"{name}.svg", metadata={"Date": None})


PICTURES = {
    "kernels": draw_kernels, "fairness": draw_fairness, "engine": draw_engine, "serve": draw_serve,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("card", nargs="?", default="h200")
    parser.add_argument("pictures", nargs="*", default=list(PICTURES), help=", ".join(PICTURES))
    options = parser.parse_args()
    for picture in options.pictures:
        PICTURES[picture](options.card)


if __name__ == "__main__":
    main()
