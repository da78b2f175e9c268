"""python -m deploy.prometheusrule: rules.yml as the operator takes it; --check compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DEPLOY = Path(__file__).parent
FILE = DEPLOY / "kubernetes" / "prometheusrule.yaml"
HEAD = """\
# python -m deploy.prometheusrule writes this from deploy/prometheus/rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: steadystate
spec:
"""


def rule() -> str:
    """The manifest."""
    lines = (DEPLOY / "prometheus" / "rules.yml").read_text().splitlines()
    return HEAD + "".join(f"  {line}".rstrip() + "\n" for line in lines if line[:1] != "#")


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy.prometheusrule", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the file is another")
    if parser.parse_args().check:
        if not FILE.is_file() or FILE.read_text() != rule():
            print(f"{FILE} is not what deploy/prometheusrule.py makes", file=sys.stderr)
            return 1
        return 0
    FILE.write_text(rule())
    return 0


if __name__ == "__main__":
    sys.exit(main())
