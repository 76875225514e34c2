"""A reranker is added by one file, as in docs/contributing/extending.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import blocks, text_of
from evaluations import mini
from vectors import clustered

from superglobal.errors import InputError
from superglobal.reranking.base import Parameter, register_reranker
from superglobal.reranking.registry import RERANKERS
from superglobal.retrieval.search import search

ROOT = Path(__file__).parents[1]
IN_PYTHON = """
import my_reranker, numpy as np, superglobal
a = np.load("in.npz")
scores, ids = superglobal.rerank(a["Q"], a["X"], a["ids"], method="density", near=3)
order = superglobal.rerank_candidates(a["Q"], a["X"][a["ids"]], method="density", near=3)[1]
np.savez("out.npz", scores=scores, ids=ids, of_candidates=np.take_along_axis(a["ids"], order, axis=1))
"""
ON_THE_COMMAND_LINE = f"""
import my_reranker, runpy, sys
sys.argv[0] = "eval.py"
runpy.run_path({str(ROOT / "eval.py")!r}, run_name="__main__")
"""


@pytest.fixture
def python(tmp_path):
    """A function that runs code with the page's file beside it."""
    (block,) = (b for b in blocks(text_of("docs/contributing/extending.md"), "python") if b.file == "my_reranker.py")
    (tmp_path / "my_reranker.py").write_text(block.text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(code: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_in_python(python, tmp_path):
    rng = np.random.default_rng(18)
    X, Q = clustered(rng, 60), clustered(rng, 4)
    np.savez(tmp_path / "in.npz", Q=Q, X=X, ids=search(Q, X, 60)[1])
    done = python(IN_PYTHON)
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    expected = Q @ X.T + 0.2 * np.sort(X @ X.T, axis=1)[:, -3:].mean(axis=1)
    np.testing.assert_allclose(out["scores"], np.sort(expected, axis=1)[:, ::-1], atol=1e-5)
    np.testing.assert_array_equal(out["ids"], np.argsort(-expected, axis=1))
    np.testing.assert_array_equal(out["ids"], out["of_candidates"])


def test_a_declaration_that_does_not_fit_the_function_is_an_error():
    def scores(q, T, gram, *, weight=1.0, needed):
        return gram

    for parameters in ({"missing": Parameter("x")}, {"needed": Parameter("x")}):
        with pytest.raises(InputError, match=r"reranker new: scores needs a parameter (missing|needed) with a default"):
            register_reranker("new", "help", parameters)(scores)
    with pytest.raises(InputError, match=r"reranker mutual: the name is used by superglobal\.reranking\.mutual"):
        register_reranker("mutual", "help", {"weight": Parameter("x")})(scores)
    with pytest.raises(InputError, match="ties=last: expected one of id, first"):
        register_reranker("new", "help", {}, ties="last")
    assert "new" not in RERANKERS


def test_on_the_command_line(python, data, tmp_path):
    rng = np.random.default_rng(19)
    (tmp_path / "conf" / "rerank").mkdir(parents=True)
    (tmp_path / "conf" / "rerank" / "density.yaml").write_text("kind: density\nnear: 3\n")
    np.save(tmp_path / "Q.npy", clustered(rng, 6))
    np.save(tmp_path / "X.npy", clustered(rng, 24))
    words = [
        "--config-dir",
        "conf",
        *mini(data),
        "descriptors.query=Q.npy",
        "descriptors.database=X.npy",
        "logger=csv",
        "figures.queries=0",
    ]
    words += ["rerank=density", "rerank.M=20", "logger=csv", "figures.queries=0"]
    done = python(ON_THE_COMMAND_LINE, *words)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").rglob("results.json")
    settings = json.loads(path.read_text())["config"]["rerank"]
    expected = {"kind": "density", "M": 20, "near": 3, "weight": 0.2, "K": None}
    assert {name: settings[name] for name in expected} == expected
    assert (
        "rerank.weight=11.0: expected a finite number in 0..10"
        in python(ON_THE_COMMAND_LINE, *words, "rerank.weight=11").stderr
    )
