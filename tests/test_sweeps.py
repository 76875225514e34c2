"""Sweeps whose jobs share extraction, and processes started together: extracted images and rows of the table."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluations import ROOT, mini, revisited, run_program
from evaluations import run as run_here
from runs import environment
from sets import write_revisited

import superglobal
from superglobal.models.weights import save_weights
from superglobal.reporting.tables import write_tables
from superglobal.retrieval.store import DescriptorStore
from superglobal.training.trainer import launched_externally


def table(outputs: Path) -> list[dict[str, str]]:
    """Read the rows of table.csv."""
    with next(outputs.rglob("table.csv")).open() as file:
        return list(csv.DictReader(file))


def jobs(outputs: Path) -> list[dict]:
    """Read the results of all jobs in the order of their numbers."""
    paths = sorted((outputs / "eval/sweep").rglob("results.json"), key=lambda path: path.as_posix())
    return [json.loads(path.read_text()) for path in paths]


def run_alone(data: Path, outputs: Path, *overrides: str) -> dict:
    """Run the same settings in a separate evaluation."""
    return run_here(outputs, *mini(data), "rerank=none", *overrides)


def test_a_failing_job_does_not_affect_other_jobs(data, tmp_path):
    """Activations of 1e6 overflow at p = 10, so this descriptor is invalid. The jobs share their passes over images."""
    network = superglobal.load_model("random", backbone="resnet18", scales=1, pooling="gem")
    network.backbone.net.layer4[-1].bn2.weight.data.fill_(1e6)
    save_weights(network, tmp_path / "large.safetensors", {})
    settings = ["pooling=gem", f"weights={tmp_path}/large.safetensors"]
    text = run_program(tmp_path, "-m", *revisited(data, *settings, "pooling.p=3,10,4", "rerank=none"), status=2)
    assert "extracting descriptors of 3 networks of the sweep in one pass" in text
    assert text.count("the network's descriptor has NaN or infinite values") == 1
    assert "Traceback" not in text
    first, failed, last = jobs(tmp_path)
    assert [job["status"] for job in (first, failed, last)] == ["ok", "failed", "ok"]
    assert "has NaN" in failed["reason"]
    assert first["about"]["extracted"] == {"database": 24, "queries": 6}
    assert last["about"]["extracted"] == {"database": 0, "queries": 0}
    for job, p in ((first, 3), (last, 4)):
        single = run_alone(data, tmp_path / "alone", *settings, f"pooling.p={p}")
        assert job["metrics"] == single["metrics"]
    by_p = {row["pooling.p"]: row for row in table(tmp_path)}
    assert by_p["10.0"]["medium"] == by_p["10.0"]["gain"] == "failed"
    assert by_p["3.0"]["medium"] == f"{100 * first['metrics']['search']['map']['medium']:.2f}"


def test_a_sweep_may_combine_shards_and_poolings(data, tmp_path):
    """The first job of each shard extracts for both poolings, and both have results after the last shard."""
    switches = ["extraction.shard=1/2,2/2", "pooling.regional=true,false"]
    text = run_program(tmp_path, "-m", *revisited(data, "rerank=none", *switches))
    assert text.count("Extracted shard 1/2; ") == 2
    results = jobs(tmp_path)
    assert [job["config"]["pooling"]["regional"] for job in results] == [True, False]
    assert results[0]["about"]["extracted"]["database"] == 12
    assert results[1]["about"]["extracted"]["database"] == 0
    for job in results:
        regional = job["config"]["pooling"]["regional"]
        whole = run_alone(data, tmp_path / "whole", f"pooling.regional={str(regional).lower()}")
        assert job["metrics"] == whole["metrics"]
        assert job["about"]["network"] == whole["about"]["network"]
    assert [row["pooling.regional"] for row in table(tmp_path)] == ["True", "False"]


def test_the_table_of_a_sweep_over_indexes_shows_their_settings(data, tmp_path):
    """Settings that change results have a column; those of the comparison with exact search have none."""
    settings = [["index=flat"], *(["index=ivf_flat", "index.nlist=6", f"index.nprobe={n}"] for n in (1, 2))]
    scores = []
    for overrides in settings:
        backend = ["index.backend=torch"] if overrides == ["index=flat"] else []
        scores.append(run_alone(data, tmp_path, *overrides, *backend, "k=6")["metrics"]["search"]["map"]["medium"])
    assert len(set(scores)) == 3
    write_tables(tmp_path)
    rows = table(tmp_path)
    assert [name for name in rows[0] if name.startswith("index.")] == ["index.kind", "index.nlist", "index.nprobe"]
    assert [row["data set"] for row in rows] == ["mini", *["mini (ivf_flat, approximate)"] * 2]
    assert [row["index.nprobe"] for row in rows] == ["None", "1", "2"]
    assert [row["medium"] for row in rows] == [f"{100 * score:.2f}" for score in scores]


def test_processes_started_together_finish_even_if_nothing_is_missing(data, tmp_path):
    """Otherwise, a process that found a missing row would wait for another one that did not."""
    single = run_alone(data, tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = ["trainer.devices=2", "trainer.strategy=ddp", "rerank=none", f"paths.outputs={tmp_path}"]
    words = [*torchrun, str(ROOT / "eval.py"), *revisited(data, *two)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "MEMBER: 2/2" in text
    (path,) = (tmp_path / "eval").rglob("results.json")
    together = json.loads(path.read_text())
    assert together["about"]["extracted"] == {"database": 0, "queries": 0}
    assert together["metrics"] == single["metrics"]
    stores = [DescriptorStore.open(folder) for folder in (tmp_path / "stores").glob("mini-*")]
    assert [len(store.missing) for store in stores] == [0, 0]
    assert all(np.isfinite(store.block(0, len(store))).all() for store in stores)


KILL_SECOND_PROCESS = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from superglobal.retrieval.store import DescriptorStore
write, count = DescriptorStore.write_rows, 0
def killed(self, rows, descriptors):
    global count
    count += len(rows)
    if count > 20 and os.environ.get("LOCAL_RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, rows, descriptors)
DescriptorStore.write_rows = killed
path = {str(ROOT / "eval.py")!r}
exec(compile(open(path).read(), path, "exec"))  # keeps the name of this file, with which the second process is started
"""


def test_a_run_with_a_killed_process_resumes_to_the_same_store(tmp_path):
    write_revisited(tmp_path, landmarks=12, views=7)
    (tmp_path / "kill_second_process.py").write_text(KILL_SECOND_PROCESS)
    single, double = tmp_path / "one", tmp_path / "two"
    processes = ["rerank=none", "trainer.devices=2", "trainer.strategy=ddp", f"paths.outputs={double}"]
    words = [sys.executable, str(tmp_path / "kill_second_process.py"), *revisited(tmp_path, *processes)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode not in (0, 1), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(double.rglob("results.json"))
    (store,) = (double / "stores").glob("mini-database-*")
    missing = len(DescriptorStore.open(store).missing)
    assert 0 < missing <= 72
    again, whole = run_alone(tmp_path, double), run_alone(tmp_path, single)
    assert again["about"]["extracted"]["database"] == missing
    assert again["metrics"] == whole["metrics"]
    (single_store,) = (single / "stores").glob("mini-database-*")
    assert single_store.name == store.name
    assert (
        np.abs(DescriptorStore.open(store).block(0, 72) - DescriptorStore.open(single_store).block(0, 72)).max() < 1e-6
    )


@pytest.mark.parametrize(
    ("variables", "together"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False),  # second process started by Lightning
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, False),  # an interactive shell starts no tasks
    ],
)
def test_externally_launched_processes_are_detected(monkeypatch, variables, together):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_externally() is together
