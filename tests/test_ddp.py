"""Training in several processes: the same steps as in one process, and a common end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from runs import children, command, load_last_checkpoint, read_proc, run_command, start_training, train, values

EXACT = ["trainer.precision=64-true", "optim.batch_norm=frozen", "optim.epochs=4"]


def outcome(outputs):
    """Return weights, losses and scores of a finished training of 20 steps."""
    folder = outputs / "train" / "quickstart"
    state = load_last_checkpoint(folder)
    assert state["global_step"] == 20
    return state["state_dict"], values(folder, "train/loss"), values(folder, "val/map")


def assert_equal(outcome, expected):
    """Assert equal weights, losses and scores, up to rounding."""
    (weights, losses, maps), (other_weights, other_losses, other_maps) = outcome, expected
    assert max((weights[key] - other_weights[key]).abs().max() for key in weights) < 1e-9
    assert losses == pytest.approx(other_losses, abs=1e-6)  # curves are stored in float32
    assert maps == pytest.approx(other_maps, abs=1e-9)


@pytest.fixture(scope="module")
def single_process(toy_data, tmp_path_factory):
    """Train 20 steps in float64 with frozen batch norm, in one process."""
    outputs = tmp_path_factory.mktemp("one")
    train(toy_data, outputs, *EXACT)
    weights, *curves = outcome(outputs)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float64}
    return weights, *curves


@pytest.mark.parametrize("override", ["trainer.devices=2", "trainer.accumulate=3"])
def test_several_processes_or_accumulation_equal_one_process(toy_data, single_process, tmp_path, override):
    train(toy_data, tmp_path, *EXACT, override)
    assert_equal(outcome(tmp_path), single_process)


@pytest.mark.parametrize(("step", "before", "after"), [("7", 1, 3), pytest.param("5", 3, 1, marks=pytest.mark.slow)])
def test_gradient_accumulation_may_change_when_a_run_is_resumed(
    toy_data, single_process, tmp_path, step, before, after
):
    """A user does this after running out of memory; tested within an epoch and at its end."""
    words = [*EXACT, "trainer.save_every_steps=3"]
    script = command(toy_data, tmp_path, *words, f"trainer.accumulate={before}", script="tests/killed.py")
    run_command(script, -signal.SIGKILL, KILL_AT=step)
    train(toy_data, tmp_path, *words, f"trainer.accumulate={after}")
    assert_equal(outcome(tmp_path), single_process)


def test_killing_one_process_ends_the_run(toy_data, tmp_path):
    process = start_training(toy_data, tmp_path, "trainer.devices=2")
    (child,) = [pid for pid in children(process.pid) if "LOCAL_RANK=1" in read_proc(pid, "environ")]
    begin = time.monotonic()
    os.kill(child, signal.SIGKILL)
    text = process.communicate(timeout=60)[0]
    assert time.monotonic() - begin < 60
    assert process.returncode not in (0, 1), text
    assert "another process of this training has ended" in text
    assert not os.path.exists(f"/proc/{child}") or " Z " in read_proc(child, "stat")
    assert "Traceback" not in text
    assert load_last_checkpoint(tmp_path / "train" / "quickstart")["global_step"] > 0


def test_killing_the_first_process_ends_the_others(toy_data, tmp_path):
    process = start_training(toy_data, tmp_path, "trainer.devices=2")
    (child,) = [pid for pid in children(process.pid) if "LOCAL_RANK=1" in read_proc(pid, "environ")]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not os.path.exists(f"/proc/{child}")


def test_a_batch_size_not_divisible_by_the_processes_is_an_error(toy_data, tmp_path):
    text = train(toy_data, tmp_path, "trainer.devices=2", "optim.batch_size=13", status=2)
    assert "optim.batch_size=13 is not divisible by the number of processes (2)" in text
