"""Reuse of rows of other stores: only for identical images, never damaged rows, and never a reason to fail."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from evaluations import mini, run
from vectors import unit

from superglobal.retrieval import store_tools as store_tools
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_tools import reuse_rows

ABOUT = {"weights": "w"}
X = unit(np.random.default_rng(0), 60, 8)


def store_of(folder, images, rows=(), dtype="float32", about=ABOUT):
    """Create a store whose row i is image images[i], and write `rows`."""
    names = [f"image{i}" for i in images]
    store = DescriptorStore.open_or_create(folder, about, names, 8, 16, dtype=dtype)
    rows = np.array(rows, np.int64)
    store.write_rows(rows, X[np.array(images)[rows]])
    store.flush()
    return store


@pytest.mark.parametrize(("first", "second"), [("float32", "float32"), ("float16", "float16"), ("float32", "float16")])
def test_rows_of_the_same_images_are_reused_bit_for_bit(tmp_path, monkeypatch, first, second):
    monkeypatch.setattr(store_tools, "_BLOCK", 7)
    source = store_of(tmp_path / "a", range(40), range(35), first)
    source.skip(np.array([3, 36]))
    source.flush()
    store = store_of(tmp_path / "b", [*range(59, 9, -1), 3], [30], second)  # row 30, image 29, is already written
    assert reuse_rows(tmp_path, store) == 24
    again = DescriptorStore.open(tmp_path / "b")
    reused = [row for row, image in enumerate(range(59, 9, -1)) if image < 35]
    assert np.flatnonzero(again.done).tolist() == reused
    images = 59 - np.array(reused)
    direct = store_of(tmp_path / "direct", range(60), range(60), second)
    np.testing.assert_array_equal(again.read_rows(np.array(reused)), direct.read_rows(images))


def test_damaged_stores_and_rows_are_reported_and_not_reused(tmp_path, caplog):
    for name, damaged in (("a", "manifest.json"), ("b", "names.json"), ("c", "shard-00001.npy")):
        folder = store_of(tmp_path / name, range(20), range(20)).folder
        (folder / damaged).write_bytes((folder / damaged).read_bytes()[:-9])
    store_of(tmp_path / "other", range(20), range(20), about={"weights": "v"})
    swapped = store_of(tmp_path / "ca", range(20), range(20)).folder / "names.json"
    swapped.write_text(json.dumps(json.loads(swapped.read_text())[::-1]))
    sound = store_of(tmp_path / "d", range(30), range(30))
    shard = np.load(sound.folder / "shard-00000.npy", mmap_mode="r+")
    shard[[2, 5]] = [[np.nan], [0.5]]
    shard.flush()
    store = store_of(tmp_path / "new", range(40))
    assert reuse_rows(tmp_path, store) == 28
    assert store.missing.tolist() == [2, 5, *range(30, 40)]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 5
    for name, text in zip(("a", "b", "c", "ca", "d"), messages, strict=True):
        assert str(tmp_path / name) in text
    assert "rows 2, 5 are damaged" in messages[-1]


def test_an_evaluation_ignores_a_damaged_store(data, tmp_path, caplog):
    foreign = tmp_path / "stores" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "manifest.json").write_bytes(b'{"format": "superglobal-store-1", \xff')
    result = run(tmp_path, *mini(data), "k=5", "rerank=none")
    assert result["about"]["extracted"] == {"database": 24, "queries": 6}
    assert str(foreign) in caplog.text
    manifest = next(path for path in (tmp_path / "stores").glob("mini-database-*/manifest.json"))
    assert json.loads(manifest.read_text())["rows"] == 24
