"""DescriptorStore: rows are written in any order, resumable, shared between processes, and never mixed up."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from superglobal.errors import InputError
from superglobal.retrieval import store as store_module
from superglobal.retrieval.store import DescriptorStore, _row_checksums
from superglobal.retrieval.store_files import fingerprint
from superglobal.utils.io import atomic_file, write_atomically

IMAGES = [f"image{i} 10-abc" for i in range(25)]
ABOUT = {"weights": "w", "scales": [1.0]}


def unit(n, d=8, seed=0):
    """Return n random unit vectors."""
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def create(folder, images=IMAGES, about=ABOUT, shard_rows=10):
    """Open or create a store of 8 dimensions."""
    return DescriptorStore.open_or_create(folder, about, images, 8, shard_rows)


def test_rows_are_stored_in_their_positions_in_any_write_order(tmp_path):
    X = unit(25)
    store = create(tmp_path / "s")
    for row in np.random.default_rng(1).permutation(25):
        store.write_rows([row], X[[row]])
    store.flush()
    for opened in (store, create(tmp_path / "s"), DescriptorStore.open(tmp_path / "s")):
        assert np.array_equal(opened.block(0, 25), X)
        assert np.array_equal(opened.block(7, 21), X[7:21])
        assert opened.block(4, 4).shape == (0, 8)
        ids = np.array([[24, 0], [9, 10]])
        assert np.array_equal(opened.take(ids), X[ids])
        with pytest.raises(InputError, match=r"rows 5\.\.26 are outside 0\.\.25"):
            opened.block(5, 26)
    assert store.names == IMAGES


def test_row_numbers_must_be_integers_and_descriptors_any_array(tmp_path):
    store = create(tmp_path / "s")
    store.write_rows([0], unit(1).tolist())
    store.write_rows([1], torch.from_numpy(unit(1)))
    store.flush()
    assert len(store.missing) == 23
    with pytest.raises(InputError, match="expected integer row numbers, got float64"):
        store.write_rows([0.7], unit(1))


def test_unfinished_rows_are_missing_and_never_read(tmp_path):
    store = create(tmp_path / "s")
    store.write_rows([3], unit(1))
    assert len(DescriptorStore.open(tmp_path / "s").missing) == 25  # not flushed
    store.flush()
    again = create(tmp_path / "s")
    assert 3 not in again.missing
    assert len(again.missing) == 24
    with pytest.raises(InputError, match="24 of 25"):
        again.block(0, 5)
    with pytest.raises(InputError, match="24 of 25"):
        again.take(np.array([3]))


def fill(folder, rows, die):
    """Write rows to a store; kill the process afterwards if `die`."""
    store = create(folder)
    X = unit(25)
    for row in rows:
        store.write_rows([row], X[[row]])
        if row % 3 == 0:
            store.flush()
    if die:
        signal.raise_signal(signal.SIGKILL)
    store.flush()


def test_two_processes_fill_a_store_and_a_killed_one_leaves_complete_rows(tmp_path):
    folder = tmp_path / "s"
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=fill, args=(folder, r, d)) for r, d in ((range(13), False), (range(13, 24), True))]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    store = create(folder)
    assert [job.exitcode for job in jobs] == [0, -signal.SIGKILL]
    assert store.missing.tolist() == [22, 23, 24]
    for row in store.missing:
        store.write_rows([row], unit(25)[[row]])
    store.flush()
    assert np.array_equal(create(folder).block(0, 25), unit(25))


@pytest.mark.parametrize(
    ("about", "images"),
    [({**ABOUT, "scales": [2.0]}, IMAGES), (ABOUT, [*IMAGES[:-1], "image24 10-abd"]), (ABOUT, IMAGES[:-1])],
)
def test_a_store_of_different_settings_or_images_is_an_error(tmp_path, about, images):
    create(tmp_path / "s")
    assert fingerprint(about, images) != fingerprint(ABOUT, IMAGES)
    with pytest.raises(InputError, match="other weights, settings or images"):
        create(tmp_path / "s", images, about)


@pytest.mark.parametrize("row", [np.zeros(8), np.full(8, np.nan), np.ones(8), unit(1, 7)[0]])
def test_rows_that_are_not_unit_vectors_raise_errors(tmp_path, row):
    store = create(tmp_path / "s")
    with pytest.raises(InputError, match=r"rows?:? 2"):
        store.write_rows([2], row.astype(np.float32)[None])
    store.flush()
    assert len(store.missing) == 25


def test_damaged_stores_raise_errors_that_name_the_file(tmp_path):
    create(tmp_path / "s")
    shard = tmp_path / "s" / "shard-00001.npy"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(InputError, match=r"shard-00001\.npy.*delete"):
        create(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    for text in (json.dumps({**manifest, "rows": 10**18}), "[" * 100_000, json.dumps([[]] * 3)):
        (tmp_path / "s" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            DescriptorStore.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        create(tmp_path / "s")
    with pytest.raises(InputError, match="no descriptor store"):
        DescriptorStore.open(tmp_path / "nowhere")


def zero(values):
    """Zero rows 12 and 13."""
    values[2:4] = 0


def flip(values):
    """Flip the lowest bit of one value of row 13."""
    values.view(np.uint32)[3, 5] ^= 1


def swap(values):
    """Exchange rows 12 and 13."""
    values[[2, 3]] = values[[3, 2]]


@pytest.mark.parametrize(("damage", "rows"), [(zero, "rows 12-13 are"), (flip, "row 13 is"), (swap, "rows 12-13 are")])
def test_damaged_rows_are_never_read(tmp_path, damage, rows):
    X = unit(25)
    store = create(tmp_path / "s")
    store.write_rows(np.arange(25), X)
    store.flush()
    assert np.array_equal(store.block(0, 25), X)
    shard = np.load(tmp_path / "s" / "shard-00001.npy", mmap_mode="r+")
    damage(shard)
    shard.flush()
    for opened in (store, DescriptorStore.open(tmp_path / "s")):
        for read in (lambda s: s.block(0, 25), lambda s: s.take(np.array([[24], [13]])), lambda s: s.block(13, 14)):
            with pytest.raises(InputError, match=f"shard-00001.npy: (row 13 is|{rows}) damaged .*verify --repair"):
                read(opened)
        assert np.array_equal(opened.block(14, 25), X[14:])
    assert damage is not flip or store.damaged().tolist() == [13]
    np.save(tmp_path / "whole.npy", X[10:20])
    os.replace(tmp_path / "whole.npy", tmp_path / "s" / "shard-00001.npy")
    assert np.array_equal(store.block(0, 25), X)


@pytest.fixture
def verified(monkeypatch) -> list[int]:
    """Return a list to which the number of rows of each verified shard is added. Files count as settled at once."""
    rows: list[int] = []

    def slowly(values: np.ndarray) -> np.ndarray:
        rows.append(len(values))
        time.sleep(0.02)
        return _row_checksums(values)

    monkeypatch.setattr(store_module, "_row_checksums", slowly)
    monkeypatch.setattr("superglobal.utils.io._SETTLED", 0)
    return rows


def test_a_verified_shard_is_verified_again_only_if_its_file_changed(tmp_path, verified):
    store = create(tmp_path / "s")
    store.write_rows(np.arange(25), unit(25))
    store.flush()
    store.block(0, 25)
    verified.clear()
    opened = DescriptorStore.open(tmp_path / "s")
    opened.block(0, 25)
    opened.take(np.array([3, 24]))
    assert verified == []
    copy = DescriptorStore.open(shutil.copytree(tmp_path / "s", tmp_path / "copy"))
    copy.block(0, 25)
    copy.take(np.array([3, 24]))
    assert verified == [10, 10, 5]
    (tmp_path / "copy" / "verified.npy").write_bytes(b"")  # only a record of what was verified
    assert np.array_equal(DescriptorStore.open(tmp_path / "copy").block(0, 25), unit(25))


def test_shards_with_missing_or_damaged_rows_are_verified_once(tmp_path, verified, monkeypatch):
    # Writes through a memory map can leave the times of a file unchanged.
    monkeypatch.setattr(store_module, "file_stamp", lambda path: [1, 2, 3])
    store = create(tmp_path / "s")
    store.write_rows(np.arange(22), unit(22))
    store.flush()
    shard = np.load(tmp_path / "s" / "shard-00000.npy", mmap_mode="r+")
    shard[4] = 0
    shard.flush()
    verified.clear()
    opened = DescriptorStore.open(tmp_path / "s")
    with ThreadPoolExecutor(4) as pool:  # Threads that read the same shard wait for one verification.
        for values in pool.map(opened.read_rows, [np.array([5, 12, 21])] * 8):
            assert np.array_equal(values, unit(22)[[5, 12, 21]])
    assert opened.damaged().tolist() == [4]
    assert sorted(verified) == [5, 10, 10]
    store.write_rows(np.array([22]), unit(1))  # The new row is verified, too.
    store.flush()
    assert np.array_equal(opened.read_rows(np.array([22])), unit(1))
    store.write_rows(np.array([4]), unit(1))
    store.flush()
    assert opened.damaged().tolist() == []
    assert sorted(verified) == [1, 1, 5, 5, 10, 10, 10]  # with those of the two new rows


def test_a_shard_that_has_just_changed_is_verified_at_every_read(tmp_path, verified, monkeypatch):
    monkeypatch.setattr("superglobal.utils.io._SETTLED", 60 * 10**9)
    store = create(tmp_path / "s")
    store.write_rows(np.arange(25), unit(25))
    store.flush()
    verified.clear()
    for _ in range(2):  # A change between these reads might not change the times of the file.
        assert np.array_equal(store.block(0, 10), unit(25)[:10])
    assert verified == [10, 10]
    assert not np.load(tmp_path / "s" / "verified.npy").any()


def test_a_shard_that_is_truncated_while_it_is_open_is_named(tmp_path):
    store = create(tmp_path / "s")
    store.write_rows(np.arange(25), unit(25))
    store.flush()
    os.truncate(tmp_path / "s" / "shard-00002.npy", 200)
    with pytest.raises(InputError, match=r"shard-00002\.npy: missing or damaged"):
        store.block(0, 25)


def test_stores_of_different_values_have_different_fingerprints(tmp_path):
    stores = [create(tmp_path / name) for name in "abc"]
    for store, seed in zip(stores, (0, 0, 1), strict=True):
        store.write_rows(np.arange(25), unit(25, seed=seed))
        store.flush()
    first, same, other = (store.fingerprint() for store in stores)
    assert first == same != other
    assert first[:64] == other[:64]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        create(tmp_path / "file" / "s")


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EACCES, r"\(Permission denied\); change its permissions, or choose another folder"),
        (errno.ENOSPC, r"\(No space left on device\); [\d.]+ MB are free: free space, or choose another folder"),
        (errno.EROFS, r"\(Read-only file system\); choose another folder"),
    ],
)
def test_a_failed_write_has_a_hint_for_its_reason(tmp_path, monkeypatch, number, hint):
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=f"x: cannot be written {hint}$"):
        write_atomically(tmp_path / "x", b"")
    assert list(tmp_path.iterdir()) == []


def test_only_errors_of_the_written_file_are_failed_writes(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), atomic_file(tmp_path / "x") as file:
        file.write((tmp_path / "source").read_bytes())
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for content in (bytes(2000), bytes(2_000_000)):
            with pytest.raises(InputError, match=r"x: cannot be written \(File too large\)"):
                write_atomically(tmp_path / "x", content)
        with (
            pytest.raises(InputError, match=r"x: cannot be written \(File too large\)"),
            atomic_file(tmp_path / "x") as file,
        ):
            np.savez(file, values=np.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_manifest_is_not_a_store(tmp_path):
    create(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has files but no manifest\.json"):
        create(tmp_path / "s")


def test_the_manifest_describes_the_rows(tmp_path):
    create(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["identity"] == ABOUT
    assert manifest["fingerprint"] == fingerprint(ABOUT, IMAGES)
    assert (manifest["rows"], manifest["dim"], manifest["dtype"]) == (25, 8, "float32")
