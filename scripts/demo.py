"""Search a data set by photo in the browser: python scripts/demo.py dataset=folder dataset.database=photos backbone=efficientnet_lite0

Takes what eval.py takes, or store=FOLDER alone; photos that are not described yet are described first. The page is for
this machine alone unless page.host= says otherwise. Settings: conf/demo.yaml.
"""  # noqa: E501

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from superglobal.config import register
from superglobal.errors import InputError

register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="demo")
def main(cfg: DictConfig) -> None:
    """Open, describe what is missing, and serve until Ctrl-C."""
    from superglobal.search_page.serve import serve

    try:
        serve(cfg)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
