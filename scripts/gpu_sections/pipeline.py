"""Extract descriptors with the same pipeline as eval.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_sections.common import Report
from superglobal.config.common import TrainerConfig
from superglobal.config.evaluation import ExtractionConfig
from superglobal.data.image_checks import check_images
from superglobal.data.images import ImageItem
from superglobal.evaluation.extraction import extract_lists
from superglobal.evaluation.module import ExtractionList
from superglobal.models.network import RetrievalNetwork
from superglobal.training.trainer import make_trainer


def extract_all(
    report: Report, network: RetrievalNetwork, photos: list[Path], name: str, workers: int = 2, **how: Any
) -> tuple[np.ndarray, float]:
    """Extract descriptors of images into a new descriptor store.

    Args:
        report: report of the section.
        network: network to use.
        photos: image files.
        name: name of the store.
        workers: number of processes that read images.
        **how: settings of `ExtractionConfig`.

    Returns:
        The descriptors, (N, D) float32, and the seconds of the extraction, including the start-up of the workers.
    """
    items = [ImageItem(path) for path in photos]
    images = ExtractionList("database", name, items, check_images(items), None)
    fit = TrainerConfig(accelerator="gpu" if report.cuda else "cpu", devices=1, num_workers=workers, progress=False)
    trainer = make_trainer(fit, logger=False, enable_checkpointing=False, inference_mode=True)
    config = ExtractionConfig(**how)
    if config.precision != "auto":
        network.precision = config.precision
    start = time.perf_counter()
    stores, _ = extract_lists([network], [images], report.work / "stores" / name, trainer, config, workers, "float32")
    return stores[0].block(0, len(items)), time.perf_counter() - start
