"""Evaluate retrieval: python eval.py dataset=roxford5k weights=PATH (settings: conf/eval.yaml)."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from superglobal.config import register
from superglobal.errors import InputError
from superglobal.reporting.results import write_without_numbers

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg: DictConfig) -> float:
    """Run one evaluation; a sweeper reads the returned mAP."""
    from superglobal.evaluation.pipeline import evaluate
    from superglobal.training.trainer import sweeping

    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return evaluate(cfg, folder)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        if not sweeping():
            sys.exit(2)
        write_without_numbers(folder, OmegaConf.to_container(cfg, resolve=True), "failed", str(error))
        return math.nan


if __name__ == "__main__":
    main()
