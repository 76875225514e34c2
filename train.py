"""Train a retrieval network: python train.py (GLDv2; settings: conf/train.yaml), or experiment=quickstart (toy set)."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from superglobal.config import register
from superglobal.errors import InputError
from superglobal.training.train import train
from superglobal.training.trainer import sweeping

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one training; a sweeper reads the returned validation mAP."""
    try:
        return train(cfg, Path(HydraConfig.get().runtime.output_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if not sweeping():
            sys.exit(2)
        return math.nan


if __name__ == "__main__":
    main()
