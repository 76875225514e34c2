"""Compare all rerankings on one set: python scripts/compare_rerankers.py dataset=roxford5k weights=PATH.

Takes what eval.py takes, and rerankers=[none,superglobal,...], names of conf/rerank. Descriptors come from their stores
and are extracted once; the first row is the baseline. Settings: conf/compare.yaml.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from superglobal.config import register
from superglobal.errors import InputError
from superglobal.evaluation.compare_rerankers import compare

register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Run one comparison."""
    runtime = HydraConfig.get().runtime
    sources = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    try:
        compare(cfg, Path(runtime.output_dir), sources)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
