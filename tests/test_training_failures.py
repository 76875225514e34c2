"""Failures during training: each is reported, saved progress is kept, and the same command resumes."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time

import pytest
import torch
from runs import (
    children,
    command,
    compose_config,
    curves_without_times,
    load_last_checkpoint,
    read_proc,
    run_command,
    start_training,
    train,
    values,
)
from sets import break_scan

from superglobal.data.gldv2 import read_train, split_landmarks
from superglobal.errors import InputError
from superglobal.training.checkpointing import newest_checkpoint
from superglobal.training.run_dir import lock_run
from superglobal.training.train import train as fit

SAVED = ["trainer.save_every_steps=2"]


@pytest.fixture(scope="module")
def checkpoint(toy_data, tmp_path_factory):
    """Run a short training and return its folder."""
    outputs = tmp_path_factory.mktemp("outputs")
    train(toy_data, outputs, *SAVED)
    return outputs / "train" / "quickstart"


@pytest.mark.parametrize(
    ("number", "processes", "group"),
    [("SIGUSR2", 1, True), ("SIGINT", 1, False), pytest.param("SIGTERM", 2, False, marks=pytest.mark.slow)],
)
def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes(toy_data, tmp_path, number, processes, group):
    """The signal goes to the first process, or to all processes and workers, as from a terminal or SLURM."""
    process = start_training(toy_data, tmp_path, "trainer.num_workers=1", f"trainer.devices={processes}")
    (os.killpg if group else os.kill)(process.pid, getattr(signal, number))
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + getattr(signal, number), text
    assert f"{number}: saved a checkpoint at step" in text
    assert "Traceback" not in text
    step = load_last_checkpoint(tmp_path / "train" / "quickstart")["global_step"]
    process = start_training(toy_data, tmp_path, beyond=step)
    process.send_signal(signal.SIGTERM)
    assert f"step {step}/2500" in process.communicate(timeout=60)[0]
    losses = values(tmp_path / "train" / "quickstart", "train/loss")
    assert len(losses) == load_last_checkpoint(tmp_path / "train" / "quickstart")["global_step"] > step


def test_a_full_disk_keeps_the_previous_checkpoint(toy_data, tmp_path):
    """A limit on file sizes simulates the full disk, so that writing fails in the middle of the file."""
    run_command(command(toy_data, tmp_path, *SAVED, script="tests/killed.py"), -signal.SIGKILL, KILL_AT="3")
    folder = tmp_path / "train" / "quickstart"
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    words = ["bash", "-c", 'ulimit -f 3000; exec "$@"', "limited", *command(toy_data, tmp_path, *SAVED)]
    text = run_command(words, 2)
    assert f"error: {folder}/checkpoints/last.ckpt: cannot be written (File too large)" in text
    assert "MB are free" in text
    assert "Traceback" not in text
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list((folder / "checkpoints").glob(".*"))
    train(toy_data, tmp_path, *SAVED)


def test_a_folder_that_cannot_be_written_is_reported_at_the_start(toy_data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("in the way")
    with pytest.raises(InputError, match=r"checkpoints.*cannot be written"):
        fit(compose_config(toy_data, tmp_path), folder)
    assert not (folder / "curves.csv").exists()
    with pytest.raises(InputError, match=r"cannot be written.*paths\.outputs"):
        fit(compose_config(toy_data, tmp_path), folder / "checkpoints" / "below a file")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_training_resumes_from_the_previous_checkpoint_if_the_last_is_damaged(checkpoint, tmp_path, caplog, damage):
    whole = (checkpoint / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "previous.ckpt").write_bytes(whole)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 100]) + whole[middle + 100 :]
    damaged = {"truncated": whole[:-1000], "empty": b"", "text": b"no checkpoint", "flipped": flipped}
    (tmp_path / "last.ckpt").write_bytes(damaged[damage])
    assert newest_checkpoint(tmp_path) == (tmp_path / "previous.ckpt", 15)
    assert "last.ckpt" in caplog.text
    assert f"({len((tmp_path / 'last.ckpt.damaged').read_bytes())} bytes)" in caplog.text
    assert "resuming from" in caplog.text
    (tmp_path / "previous.ckpt").write_bytes(whole[:1000])
    with pytest.raises(InputError, match="resume=restart"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nothing here") is None


def test_resuming_from_the_previous_checkpoint_is_exact(toy_data, checkpoint, tmp_path):
    run_command(command(toy_data, tmp_path, *SAVED, script="tests/killed.py"), -signal.SIGKILL, KILL_AT="9")
    folder = tmp_path / "train" / "quickstart"
    path = folder / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:5000])
    text = train(toy_data, tmp_path, *SAVED)
    assert "previous.ckpt, step 6" in text
    assert values(folder, "train/loss") == values(checkpoint, "train/loss")


def test_malicious_checkpoints_run_no_code(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    torch.save({"global_step": 3, "state_dict": Evil()}, tmp_path / "last.ckpt")
    (tmp_path / "previous.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="no valid checkpoint"):
        newest_checkpoint(tmp_path)
    assert not canary.exists()


def test_restarting_ignores_the_checkpoints(toy_data, tmp_path):
    run_command(command(toy_data, tmp_path, script="tests/killed.py"), -signal.SIGKILL, KILL_AT="7")
    text = train(toy_data, tmp_path, "resume=restart")
    assert "resuming from" not in text
    assert len(values(tmp_path / "train" / "quickstart", "train/loss")) == 15


def test_a_loss_that_is_not_finite_ends_the_run_and_lists_its_images(toy_data, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=r"epoch 1, step \d+: the loss is not finite; .*\.jpg.*lower optim\.lr"):
        fit(compose_config(toy_data, tmp_path, "optim.lr=1e8", "pooling.learn_p=off"), folder)
    assert len((folder / "nonfinite.txt").read_text().splitlines()) == 12
    assert not (folder / "best.safetensors").exists()
    assert not list((folder / "checkpoints").glob("*.ckpt"))


def test_descriptors_that_are_not_finite_are_reported_by_the_validation(toy_data, tmp_path):
    message = r"validation at step \d+: the network's descriptor has NaN .*lower optim\.lr"
    with pytest.raises(InputError, match=message):
        fit(
            compose_config(toy_data, tmp_path, "optim.lr=1e9", "validation.every_steps=1", "pooling.learn_p=off"),
            tmp_path / "run",
        )


def test_a_loss_that_is_not_finite_ends_all_processes(toy_data, tmp_path):
    begin = time.monotonic()
    text = train(toy_data, tmp_path, "optim.lr=1e8", "trainer.devices=2", "trainer.log_every=3", status=2)
    assert time.monotonic() - begin < 120
    assert "the loss is not finite" in text
    listing = (tmp_path / "train" / "quickstart" / "nonfinite.txt").read_text().splitlines()
    assert len(listing) == 12  # images of both processes
    assert "Traceback" not in text


def test_a_dead_worker_ends_the_run_with_a_message(toy_data, tmp_path):
    process = start_training(toy_data, tmp_path, "trainer.num_workers=1")
    # The oldest worker is that of training; a running validation has another worker.
    os.kill(min(pid for pid in children(process.pid) if "train.py" in read_proc(pid, "cmdline")), signal.SIGKILL)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 2, text
    assert "the processes that decode images died" in text
    assert "shm" in text
    assert "Traceback" not in text
    assert load_last_checkpoint(tmp_path / "train" / "quickstart")["global_step"] > 0


def test_a_second_run_in_the_folder_of_a_running_one_is_an_error(toy_data, tmp_path):
    process = start_training(toy_data, tmp_path)
    words = ["optim.epochs=500", "trainer.save_every_steps=1"]
    text = train(toy_data, tmp_path, *words, status=2)
    assert f"another process is training there (process {process.pid} on" in text
    process.kill()
    process.wait()
    with lock_run(tmp_path / "train" / "quickstart"):
        pass


def test_a_resumed_training_continues_its_wandb_run(toy_data, tmp_path):
    words = command(toy_data, tmp_path, "logger=wandb", script="tests/killed.py")
    words.remove("logger=csv")
    run_command(words, -signal.SIGKILL, KILL_AT="7")
    folder = tmp_path / "train" / "quickstart"
    name = (folder / "wandb_id").read_text()
    words = command(toy_data, tmp_path, "logger=wandb")
    words.remove("logger=csv")
    run_command(words)
    runs = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(run.endswith(name) for run in runs)


def test_a_signal_interrupts_a_validation_which_is_repeated_on_resuming(toy_data, checkpoint, tmp_path):
    """A validation may take longer than the sender of the signal waits."""
    script = command(toy_data, tmp_path, *SAVED, script="tests/killed.py")
    text = run_command(script, 143, TERM_VALIDATING="5")
    folder = tmp_path / "train" / "quickstart"
    assert "saved a checkpoint at step 5" in text
    assert len(values(folder, "val/map")) == 1  # the score before training
    train(toy_data, tmp_path, *SAVED)
    assert curves_without_times(folder) == curves_without_times(checkpoint)


def test_corrupt_held_out_images_are_listed_and_left_out(toy_data, tmp_path):
    root = tmp_path / "gldv2"
    shutil.copytree(toy_data / "toy" / "gldv2", root)
    _, held = split_landmarks(read_train(root), 0.25, seed=0)
    corrupt = held.path(2)
    break_scan(corrupt)  # the check before training accepts it
    overrides = [f"data.root={root}", "optim.epochs=1"]
    assert (
        0 < fit(compose_config(tmp_path, tmp_path, *overrides, "data.max_corrupt_fraction=0.1"), tmp_path / "run") <= 1
    )
    (line,) = (tmp_path / "run" / "corrupt_images.txt").read_text().splitlines()
    assert line.startswith(f"{corrupt}\t")
    with pytest.raises(InputError, match=r"1 of 90 images .* more than data\.max_corrupt_fraction=0\.001"):
        fit(compose_config(tmp_path, tmp_path, *overrides, "data.max_corrupt_fraction=0.001"), tmp_path / "strict")


def test_a_training_resumes_with_lost_or_restored_images(toy_data, tmp_path):
    root = tmp_path / "gldv2"
    shutil.copytree(toy_data / "toy" / "gldv2", root)
    photos, _ = split_landmarks(read_train(root), 0.25, seed=0)
    first, second = (photos.path(i).rename(tmp_path / f"{i}.jpg") for i in (3, 4))
    shutil.copy(second, photos.path(4))
    words = [*SAVED, f"data.root={root}", "data.max_corrupt_fraction=0.1"]
    run_command(command(toy_data, tmp_path, *words, script="tests/killed.py"), -signal.SIGKILL, KILL_AT="7")
    first.rename(photos.path(3))
    photos.path(4).unlink()
    assert "step 6/15" in train(toy_data, tmp_path, *words)
    shutil.copy(photos.path(5), photos.path(4))
    text = train(toy_data, tmp_path, *words, status=2)
    assert "different images: 1 of 90" in text


def test_independent_slurm_tasks_are_an_error(toy_data, tmp_path, monkeypatch):
    for name, value in {"NTASKS": "2", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(InputError, match=r"SLURM|Lightning rejects"):
        fit(compose_config(toy_data, tmp_path), tmp_path / "run")
    assert not list(tmp_path.rglob("*.ckpt"))
