"""Commands of the `steadystate` console script, one file a command; main() is its entry."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from server import __version__
from server.cli import convert, plan, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="steadystate",
        description="A long-context inference server for Lightning Attention models.",
    )
    parser.add_argument("--version", action="version", version=f"steadystate {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve.add_parser(commands)
    plan.add_parser(commands)
    convert.add_parser(commands)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code
