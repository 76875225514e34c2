"""Rows are written during extraction, and none is lost if an image, a write or the run fails."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from evaluations import run
from sets import break_scan, write_folders

from superglobal.errors import InputError
from superglobal.evaluation import module as extraction
from superglobal.retrieval.store import DescriptorStore


@pytest.mark.parametrize("asynchronous", [(), ("cpu",)])
def test_finished_rows_are_kept_if_an_image_fails(tmp_path, monkeypatch, asynchronous):
    monkeypatch.setattr(extraction, "_ASYNCHRONOUS", asynchronous)
    photos = write_folders(tmp_path / "photos")
    break_scan(photos / "label2/2.jpg")
    folder = ["dataset=folder", f"dataset.database={photos}", f"dataset.query={photos / 'label0/0.jpg'}"]
    folder += ["dataset.unreadable=error"]
    with pytest.raises(InputError, match=r"label2/2\.jpg"):
        run(tmp_path, *folder)
    (store,) = (tmp_path / "stores").glob("folder-database-*")
    assert DescriptorStore.open(store).missing.tolist() == [8]


def test_rows_are_written_while_the_next_batch_is_computed(tmp_path, monkeypatch):
    photos = write_folders(tmp_path / "photos")
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "extraction.batch_size=2"]
    steps: list[str] = []

    def recording(name, function):
        return lambda *args: (steps.append(name), function(*args))[1]

    monkeypatch.setattr(extraction, "forward_variants", recording("compute", extraction.forward_variants))
    monkeypatch.setattr(DescriptorStore, "write_rows", recording("write", DescriptorStore.write_rows))
    at_once = run(tmp_path / "at once", *folder)
    count = len(steps) // 2
    assert steps == ["compute", "write"] * count
    steps.clear()
    monkeypatch.setattr(extraction, "_ASYNCHRONOUS", ("cpu",))
    later = run(tmp_path / "later", *folder)
    assert steps == ["compute", *["compute", "write"] * (count - 1), "write"]
    assert later["metrics"] == at_once["metrics"]
    stores = [next((tmp_path / name / "stores").glob("folder-database-*")) for name in ("at once", "later")]
    first, second = (DescriptorStore.open(store) for store in stores)
    assert np.array_equal(first.block(0, len(first)), second.block(0, len(second)))


def fail_at(monkeypatch, row: int, error: BaseException, times: int = 1) -> None:
    """Make the first `times` writes of a row fail after changing its values."""
    write, failures = DescriptorStore.write_rows, [error] * times

    def failing(store, rows, descriptors):
        if row in rows and failures:
            store._shards[0][rows] = 7
            raise failures.pop()
        write(store, rows, descriptors)

    monkeypatch.setattr(DescriptorStore, "write_rows", failing)


def single_image_batches(photos: Path) -> list[str]:
    """Return the overrides of an evaluation with batches of one image."""
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "dataset.unreadable=error"]
    return [*folder, "extraction.batch_size=1"]


def test_a_failure_of_the_last_write_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "_ASYNCHRONOUS", ("cpu",))
    photos = write_folders(tmp_path / "photos")
    fail_at(monkeypatch, 8, InputError("the disk is full"))
    with pytest.raises(InputError, match=r"label2/2\.jpg or another image of its batch: the disk is full"):
        run(tmp_path, *single_image_batches(photos))
    (store,) = (tmp_path / "stores").glob("folder-database-*")
    assert DescriptorStore.open(store).missing.tolist() == [8]


def test_a_failed_write_after_another_error_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(extraction, "_ASYNCHRONOUS", ("cpu",))
    photos = write_folders(tmp_path / "photos")
    break_scan(photos / "label2/2.jpg")
    fail_at(monkeypatch, 7, InputError("the disk is full"))
    with pytest.raises(InputError, match=r"label2/2\.jpg") as raised, caplog.at_level(logging.WARNING):
        run(tmp_path, *single_image_batches(photos))
    assert "the disk is full" not in str(raised.value)
    warnings = [record.getMessage() for record in caplog.records if record.name == "superglobal.evaluation.extraction"]
    assert warnings == [f"{photos / 'label2/1.jpg'} or another image of its batch: the disk is full"]


@pytest.mark.parametrize("asynchronous", [(), ("cpu",)])
@pytest.mark.parametrize("row", [3, 8])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_write_is_repeated_and_no_row_is_lost(tmp_path, monkeypatch, asynchronous, row, times):
    photos = write_folders(tmp_path / "photos")
    run(tmp_path / "whole", *single_image_batches(photos))
    with monkeypatch.context() as patched:
        patched.setattr(extraction, "_ASYNCHRONOUS", asynchronous)
        fail_at(patched, row, SystemExit(143), times)
        with pytest.raises(SystemExit):
            run(tmp_path / "cut", *single_image_batches(photos))
    folders = [next((tmp_path / name / "stores").glob("folder-database-*")) for name in ("whole", "cut")]
    whole, cut = (DescriptorStore.open(folder) for folder in folders)
    missing = cut.missing.tolist()
    assert (row in missing) == (times == 2)
    written = np.flatnonzero(cut.done)
    assert set(range(row)) <= set(written.tolist())
    assert np.array_equal(cut.read_rows(written), whole.read_rows(written))
    assert run(tmp_path / "cut", *single_image_batches(photos))["about"]["extracted"] == {"database": len(missing)}
    assert np.array_equal(cut.block(0, len(cut)), whole.block(0, len(whole)))
