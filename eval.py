"""Evaluate image retrieval, e.g. python eval.py dataset=roxford5k weights=PATH.

--help describes all settings. conf/eval.yaml selects the default options.
"""

import sys

from superglobal.cli.hydra_commands import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
