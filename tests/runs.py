"""Run short trainings through train.py, as a user does."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from superglobal.config import register

ROOT = Path(__file__).parents[1]
SHORT = [
    "experiment=quickstart",
    "data.image_size=64",
    "validation.fraction=0.25",
    "validation.sets=[]",
    "optim.epochs=3",
    "optim.batch_size=12",
    "optim.warmup=0.3",
    "dim=32",
    "trainer.accelerator=cpu",
    "trainer.num_workers=0",
    "trainer.progress=false",
    "trainer.log_every=1",
]
"""Overrides of a short training: 3 epochs of 5 steps each on the tiny toy set."""


def environment(**more: str) -> dict[str, str]:
    """Return the environment variables without those of W&B, with lines of 200 characters and `more`."""
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"COLUMNS": "200", **more}


def command(data: Path, outputs: Path, *overrides: str, script: str | Path = "train.py") -> list[str]:
    """Return the command line of a short training."""
    paths = [f"paths.data={data}", f"paths.outputs={outputs}", "logger=csv"]
    return [sys.executable, str(ROOT / script), *SHORT, *paths, *overrides]


def run_command(words: list[str], status: int = 0, **env: str) -> str:
    """Run a command, which must exit with `status` (negative for a signal), and return its output."""
    done = subprocess.run(words, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=280)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(data: Path, outputs: Path, *overrides: str, status: int = 0, **env: str) -> str:
    """Run a short training, which must exit with `status`, and return its output."""
    return run_command(command(data, outputs, *overrides), status, **env)


def start_training(data: Path, outputs: Path, *overrides: str, beyond: int = 0) -> subprocess.Popen[str]:
    """Start a training of 2500 steps, and return once it has saved a checkpoint of a step after `beyond`."""
    words = command(data, outputs, "optim.epochs=500", "trainer.save_every_steps=1", *overrides)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    folder = outputs / "train" / "quickstart"
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        if (folder / "checkpoints" / "last.ckpt").exists() and load_last_checkpoint(folder)["global_step"] > beyond:
            break
    return process


def children(pid: int) -> list[int]:
    """Return the ids of the child processes."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def read_proc(pid: int, name: str) -> str:
    """Return the content of /proc/PID/NAME."""
    return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")


def compose_config(data: Path, outputs: Path, *overrides: str):
    """Compose the configuration of a short training."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=command(data, outputs, *overrides)[2:])


def curves(folder: Path) -> list[dict[str, str]]:
    """Read the rows of curves.csv."""
    with (folder / "curves.csv").open() as file:
        return list(csv.DictReader(file))


def values(folder: Path, name: str) -> list[float]:
    """Return the values of a column of curves.csv that are not empty."""
    return [float(row[name]) for row in curves(folder) if row.get(name)]


def curves_without_times(folder: Path) -> list[dict[str, str]]:
    """Return the curves without the columns that depend on the clock."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in curves(folder)]


def load_last_checkpoint(folder: Path) -> dict[str, Any]:
    """Load the load_last_checkpoint checkpoint of a run folder."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
