"""Evaluate retrieval, e.g. python eval.py dataset=roxford5k weights=PATH.

The settings are in conf/eval.yaml; --help describes them.
"""

import sys

from superglobal.cli.hydra_commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
