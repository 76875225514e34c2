"""The demo from end to end on the smallest toy set, and a second run that reuses everything."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def demo(data: Path, outputs: Path) -> str:
    """Run scripts/demo.py and return its output."""
    command = [sys.executable, "scripts/demo.py", "--size", "tiny", "--name", "short", "--data", str(data)]
    command += ["--outputs", str(outputs), "optim.epochs=1", "validation.fraction=0.25", "data.image_size=64"]
    command += ["trainer.num_workers=0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_the_demo_writes_a_table_and_a_figure_and_reuses_results(tmp_path):
    text = demo(tmp_path / "data", tmp_path)
    for stage in ("[1/5] render", "rendered", "[2/5] train", "[5/5] one table"):
        assert stage in text
    folder = tmp_path / "eval" / "short"
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    before = [row for row in rows if row["weights"] == "package"]
    assert [row["run"] for row in before] == ["gem"]
    trained = {row["run"]: row for row in rows if row["weights"] == "short"}
    assert list(trained) == [
        "gem", "gem_plus", "regional", "scale", "relup", "rerank",
        "no_gem_plus", "no_regional", "no_scale", "no_relup", "no_rerank",
    ]  # fmt: skip
    # EfficientNet-Lite0 has no plain ReLUs.
    assert {row["run"] for row in rows if row["medium"] == "n/a"} == {"relup", "no_relup"}
    # The rows `no_rerank` and `scale` evaluate the same network.
    assert trained["no_rerank"]["medium"] == trained["scale"]["medium"]
    assert trained["gem"]["gain"] == "+0.00"
    low, high = (float(v) for v in trained["rerank"]["95 % gain"].split(" to "))
    assert low <= float(trained["rerank"]["gain"]) <= high
    sheet = Path(re.search(r"figure: (.+)", text)[1])
    assert np.asarray(Image.open(sheet)).std() > 20

    again = demo(tmp_path / "data", tmp_path)
    assert "already trained" in again
    assert "rendered" not in again
    with (folder / "table.csv").open() as file:
        repeated = list(csv.DictReader(file))
    for row in (*rows, *repeated):
        time = row.pop("ms per query")
        assert row["medium"] == "n/a" or float(time) > 0
    assert repeated == rows
