"""Choose pooling and reranking for a trained network: python scripts/tune_pooling.py name=quickstart trials=200.

On the landmarks that the training held out, or on photos of your own (dataset=folder dataset.database=FOLDER
dataset.labels=true), never on a test set. Settings: conf/tune.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from superglobal.config import register
from superglobal.errors import InputError
from superglobal.tuning.tune import tune

register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="tune")
def main(cfg: DictConfig) -> float:
    """Run one tuning and return what it gained."""
    try:
        return tune(cfg, Path(HydraConfig.get().runtime.output_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
