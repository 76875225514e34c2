"""A killed and resumed training has the same weights and losses as an uninterrupted one, bit for bit."""

from __future__ import annotations

import itertools
import os
import signal

import pytest
import torch
from runs import command, curves_without_times, load_last_checkpoint, run_command, train, values

from superglobal.models.network import weights_digest
from superglobal.models.weights import read_weights

# Checkpoints are saved after steps 2, 4, 5 (the end of the first epoch), 6, 8, ...
KILLED_BEFORE = {"mid-epoch": 7, "end of epoch": 5}
CELLS = list(itertools.product(KILLED_BEFORE, (0, 2), (1, 2), (1, 2)))
IN_CI = [("mid-epoch", 2, 1, 2), ("end of epoch", 0, 1, 1)]


def settings(workers: int, processes: int, accumulate: int) -> list[str]:
    """Return the overrides of a training."""
    return [
        "optim.ema=0.9",
        "head=subcenter",
        "head.negatives=0.5",
        "backbone=timm",
        "backbone.name=test_resnet",
        "trainer.save_every_steps=2",
        f"trainer.num_workers={workers}",
        f"trainer.devices={processes}",
        f"trainer.accumulate={accumulate}",
    ]


def equal(first, second) -> bool:
    """Return whether nested plain types and tensors are equal."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


@pytest.fixture(scope="session")
def uninterrupted(toy_data, tmp_path_factory):
    """Return a function (processes, accumulate) -> folder of an uninterrupted training without workers."""
    done = {}

    def folder(processes: int, accumulate: int):
        key = processes, accumulate
        if key not in done:
            outputs = tmp_path_factory.mktemp("uninterrupted")
            train(toy_data, outputs, *settings(0, *key))
            done[key] = outputs / "train" / "quickstart"
        return done[key]

    return folder


@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=() if c in IN_CI else pytest.mark.slow, id="-".join(map(str, c))) for c in CELLS]
)
def test_a_killed_training_resumes_to_the_result_of_an_uninterrupted_one(cell, toy_data, uninterrupted, tmp_path):
    moment, workers, processes, accumulate = cell
    words = settings(workers, processes, accumulate)
    step = KILLED_BEFORE[moment]
    run_command(command(toy_data, tmp_path, *words, script="tests/killed.py"), -signal.SIGKILL, KILL_AT=str(step))
    folder, whole = tmp_path / "train" / "quickstart", uninterrupted(processes, accumulate)
    assert not (folder / "nonfinite.txt").exists()
    assert max(values(folder, "step")) == step
    text = train(toy_data, tmp_path, *words)
    assert f"step {5 if step == 5 else 6}/15" in text
    assert curves_without_times(folder) == curves_without_times(whole)
    resumed, expected = load_last_checkpoint(folder), load_last_checkpoint(whole)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert equal(resumed[part], expected[part]), part
    exports = [read_weights(run / "best.safetensors") for run in (folder, whole)]
    assert weights_digest(exports[0].state) == weights_digest(exports[1].state)


def test_a_training_resumes_after_two_kills_one_while_saving(toy_data, uninterrupted, tmp_path):
    """The previous checkpoint is kept, and the incomplete file is removed."""
    words = settings(0, 1, 1)
    script = command(toy_data, tmp_path, *words, script="tests/killed.py")
    run_command(script, -signal.SIGKILL, KILL_SAVING="4")
    folder = tmp_path / "train" / "quickstart"
    assert load_last_checkpoint(folder)["global_step"] == 2
    assert list((folder / "checkpoints").glob(".last.ckpt.*"))
    run_command(script, -signal.SIGKILL, KILL_AT="9")
    assert not list((folder / "checkpoints").glob(".*"))
    train(toy_data, tmp_path, *words)
    whole = uninterrupted(1, 1)
    assert curves_without_times(folder) == curves_without_times(whole)
    assert equal(load_last_checkpoint(folder)["state_dict"], load_last_checkpoint(whole)["state_dict"])
    assert sorted(os.listdir(folder / "checkpoints")) == ["last.ckpt", "previous.ckpt"]
