"""Folders of images: the files that are read, their labels, and errors for invalid folders."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from superglobal.data.evaluation_set import drop_unreadable, notes_of
from superglobal.data.folder import folder_set, labeled_images
from superglobal.data.image_checks import check_images
from superglobal.data.images import read_image
from superglobal.errors import InputError, did_you_mean
from superglobal.reporting.runs import read_results


def fill(root: Path, *names: str) -> Path:
    """Write small images with these names."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        formats = {".jpeg": "JPEG", ".jpg": "JPEG", ".tif": "TIFF"}
        suffix = Path(name).suffix.lower()
        Image.new("RGB", (9, 8), (len(name), 2, 3)).save(root / name, formats.get(suffix))
    return root


def names(items: list[Any], root: Path) -> list[str]:
    """Return the paths of items relative to `root`."""
    return [item.path.relative_to(root).as_posix() for item in items]


def entry(gnd: list[dict[str, Any]] | None, i: int) -> tuple[list[int], list[int]]:
    """Return the positive and junk ids of a query."""
    assert gnd is not None
    assert gnd[i]["positive"].dtype == gnd[i]["junk"].dtype == "int64"
    return gnd[i]["positive"].tolist(), gnd[i]["junk"].tolist()


def test_a_folder_without_labels_lists_all_images_below_it(tmp_path: Path) -> None:
    photos = ["B.JPG", "a/z.jpeg", "a b/é 寺.Png", "c.webp", "d.bmp", "e/f/g.tif", "e.gif"]
    root = fill(tmp_path / "db", *photos, ".hidden.jpg", ".cache/x.jpg")
    (root / "notes.txt").write_text("not a photo")
    (root / "jpg").mkdir()
    query = fill(tmp_path / "queries", "q.png", "sub/p.jpg")
    dataset = folder_set(root, query)
    assert names(dataset.database, root) == sorted(photos)
    assert names(dataset.queries, query) == ["q.png", "sub/p.jpg"]
    assert (dataset.gnd, dataset.clusters, dataset.protocols, dataset.leave_one_out) == (None, None, "none", False)
    assert (dataset.name, dataset.root) == ("folder", root)
    assert check_images(dataset.database).problems == []
    assert all(read_image(item.path).shape == (8, 9, 3) for item in dataset.database)
    single = folder_set(str(root), str(query / "q.png"), name="mine")
    assert names(single.queries, query) == ["q.png"]
    assert single.name == "mine"


def test_labels_without_a_query_folder_mean_leave_one_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "tower/1.jpg", "bridge/deep/2.jpg", "tower/0.jpg", "lone/x.jpg", "bridge/1.jpg")
    dataset = folder_set(root, labels=True)
    order = ["bridge/1.jpg", "bridge/deep/2.jpg", "lone/x.jpg", "tower/0.jpg", "tower/1.jpg"]
    assert names(dataset.database, root) == order
    assert dataset.queries == dataset.database
    assert dataset.leave_one_out
    assert dataset.protocols == "labels"
    assert dataset.clusters == ["bridge", "bridge", "lone", "tower", "tower"]
    assert [entry(dataset.gnd, i) for i in range(5)] == [([1], [0]), ([0], [1]), ([], [2]), ([4], [3]), ([3], [4])]


def test_labels_define_the_positives_of_queries(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "tower/1.jpg", "bridge/2.jpg", "tower/0.jpg")
    query = fill(tmp_path / "queries", "tower/q.jpg", "elsewhere/q.jpg")
    dataset = folder_set(root, query, labels=True)
    assert dataset.clusters == ["elsewhere", "tower"]
    assert not dataset.leave_one_out
    assert [entry(dataset.gnd, i) for i in range(2)] == [([], []), ([1, 2], [])]
    with pytest.raises(InputError, match="no query has another image of its label"):
        folder_set(root, fill(tmp_path / "other", "castle/q.jpg"), labels=True)


def test_queries_inside_the_database_are_junk_for_themselves(tmp_path: Path) -> None:
    photos = ["bridge/1.jpg", "queries/tower/q.jpg", "tower/1.jpg"]
    root = fill(tmp_path / "db", *photos)
    assert names(folder_set(root, root / "queries").database, root) == photos
    dataset = folder_set(root, root / "queries", labels=True)
    assert entry(dataset.gnd, 0) == ([2], [1])


def test_other_names_of_a_query_are_junk(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    for link in ("a/z.jpg", "b/z.jpg"):
        (root / link).symlink_to(root / "a" / "1.jpg")
    dataset = folder_set(root, labels=True)
    assert names(dataset.database, root) == ["a/1.jpg", "a/2.jpg", "a/z.jpg", "b/1.jpg", "b/z.jpg"]
    expected = [([1], [0, 2, 4]), ([0, 2], [1]), ([1], [0, 2, 4]), ([4], [3]), ([3], [0, 2, 4])]
    assert [entry(dataset.gnd, i) for i in range(5)] == expected


def test_links_are_followed_once(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", "1.jpg")
    root = fill(tmp_path / "db", "0.jpg")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    assert names(folder_set(root, outside).database, root) == ["0.jpg", "linked/1.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_a_folder_that_cannot_be_listed_raises_an_error(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "0.jpg")
    # Tests may run as root, who can list every folder, but not a folder whose path is too long.
    folder, path = os.open(root, os.O_RDONLY), str(root)
    while len(path) < 4200:
        os.mkdir("n" * 200, dir_fd=folder)
        folder = os.open("n" * 200, os.O_RDONLY, dir_fd=folder)
        path += "/" + "n" * 200
    with pytest.raises(InputError, match=r"the folder cannot be listed \(File name too long\)"):
        folder_set(root, root / "0.jpg")
    with pytest.raises(InputError, match="the folder cannot be listed"):
        read_results(root)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "closed").symlink_to("n" * 300)
    with pytest.raises(InputError, match=r"linked/closed: the folder cannot be listed"):
        folder_set(fill(tmp_path / "linked", "0.jpg"), root / "0.jpg")


def test_invalid_folders_raise_input_errors(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "a/1.jpg", "a/2.jpg", "stray.jpg")
    with pytest.raises(InputError, match=r"dataset\.query .*dataset\.labels=true"):
        folder_set(root)
    with pytest.raises(InputError, match=r"stray\.jpg has no label"):
        folder_set(root, labels=True)
    with pytest.raises(InputError, match=r"database folder not found: .*nowhere"):
        folder_set(tmp_path / "nowhere", root)
    with pytest.raises(InputError, match=r"database .*stray\.jpg is not a folder; set dataset\.database to a folder"):
        folder_set(root / "stray.jpg", root)
    with pytest.raises(InputError, match=r"query folder not found: .*; set dataset\.query to an image or a folder"):
        folder_set(root, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"^query file not found: .*/stry\.jpg; did you mean stray\.jpg\?$"):
        folder_set(root, root / "stry.jpg")
    with pytest.raises(InputError, match=r"^database folder not found: .*/dbb/a; did you mean db\?$"):
        folder_set(tmp_path / "dbb" / "a", root)
    with pytest.raises(InputError, match="database folder not found"):
        folder_set(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"^database folder not found: .*stray\.jpg/sub; set dataset\.database"):
        folder_set(root / "stray.jpg" / "sub", root)
    with pytest.raises(InputError, match=r"^query folder not found: .*stray\.jpg/sub; set dataset\.query"):
        folder_set(root, root / "stray.jpg" / "sub")
    with pytest.raises(InputError, match="query file not found"):
        folder_set(root, root / f"{'x' * 300}.jpg")
    with pytest.raises(InputError, match="is a file and has no label"):
        folder_set(root, root / "stray.jpg", labels=True)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no images under database folder .*jpg jpeg png webp bmp tif tiff gif"):
        folder_set(tmp_path / "empty", root)
    with pytest.raises(InputError, match=r"all images under .* have the label a, so every result would be right"):
        folder_set(fill(tmp_path / "one", "a/1.jpg", "a/2.jpg"), labels=True)
    with pytest.raises(InputError, match="no query has another image"):
        folder_set(fill(tmp_path / "single", "a/1.jpg", "b/1.jpg"), labels=True)


def test_training_images_are_labeled_by_folders_or_by_a_csv_file(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", "b/2.jpg", "a é/deep/1.png", "b/.hidden.jpg")
    assert labeled_images(root) == (["a é/deep/1.png", "b/2.jpg"], ["a é", "b"])
    table = tmp_path / "labels.csv"
    table.write_text("label,note,path\ntower,x,photos/b/2.jpg\n\n bridge ,,photos/c.jpg\n", encoding="utf-8-sig")
    assert labeled_images(table) == (["photos/b/2.jpg", "photos/c.jpg"], ["tower", "bridge"])
    table.write_text("path,label\n1.jpg,K\u00f6ln\n2.jpg,Ko\u0308ln\n", encoding="utf-8")
    assert labeled_images(table)[1] == ["K\u00f6ln", "K\u00f6ln"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected path,label and one row per image"),
        ("path,label\n", "0 rows; expected path,label"),
        ("file,label\na.jpg,x\n", "columns file, label and 1 rows"),
        ("path,label\na.jpg\n", "row 'a.jpg': expected a path and a label"),
        ("path,label\na.jpg,x\na.jpg,y\n", "a.jpg is listed twice"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", "a.jpg is listed twice"),
        ("path,label\na\0.jpg,x\n", "expected a path and a label"),
        ("path,label\n\udce9.jpg,x\n", "cannot be read"),
    ],
)
def test_an_invalid_csv_file_of_labels_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        labeled_images(table)
    assert str(table) in str(caught.value)


def test_training_images_without_a_label_are_an_error(tmp_path: Path) -> None:
    root = fill(tmp_path / "photos", "a/1.jpg", "stray.jpg")
    with pytest.raises(InputError, match=r"stray\.jpg has no label.*columns path,label and set data\.root"):
        labeled_images(root)
    with pytest.raises(InputError, match=r"training folder not found: .*nowhere; set data\.root"):
        labeled_images(tmp_path / "nowhere")


def test_hidden_and_system_folders_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = ["a/1.jpg", "lost/2.jpg"]
    hidden = ["a/._1.jpg", "a/@EADIR/1.jpg", "__MACOSX/a/1.jpg", "@Recycle/1.jpg", "$Recycle.Bin/1.jpg"]
    root = fill(tmp_path, *kept, *hidden, ".thumbnails/1.jpg", ".thumbnails/2.jpg")
    (root / ".DS_Store").touch()
    with caplog.at_level("INFO"):
        assert names(folder_set(root, root / "a/1.jpg").database, root) == kept
    assert caplog.messages == [f"{root}: hidden images and system folders that are left out: 6, such as $Recycle.Bin"]


def test_labels_that_may_be_misspelled_are_named(tmp_path: Path) -> None:
    composed, decomposed = "K\u00f6ln", "Ko\u0308ln"
    photos = [f"{composed}/1.jpg", f"{decomposed}/2.jpg", "tower/1.jpg", "tower/2.jpg", "Tower/3.jpg", "lone/4.jpg"]
    dataset = folder_set(fill(tmp_path / "db", *photos), labels=True)
    assert dataset.clusters is not None
    assert dataset.clusters.count(composed) == 2
    positives = {path: entry(dataset.gnd, i)[0] for i, path in enumerate(names(dataset.queries, tmp_path / "db"))}
    assert [len(positives[path]) for path in photos] == [1, 1, 1, 1, 0, 0]
    assert notes_of(dataset) == [
        f"label {composed}: names that differ only in the Unicode form of a letter count as one label",
        "labels Tower and tower differ only by case and count as different labels; rename one if they are the same",
        "queries without a score, because no other image has their label: 2, such as Tower/3.jpg, lone/4.jpg",
    ]
    (tmp_path / "db" / "lone").rename(tmp_path / "db" / "\x1b[31mlone")
    assert notes_of(folder_set(tmp_path / "db", labels=True))[-1].endswith(r"such as \x1b[31mlone/4.jpg, Tower/3.jpg")
    queries = fill(tmp_path / "queries", "towr/1.jpg", f"{decomposed}/1.jpg")
    assert "labels of queries that the database lacks: 1, such as towr; did you mean Tower or tower?" in notes_of(
        folder_set(tmp_path / "db", queries, labels=True)
    )


def test_unreadable_images_are_removed_with_their_queries_and_ground_truth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = ["a/0.jpg", "a/1.jpg", "a/2.jpg", "b/0.jpg", "b/1.jpg"]
    root = fill(tmp_path / "db", *photos)
    (root / "a/1.jpg").write_bytes(b"")
    dataset = drop_unreadable(folder_set(root, labels=True))
    assert names(dataset.database, root) == names(dataset.queries, root) == [photos[i] for i in (0, 2, 3, 4)]
    assert dataset.clusters == ["a", "a", "b", "b"]
    assert [entry(dataset.gnd, i) for i in range(4)] == [([1], [0]), ([0], [1]), ([3], [2]), ([2], [3])]
    assert dataset.unreadable == [(root / "a/1.jpg", "empty file (0 bytes)")]
    assert f"{root}: images that cannot be read and are left out: 1\n  {root}/a/1.jpg: empty" in caplog.text
    without_labels = drop_unreadable(folder_set(root, root / "b"))
    assert (len(without_labels.database), len(without_labels.queries), without_labels.gnd) == (4, 2, None)
    # A query of which nothing is left, and a folder most of which is unreadable, are errors.
    with pytest.raises(InputError, match=r"^queries: 0 of 1 images missing, 1 corrupt\n  .*a/1.jpg: empty"):
        drop_unreadable(folder_set(root, root / "a/1.jpg"))
    (root / "b/1.jpg").unlink()
    (root / "b/1.jpg").symlink_to("nowhere.jpg")
    (root / "a/2.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="database: 1 of 5 images missing, 2 corrupt"):
        drop_unreadable(folder_set(root, labels=True))


def test_labels_without_the_unreadable_images_are_checked_too(tmp_path: Path) -> None:
    root = fill(tmp_path / "one", "a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg")
    (root / "b/1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"have the label a \(1 unreadable images were left out\), so every result"):
        drop_unreadable(folder_set(root, labels=True))
    root = fill(tmp_path / "lone", "a/1.jpg", "a/2.jpg", "b/1.jpg", "c/1.jpg")
    (root / "a/2.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"no query has another image .*1 unreadable"):
        drop_unreadable(folder_set(root, labels=True))


def test_names_of_large_folders_are_compared_quickly() -> None:
    many = [f"IMG_{i:05}.jpg" for i in range(50_000)]
    start = time.monotonic()
    assert did_you_mean("holidy.jpg", [*many, "holiday.jpg"]) == "; did you mean holiday.jpg?"
    assert time.monotonic() - start < 2
