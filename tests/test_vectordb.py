"""The example with a vector database gives the results of `search` and `rerank` and follows the folder."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment
from sets import texture, write_folders

import superglobal

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """Write a query and a folder of images, and return the folder."""
    texture(2, 7).save(tmp_path / "query.jpg")
    return write_folders(tmp_path / "images", landmarks=4)


def command(folder: Path) -> list[str]:
    """Return the command line of the example."""
    query, database = folder.parent / "query.jpg", folder.parent / "db"
    return [*map(str, ["examples/vectordb.py", folder, query, "--folder", database, "--show", 9, "--M", 8])]


def run_again(monkeypatch, words: list[str]) -> int:
    """Run the example in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", words)
    return runpy.run_path(str(ROOT / "examples" / "vectordb.py"))["main"]()


def lists(output: str) -> tuple[list[str], list[str]]:
    """Return the images before and after reranking."""
    rows = [line.split() for line in output.split("after reranking")[1].splitlines() if line]
    return [row[1] for row in rows], [row[3] for row in rows]


def expected(folder: Path) -> tuple[list[str], list[str]]:
    """Return the results of `search` and `rerank` on all descriptors."""
    paths = sorted(folder.rglob("*.jpg"))
    model = superglobal.load_model("package")
    X = superglobal.extract(model, paths, max_side=1024)
    Q = superglobal.extract(model, folder.parent / "query.jpg", max_side=1024)
    _, ids = superglobal.search(Q, X, k=8)
    center = superglobal.Whitening("center").fit(X)
    _, reranked = superglobal.rerank(center.transform(Q), center.transform(X), ids, method="auto")
    return tuple([str(paths[i]) for i in row[0]] for row in (ids, reranked))


def test_results_equal_those_of_search_and_rerank_also_after_changes(folder, monkeypatch, capsys):
    words = [sys.executable, *command(folder)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert "12 images, 12 to extract" in output
    before, after = lists(output)
    assert (before, after) == expected(folder)
    assert before != after
    assert all("label2" in name for name in after[:3])
    (folder / "label2" / "0.jpg").unlink()
    texture(9, 9).save(folder / "label0" / "0.jpg")
    assert run_again(monkeypatch, command(folder)) == 0
    output = capsys.readouterr().out
    assert "11 images, 1 to extract" in output
    assert lists(output) == expected(folder)


def test_a_folder_without_images_is_an_error(tmp_path, monkeypatch, capsys):
    assert run_again(monkeypatch, ["vectordb.py", str(tmp_path), str(tmp_path / "query.jpg")]) == 2
    assert "error: no images under" in capsys.readouterr().err
