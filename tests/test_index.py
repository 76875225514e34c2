"""Approximate indexes: exact if they search all rows, stored, rebuilt if damaged, and reported as approximate."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluations import mini, run
from vectors import brute_force, unit

from superglobal.errors import InputError
from superglobal.retrieval import ann_index as index
from superglobal.retrieval.ann_index import IndexConfig, memory, open_index, recall, with_defaults
from superglobal.retrieval.store import DescriptorStore

pytestmark = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="FAISS is not installed")
ROOT = Path(__file__).parents[1]
EXHAUSTIVE = {
    "flat_fp16": {},
    "ivf_flat": {"nlist": 8, "nprobe": 8},
    "ivf_pq": {"nlist": 4, "nprobe": 4, "pq_m": 8, "candidates": 40},
    "hnsw": {"ef_search": 500, "M": 16},
}


@pytest.fixture(scope="module")
def vectors():
    """Return 6 queries and 500 database vectors."""
    rng = np.random.default_rng(0)
    return unit(rng, 6, 16), unit(rng, 500, 16)


@pytest.mark.parametrize("kind", list(EXHAUSTIVE))
def test_an_index_that_searches_all_rows_is_exact(tmp_path, vectors, kind):
    Q, X = vectors
    index = open_index(X, IndexConfig(kind, **EXHAUSTIVE[kind]), tmp_path)
    scores, ids = index.search(Q, 10)
    np.testing.assert_array_equal(ids, brute_force(Q, X, 10))
    np.testing.assert_allclose(scores, np.take_along_axis(Q @ X.T, ids, axis=1), atol=1e-6)
    exclude = ids[:, 0]
    np.testing.assert_array_equal(index.search(Q, 9, exclude=exclude)[1], brute_force(Q, X, 9, exclude))


@pytest.mark.parametrize("kind", list(EXHAUSTIVE))
def test_skipped_rows_are_not_in_the_index(tmp_path, vectors, kind):
    Q, X = vectors
    skipped = np.sort(brute_force(Q, X, 3)[:, 0])
    store = DescriptorStore.open_or_create(tmp_path / "s", {}, [str(i) for i in range(500)], 16, 100)
    store.write_rows(np.arange(500), X)
    store.skip(skipped)
    store.flush()
    ids = open_index(store, IndexConfig(kind, **EXHAUSTIVE[kind]), tmp_path).search(Q, 10)[1]
    kept = np.setdiff1d(np.arange(500), skipped)
    np.testing.assert_array_equal(ids, kept[brute_force(Q, X[kept], 10)])


def test_few_probes_lower_the_recall_but_return_k_results(tmp_path, vectors):
    Q, X = vectors
    exact = brute_force(Q, X, 100)
    few = open_index(X, IndexConfig("ivf_flat", nlist=12, nprobe=1), tmp_path).search(Q, 100)
    assert (few[1] >= 0).all()  # a list has about 40 rows, so more lists are searched until there are 100 results
    assert 0.2 < recall(few[1], exact).mean() < 1
    assert (np.diff(few[0]) <= 0).all()
    more = open_index(X, IndexConfig("ivf_flat", nlist=12, nprobe=12), tmp_path).search(Q, 100)
    assert recall(more[1], exact).mean() == 1
    assert len(list(tmp_path.glob("*.faiss"))) == 1  # the number of probes does not change the stored index


def test_the_number_of_probes_stays_within_the_limit_of_faiss_on_a_gpu(tmp_path, vectors, monkeypatch):
    """FAISS raises an error above its limit; an index on the CPU replaces the one on the GPU."""
    monkeypatch.setattr(index, "_GPU_LISTS", 3)
    Q, X = vectors
    cpu_index = open_index(X, IndexConfig("ivf_flat", nlist=12, nprobe=1), tmp_path)
    gpu = index.ApproximateIndex(cpu_index.index, cpu_index.rows, cpu_index.config, on_gpu=True)
    probes_used = []
    monkeypatch.setattr(
        gpu,
        "_search_index",
        lambda q, count, probes: probes_used.append(probes) or cpu_index._search_index(q, count, probes),
    )
    assert len(gpu.search(Q, 5)[1]) == len(Q)
    with pytest.raises(InputError, match="found only"):
        gpu.search(Q, 400)
    assert probes_used[-3:] == [1, 2, 3]
    with pytest.raises(InputError, match=r"index\.nprobe=4: FAISS searches at most 3 lists on a GPU"):
        index.ApproximateIndex(cpu_index.index, cpu_index.rows, replace(cpu_index.config, nprobe=4), on_gpu=True)


def test_an_index_is_built_again_only_if_damaged_or_for_other_rows(tmp_path, vectors, caplog):
    caplog.set_level(logging.INFO)
    Q, X = vectors
    settings = IndexConfig("ivf_flat", nlist=8, nprobe=8)

    def open_and_search() -> str:
        caplog.clear()
        ids = open_index(X, settings, tmp_path).search(Q, 5)[1]
        np.testing.assert_array_equal(ids, brute_force(Q, X, 5))
        return caplog.text

    log = open_and_search()
    assert "500 descriptors of dimension 16; needs 0.00 GB" in log
    (path,) = tmp_path.glob("*.faiss")
    assert f"loaded {path}" in open_and_search()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), path.read_bytes()[:100], b""):
        path.write_bytes(damaged)
        assert f"{path} is damaged" in open_and_search()
        assert f"loaded {path}" in open_and_search()
    path.with_suffix(".json").unlink()
    assert "is damaged" in open_and_search()
    other = X.copy()
    other[3] = -other[3]
    open_index(other, settings, tmp_path)
    assert len(list(tmp_path.glob("*.faiss"))) == 2


BUILDER = """
import logging, sys
from pathlib import Path
import numpy as np
from superglobal.retrieval.ann_index import IndexConfig, open_index
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
folder = Path(sys.argv[1])
X = np.load(folder / "x.npy")
print("ready", flush=True)
sys.stdin.readline()
ids = open_index(X, IndexConfig("hnsw", ef_construction=80, ef_search=300), folder / "i").search(X[:5], 3)[1]
print("found", ids[:, 0].tolist())
"""


def test_two_processes_build_an_index_once(tmp_path):
    np.save(tmp_path / "x.npy", unit(np.random.default_rng(0), 20_000, 64))
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    outputs = sorted((job.communicate(timeout=120)[0] for job in jobs), key=lambda text: "built in" not in text)
    assert all("found [0, 1, 2, 3, 4]" in text for text in outputs), outputs
    assert "built in" in outputs[0]
    assert "built in" not in outputs[1]
    assert "another process is building it (process " in outputs[1]
    assert "loaded" in outputs[1]


def test_a_waiting_process_builds_the_index_if_the_first_dies(tmp_path, vectors, caplog):
    """A killed process releases its lock, and its incomplete file has a temporary name."""
    caplog.set_level(logging.INFO)
    Q, X = vectors
    holder = "import os, sys, time; from pathlib import Path; from superglobal.utils.io import file_lock\n"
    holder += "with file_lock(Path(sys.argv[1]), 'busy'):\n    print('locked', flush=True)\n    time.sleep(3)\n"
    holder += "    os._exit(9)\n"
    open_index(X, IndexConfig("flat_fp16"), tmp_path)
    (path,) = tmp_path.glob("*.faiss")
    path.unlink()
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(path.with_suffix(".lock"))], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        ids = open_index(X, IndexConfig("flat_fp16"), tmp_path).search(Q, 5)[1]
    np.testing.assert_array_equal(ids, brute_force(Q, X, 5))
    assert f"another process is building it (process {process.pid}" in caplog.text
    assert "built in" in caplog.text.split("waiting for it")[1]


def test_defaults_follow_the_guidelines_of_faiss():
    assert with_defaults(IndexConfig("ivf_flat"), 10**6, 2048).nlist == 4000
    assert with_defaults(IndexConfig("ivf_pq"), 10**7, 2048).nlist == 2**16
    assert with_defaults(IndexConfig("ivf_pq"), 10**9, 2048).nlist == 2**20
    assert with_defaults(IndexConfig("ivf_pq"), 10**6, 1280).pq_m == 64
    assert with_defaults(IndexConfig("hnsw"), 10**6, 2048).M == 32
    full = with_defaults(IndexConfig("ivf_pq", nlist=77, nprobe=5, pq_m=32), 10**6, 2048)
    assert (full.nlist, full.nprobe, full.pq_m) == (77, 5, 32)
    pq = with_defaults(IndexConfig("ivf_pq"), 10**6, 2048)
    assert 70e6 < memory(pq, 10**6, 2048)[0] < 110e6
    assert memory(with_defaults(IndexConfig("hnsw"), 10**6, 2048), 10**6, 2048)[0] == 10**6 * (4 * 2048 + 256)


def test_invalid_index_settings_raise_errors_that_name_them(tmp_path, vectors):
    Q, X = vectors
    for settings, message in (
        (IndexConfig("ivf_flat", nlist=501), "nlist=501: expected at most the number of rows, 500"),
        (IndexConfig("ivf_pq", pq_m=5), "pq_m=5: expected a divisor of .* 16"),
        (IndexConfig("annoy"), "kind=annoy"),
        (IndexConfig("hnsw", M=1), "M=1: expected an integer >= 2"),
        (IndexConfig("ivf_flat", nprobe=0), "nprobe=0: expected an integer >= 1"),
        (IndexConfig("ivf_flat", nlist=-4), "nlist=-4: expected an integer >= 1"),
        (IndexConfig("ivf_flat", nlist=2.5), "nlist=2.5: expected an integer >= 1"),
        (IndexConfig("hnsw", M=4096), "M=4096: expected an integer <= 2048"),
        (IndexConfig(), "kind=flat: exact search has no index; expected one of flat_fp16, "),
        (IndexConfig("hnsw", nlist=5), "nlist=5: index=hnsw has no setting nlist; choose from M, ef_construction"),
        (IndexConfig("ivf_flat", pq_m=4), "pq_m=4: index=ivf_flat has no setting pq_m; choose from nlist, nprobe"),
    ):
        with pytest.raises(InputError, match=message):
            open_index(X, settings, tmp_path)
    with pytest.raises(InputError, match="PQ needs at least 256 rows to train on, got 200"):
        open_index(X[:200], IndexConfig("ivf_pq"), tmp_path)
    with pytest.raises(InputError, match=r"k=501: expected 1\.\.500"):
        open_index(X, IndexConfig("flat_fp16"), tmp_path).search(Q, 501)


def test_an_evaluation_reports_its_index_and_the_difference_to_exact_search(data, tmp_path, capsys):
    exact = run(tmp_path, *mini(data))
    assert "index" not in exact["about"]
    assert exact["about"]["search"] == "faiss-flat"
    assert run(tmp_path, *mini(data), "index=torch")["about"]["search"] == "torch"
    approximate = run(tmp_path, *mini(data), "index=ivf_flat", "index.nlist=6", "index.nprobe=1", "k=6", "rerank=none")
    assert approximate["dataset"] == f"{exact['dataset']} (ivf_flat, approximate)"
    assert approximate["about"]["search"] == "faiss-ivf_flat"
    about = approximate["about"]["index"]
    assert about["settings"] == {"kind": "ivf_flat", "nlist": 6, "nprobe": 1, "candidates": 1}
    compared = about["compared_to_exact"]
    assert compared["queries"] == 6
    assert 0 < compared["recall"] <= 1
    for name, value in approximate["metrics"]["search"]["map"].items():
        difference = compared["map_difference"][name]
        assert value - difference == pytest.approx(exact["metrics"]["search"]["map"][name], abs=1e-12)
        assert difference <= 1e-12  # relevant images that are not found add nothing
    output = " ".join(capsys.readouterr().out.split())
    assert "approximate search: kind ivf_flat" in output
    assert "compared to exact search of 6 queries: recall@6" in output
    whole = run(tmp_path, *mini(data), "index=flat_fp16")  # all 24 rows are listed
    assert whole["metrics"] == exact["metrics"]
    assert json.dumps(whole["about"]["index"]["compared_to_exact"]["map_difference"]) == json.dumps(
        dict.fromkeys(("easy", "medium", "hard"), 0.0)
    )
