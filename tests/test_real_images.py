"""The whole pipeline on real images with real weights: mini-ROxford, if it is available."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Easy, medium and hard mAP in percent of the reference modules on these features (GeM p=3, one scale, no whitening).
SEARCH, RERANK = (59.5, 48.2, 20.6), (49.5, 43.3, 23.1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mini_roxford_equals_the_reference_modules(shared_data, tmp_path):
    overrides = [
        "dataset=revisited",
        "dataset.name=roxford_mini",
        "backbone=efficientnet_lite0",
        "pooling=gem",
        "scales=1",
        "logger=csv",
        f"paths.data={shared_data}",
        f"paths.outputs={tmp_path}",
    ]
    done = subprocess.run([sys.executable, "eval.py", *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "eval").rglob("results.json")
    metrics = json.loads(path.read_text())["metrics"]
    for stage, expected in (("search", SEARCH), ("rerank", RERANK)):
        got = [100 * metrics[stage]["map"][protocol] for protocol in ("easy", "medium", "hard")]
        assert got == pytest.approx(expected, abs=0.06), stage
