"""Evaluate retrieval: python eval.py dataset=roxford5k weights=PATH (settings: conf/eval.yaml)."""

import sys

from superglobal.cli.hydra_commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
