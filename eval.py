"""Evaluate retrieval: python eval.py dataset=roxford5k weights=PATH (settings: conf/eval.yaml)."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from superglobal.config import register
from superglobal.engine import evaluate
from superglobal.errors import InputError

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Run one evaluation; a sweeper reads the returned mAP."""
    try:
        return evaluate(cfg, Path(HydraConfig.get().runtime.output_dir))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
