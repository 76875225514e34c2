"""Train a retrieval network.

python train.py trains on GLDv2-clean, and python train.py experiment=demo trains on the toy data set. --help
describes all settings. conf/train.yaml selects the default options.
"""

import sys

from superglobal.cli.hydra_commands import train

if __name__ == "__main__":
    sys.exit(train())
