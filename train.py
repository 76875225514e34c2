"""Train a retrieval network: python train.py (GLDv2; settings: conf/train.yaml), or experiment=quickstart (toy set)."""

import sys

from superglobal.cli.hydra_commands import train

if __name__ == "__main__":
    sys.exit(train())
