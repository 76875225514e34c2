"""Train a retrieval network.

python train.py trains on GLDv2-clean, and python train.py experiment=quickstart on the toy set. The settings are in
conf/train.yaml; --help describes them.
"""

import sys

from superglobal.cli.hydra_commands import train

if __name__ == "__main__":
    sys.exit(train())
