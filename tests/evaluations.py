"""Run small evaluations, in this process or through eval.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from superglobal.config import register
from superglobal.evaluation.pipeline import evaluate

ROOT = Path(__file__).parents[1]
BASE = ["backbone=resnet18", "weights=random", "scales=1", "logger=csv", "figures.queries=0"]
QUIET = ["trainer.accelerator=cpu", "trainer.num_workers=0", "trainer.progress=false"]
FAST = ["backbone=resnet18", "weights=random", "scales=1", "trainer.num_workers=0", "trainer.accelerator=cpu"]


def run(outputs: Path, *overrides: str, base: list[str] = BASE) -> dict:
    """Evaluate in this process and return the content of results.json, with its folder as `folder`."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("eval", overrides=[*base, *QUIET, *overrides, f"paths.outputs={outputs}"])
    folder = outputs / f"result{len(list(outputs.glob('result*')))}"
    folder.mkdir(parents=True)
    evaluate(cfg, folder)
    return json.loads((folder / "results.json").read_text()) | {"folder": folder}


def mini(root: Path) -> list[str]:
    """Return the overrides that select the set "mini" below `root`."""
    return ["dataset=revisited", "dataset.name=mini", f"paths.data={root}"]


def fingerprints(result: dict) -> dict:
    """Return the fingerprint of the settings and images of each store of a result, without the checksums, by title."""
    return {title: store["fingerprint"][:64] for title, store in result["about"]["stores"].items()}


def start_program(outputs: Path, *overrides: str, **kwargs) -> subprocess.Popen:
    """Start eval.py in a process of its own."""
    command = [sys.executable, str(ROOT / "eval.py"), *overrides, f"paths.outputs={outputs}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"COLUMNS": "200"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes, **kwargs)


def run_program(outputs: Path, *overrides: str, status: int = 0) -> str:
    """Run eval.py, which must exit with `status`, and return its output."""
    process = start_program(outputs, *overrides)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == status, text
    return text


def revisited(root: Path, *overrides: str) -> list[str]:
    """Return the overrides of a fast evaluation of the set "mini" below `root`."""
    return ["dataset=revisited", "dataset.name=mini", f"paths.data={root}", "logger=csv", *FAST, *overrides]
