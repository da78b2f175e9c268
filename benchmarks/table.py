"""Writes the tables of README.md and docs/*.md from benchmarks/results/*.json, between markers.

    python -m benchmarks.table [--check]

A marker is a comment line <!-- results: NAME --> ... <!-- end --> that names one result file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from benchmarks.result import RESULTS, ROOT

MARKED = re.compile(r"(<!-- results: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """The result file `name`.json as a Markdown table with its provenance below it."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    peers = sorted({peer for row in result["rows"] for peer in row["peers"]})
    bounds = [key for key in ("floor", "goal") if any(row[key] for row in result["rows"])]
    head = ["work", "value", *bounds, *peers, *[f"against {peer}" for peer in peers]]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in result["rows"]:
        cells = [row["work"], f"{_figure(row['value'])} {row['unit']}"]
        cells += [_figure(row[key]) if row[key] is not None else "" for key in bounds]
        cells += [_figure(row["peers"][p]) if p in row["peers"] else "" for p in peers]
        for peer in peers:
            other = row["peers"].get(peer)
            ratio = 0.0
            if other:
                faster = row["better"] == "higher"
                ratio = row["value"] / other if faster else other / row["value"]
            cells.append(f"{ratio:.1f}x" if other else "")
        lines.append("| " + " | ".join(cells) + " |")
    if result.get("missing"):
        lines += ["", f"Not measured: {'; '.join(result['missing'])}."]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += [
        "",
        f"`{result['command']}` on {result['gpu']}; {versions}; commit {result['commit']}, "
        f"{result['date']}.",
    ]
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, fail when stale")
    options = parser.parse_args()
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        fresh = MARKED.sub(lambda match: match[1] + table(match[2]) + match[3], text)
        if fresh != text:
            stale.append(page.name)
            if not options.check:
                page.write_text(fresh, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"stale tables in {', '.join(stale)}: run python -m benchmarks.table")


if __name__ == "__main__":
    main()
