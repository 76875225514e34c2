"""`superglobal store`: merging, export with names, and errors that name damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluations import mini, run
from sets import write_folders
from vectors import unit

from superglobal import cli
from superglobal.data.image_checks import CheckReport
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.module import ExtractionList
from superglobal.retrieval import store_tools as upkeep
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_files import read_skipped, record_paths

ABOUT = {"weights": "w"}


def names(count: int) -> list[str]:
    """Return image names."""
    return [f"image{i}" for i in range(count)]


def paths(count: int) -> list[str]:
    """Return relative paths of images."""
    return [f"set/jpg/{i % 3}/image{i}.jpg" for i in range(count)]


def part_of(folder: Path, X: np.ndarray, rows, skipped=(), dtype: str = "float32") -> DescriptorStore:
    """Create a store of X, write some of its rows and skip others."""
    store = DescriptorStore.open_or_create(folder, ABOUT, names(len(X)), X.shape[1], 40, dtype=dtype)
    rows = np.setdiff1d(rows, skipped)
    store.write_rows(rows, X[rows])
    store.skip(np.array(skipped, np.int64), [f"{folder.name}/{row}.jpg\ttruncated" for row in skipped])
    store.flush()
    record_paths(folder, paths(len(X)))
    return store


def command(*words: object, status: int = 0) -> str:
    """Run `superglobal store` in a process of its own, which must exit with `status`, and return its output."""
    line = [sys.executable, "-m", "superglobal", "store", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def script(capsys):
    """Run `superglobal store` in this process, which saves the time to start a process."""

    def run(*words: object, status: int = 0) -> str:
        exit_status, output = cli.main(["store", *map(str, words)]), capsys.readouterr()
        assert exit_status == status, output
        return output.out + output.err

    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_are_merged_verified_and_exported(tmp_path, script, dtype):
    X = unit(np.random.default_rng(0), 100, 16)
    whole = part_of(tmp_path / "whole", X, np.arange(100), [7], dtype).block(0, 100)
    part_of(tmp_path / "p0", X, np.arange(0, 50), [7], dtype)
    part_of(tmp_path / "p1", X, np.arange(40, 100), (), dtype)
    command("merge", tmp_path / "p0", tmp_path / "p1", "--into", tmp_path / "m")
    merged = DescriptorStore.open(tmp_path / "m")
    np.testing.assert_array_equal(merged.block(0, 100), whole)
    assert merged.skipped.tolist() == [7]
    assert script("verify", tmp_path / "m").rstrip().endswith("99 rows are valid, 1 skipped, 0 missing")
    about = json.loads(script("info", tmp_path / "m"))
    assert (about["rows"], about["written"], about["dtype"], about["identity"]) == (100, 99, dtype, ABOUT)
    kept = np.setdiff1d(np.arange(100), [7])
    script("export", tmp_path / "m", tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), whole[kept].astype(dtype))
    assert (tmp_path / "x.txt").read_text().split() == [paths(100)[i] for i in kept]
    script("export", tmp_path / "m", tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["name"].to_pylist() == [paths(100)[i] for i in kept]
    np.testing.assert_array_equal(np.array(table["descriptor"].to_pylist(), dtype), whole[kept].astype(dtype))


def test_verify_merge_and_export_report_invalid_stores(tmp_path, script):
    X = unit(np.random.default_rng(0), 50, 16)
    for name in ("a", "b"):
        part_of(tmp_path / name, X, np.arange(50))
    part_of(tmp_path / "c", X[::-1], np.arange(50))
    merge = ("merge", tmp_path / "b", tmp_path / "c", "--into", tmp_path / "m")
    assert "row 0 differs" in script(*merge, status=2)
    shard = np.load(tmp_path / "a" / "shard-00000.npy", mmap_mode="r+")
    shard[3] = shard[4]
    shard.flush()
    merge = ("merge", tmp_path / "a", tmp_path / "b", "--into", tmp_path / "n")
    for words in (("verify", tmp_path / "a"), merge, ("export", tmp_path / "a", tmp_path / "x.npy")):
        assert "shard-00000.npy: row 3 is damaged" in script(*words, status=2)
    assert "49 rows are valid, 0 skipped, 1 missing; row 3 is marked" in script("verify", tmp_path / "a", "--repair")
    repaired = DescriptorStore.open(tmp_path / "a")
    repaired.write_rows(repaired.missing, X[repaired.missing])
    repaired.flush()
    assert "50 rows are valid" in script("verify", tmp_path / "a")
    other = DescriptorStore.open_or_create(tmp_path / "d", {"weights": "v"}, names(50), 16)
    assert "fingerprint differs" in script("merge", tmp_path / "b", other.folder, "--into", tmp_path / "o", status=2)
    assert "50 of 50 descriptors are missing" in script("export", other.folder, tmp_path / "x.npy", status=2)
    assert "ends with .npy or .parquet" in script("export", tmp_path / "b", tmp_path / "x.csv", status=2)
    (tmp_path / "b" / "names.json").write_text(json.dumps([*names(49), "another"]))
    assert "names.json or the manifest" in script("verify", tmp_path / "b", status=2)


def test_a_store_with_a_changed_list_of_images_is_not_merged(tmp_path):
    """Otherwise, rows would be assigned to the names of different images."""
    X = unit(np.random.default_rng(0), 20, 8)
    part = part_of(tmp_path / "a", X, np.arange(20))
    (part.folder / "names.json").write_text(json.dumps(names(20)[::-1]))
    with pytest.raises(InputError, match=r"names\.json or the manifest was changed"):
        upkeep.merge([part], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_merging_keeps_skipped_rows_unless_another_part_contains_them(tmp_path):
    X = unit(np.random.default_rng(0), 60, 8)
    parts = [
        part_of(tmp_path / "a", X, np.arange(0, 20), [2, 5, 41]),
        part_of(tmp_path / "b", X, np.arange(20, 40), [5, 21]),
        part_of(tmp_path / "c", X, [2, *range(40, 60)], []),
    ]
    for order in (parts, parts[::-1]):
        merged = upkeep.merge(order, tmp_path / f"m{order[0].folder.name}")
        assert merged.skipped.tolist() == [5, 21]
        reasons = read_skipped(merged.folder, 60)
        assert reasons == {5: f"{'a' if order is parts else 'b'}/5.jpg\ttruncated", 21: "b/21.jpg\ttruncated"}
        np.testing.assert_array_equal(merged.read_rows(np.array([2, 41])), X[[2, 41]])
    # Rows that are skipped in the target are filled, too.
    first = upkeep.merge(parts[:1], tmp_path / "again")
    assert first.skipped.tolist() == [2, 5, 41]
    upkeep.merge(parts[1:], tmp_path / "again")
    again = upkeep.open_validated(tmp_path / "again")
    assert again.skipped.tolist() == [5, 21]
    assert set(read_skipped(again.folder, 60)) == {5, 21}
    assert not len(again.missing)


def test_names_of_rows_are_unique_relative_paths(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere" / "q.jpg"
    items = [
        ImageItem(data / "set" / "a" / "x.jpg"),
        ImageItem(data / "set" / "b" / "x.jpg"),
        ImageItem(data / "set" / "b" / "x.jpg"),
        ImageItem(data / "set" / "b" / "x.jpg", (1.5, 2, 30, 40)),
        ImageItem(data / "set" / "b" / "x.jpg", (1.5, 2, 30, 41)),
        ImageItem(tmp_path / "photos" / "c" / "é.jpg"),
        ImageItem(elsewhere),
        ImageItem(data / "set" / "\udcff.jpg"),  # a name that is not valid UTF-8
        ImageItem(data / "set" / "b" / "x.jpg#2"),
        ImageItem(data / "set" / "b" / "x.jpg"),
    ]
    report = CheckReport([""] * len(items), [(1, 1)] * len(items), [], [])
    row_paths = ExtractionList("database", "set", items, report, None, roots=[data, tmp_path / "photos"]).paths()
    assert row_paths == [
        "set/a/x.jpg",
        "set/b/x.jpg",
        "set/b/x.jpg#2",
        "set/b/x.jpg#1.5,2,30,40",
        "set/b/x.jpg#1.5,2,30,41",
        "c/é.jpg",
        str(elsewhere),
        r"set/\xff.jpg",
        "set/b/x.jpg#2#2",
        "set/b/x.jpg#3",
    ]
    store = part_of(tmp_path / "s", unit(np.random.default_rng(0), len(items), 8), np.arange(len(items)))
    record_paths(store.folder, row_paths)
    assert upkeep.export(store, tmp_path / "x.npy") == len(items)
    assert (tmp_path / "x.txt").read_text().splitlines() == row_paths
    record_paths(store.folder, ["a\nb", *row_paths[1:]])
    with pytest.raises(InputError, match=r"has a line break; export to \.parquet"):
        upkeep.export(store, tmp_path / "y.npy")
    record_paths(store.folder, ["c/é.jpg", *row_paths[1:]])
    with pytest.raises(InputError, match=r"paths\.json: .* a different path for each row; run the evaluation again"):
        upkeep.export(store, tmp_path / "y.npy")
    (store.folder / "paths.json").unlink()
    with pytest.raises(InputError, match=r"paths\.json is missing; run the evaluation again"):
        upkeep.export(store, tmp_path / "y.npy")


def test_an_evaluation_names_the_rows_of_new_and_existing_stores(data, tmp_path):
    result = run(tmp_path, *mini(data), "k=5", "rerank=none")
    files = {path.parent.name.split("-")[1]: path for path in (tmp_path / "stores").glob("*/paths.json")}
    row_paths = {title: json.loads(path.read_text()) for title, path in files.items()}
    assert row_paths["database"][:3] == [f"mini/jpg/l0_{i:06d}.jpg" for i in (1, 2, 3)]
    assert row_paths["queries"][5] == "mini/jpg/l5_000000.jpg#4.5,3.2,118,95"
    files["database"].unlink()
    again = run(tmp_path, *mini(data), "k=5", "rerank=none")
    assert again["about"]["extracted"] == {"database": 0, "queries": 0}
    assert upkeep.export(DescriptorStore.open(files["database"].parent), tmp_path / "x.npy") == 24
    assert (tmp_path / "x.txt").read_text().splitlines() == row_paths["database"]
    listed = (result["folder"] / "rankings.csv").read_text().splitlines()[1].split(",")[3]
    assert f"mini/{listed}" in row_paths["database"]
    photos = write_folders(tmp_path / "photos")
    run(tmp_path / "o", "dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "rerank=none", "k=5")
    (path,) = (tmp_path / "o" / "stores").glob("*/paths.json")
    assert json.loads(path.read_text())[:4] == ["label0/0.jpg", "label0/1.jpg", "label0/2.jpg", "label1/0.jpg"]


SMALL = ("manifest.json", "names.json", "paths.json", "done.npy", "skipped.txt", "checksums.npy")
COMMANDS = ("info", "verify", "merge", "export")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Create a store with all optional files."""
    folder = tmp_path_factory.mktemp("sound") / "s"
    store = part_of(folder, unit(np.random.default_rng(0), 30, 8), np.arange(30), [4, 9])
    assert not len(upkeep.verify(store))
    assert {path.name for path in folder.glob("[!s]*")} | {"skipped.txt"} == {*SMALL, "verified.npy"}
    return folder


def copy(sound: Path, folder: Path) -> Path:
    """Copy a store."""
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def words(command: str, folder: Path) -> list[str]:
    """Return the arguments of a command for a store."""
    more = {"merge": ["--into", str(folder.parent / "m")], "export": [str(folder.parent / "x.npy")]}
    return [command, str(folder), *more.get(command, [])]


def damages(data: bytes) -> list[bytes]:
    """Return damaged versions of a file."""
    rng = np.random.default_rng(len(data))
    flipped = np.frombuffer(data, np.uint8).copy()
    flipped[rng.integers(len(data), size=20)] = 0xFF
    return [b"", data[: len(data) // 2], flipped.tobytes(), b"null", rng.bytes(len(data)), data[:-9] + b"\0\t\xe2]}"]


def test_a_truncated_npy_header_is_reported_as_damage(sound, tmp_path):
    path = copy(sound, tmp_path / "s") / "done.npy"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"}", b"(").replace(b"\n", b" "))
    with pytest.raises(InputError, match=r"done\.npy: missing or damaged"):
        DescriptorStore.open(path.parent)
    path.write_bytes(data[:-1])  # NumPy would append a zero
    with pytest.raises(InputError, match=r"done\.npy: missing or damaged"):
        DescriptorStore.open(path.parent)
    assert path.read_bytes() == data[:-1]


@pytest.mark.parametrize("name", [*SMALL, "shard-00000.npy"])
def test_a_damaged_file_is_named_by_every_command(sound, tmp_path, script, name):
    folder = copy(sound, tmp_path / "s")
    whole = (folder / name).read_bytes()
    runners = [script] * 5 + [command]
    for data, runner in zip(damages(whole), runners, strict=True):
        if name.startswith("shard") and runner is command:
            continue  # only checksums detect a changed number in a row
        (folder / name).write_bytes(data)
        # Starting a process takes seconds, so only one command per file runs in a process of its own.
        for subcommand in COMMANDS if runner is script else [COMMANDS[len(name) % 4]]:
            output = runner(*words(subcommand, folder), status=2)
            assert output.startswith("error: ")
            assert output.count("\n") == 1
            assert str(folder / name) in output
            assert "delete" in output or "remove" in output or "run the evaluation" in output
    assert {path.name for path in tmp_path.iterdir()} == {"s"}  # nothing was written
    (folder / name).write_bytes(whole)
    script(*words("verify", folder))


@pytest.mark.parametrize("name", ["manifest.json", "names.json", "done.npy", "shard-00000.npy"])
def test_a_missing_file_is_named(sound, tmp_path, name):
    folder = copy(sound, tmp_path / "s")
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name}.* missing|{name} is missing"):
        upkeep.open_validated(folder)
