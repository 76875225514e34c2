"""Your own photos: what is found, how it is labelled, what is refused."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from superglobal.data.folder import folder_set
from superglobal.data.image_checks import check_images
from superglobal.data.images import read_image
from superglobal.errors import InputError


def fill(root: Path, *names: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        formats = {".jpeg": "JPEG", ".jpg": "JPEG", ".tif": "TIFF"}
        suffix = Path(name).suffix.lower()
        Image.new("RGB", (9, 8), (len(name), 2, 3)).save(root / name, formats.get(suffix))
    return root


def names(items: list[Any], root: Path) -> list[str]:
    return [item.path.relative_to(root).as_posix() for item in items]


def entry(gnd: list[dict[str, Any]] | None, i: int) -> tuple[list[int], list[int]]:
    assert gnd is not None
    assert gnd[i]["positive"].dtype == gnd[i]["junk"].dtype == "int64"
    return gnd[i]["positive"].tolist(), gnd[i]["junk"].tolist()


def test_unlabelled(tmp_path: Path) -> None:
    photos = ["B.JPG", "a/z.jpeg", "a b/é 寺.Png", "c.webp", "d.bmp", "e/f/g.tif", "e.gif"]
    root = fill(tmp_path / "db", *photos, ".hidden.jpg", ".cache/x.jpg")
    (root / "notes.txt").write_text("not a photo")
    (root / "jpg").mkdir()
    query = fill(tmp_path / "queries", "q.png", "sub/p.jpg")
    found = folder_set(root, query)
    assert names(found.database, root) == sorted(photos)
    assert names(found.queries, query) == ["q.png", "sub/p.jpg"]
    assert (found.gnd, found.clusters, found.protocols, found.leave_one_out) == (None, None, "none", False)
    assert (found.name, found.root) == ("folder", root)
    assert check_images(found.database).problems == []
    assert all(read_image(item.path).shape == (8, 9, 3) for item in found.database)
    single = folder_set(str(root), str(query / "q.png"), name="mine")
    assert names(single.queries, query) == ["q.png"]
    assert single.name == "mine"


def test_leave_one_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "tower/1.jpg", "bridge/deep/2.jpg", "tower/0.jpg", "lone/x.jpg", "bridge/1.jpg")
    found = folder_set(root, labels=True)
    order = ["bridge/1.jpg", "bridge/deep/2.jpg", "lone/x.jpg", "tower/0.jpg", "tower/1.jpg"]
    assert names(found.database, root) == order
    assert found.queries == found.database
    assert found.leave_one_out
    assert found.protocols == "labels"
    assert found.clusters == ["bridge", "bridge", "lone", "tower", "tower"]
    assert [entry(found.gnd, i) for i in range(5)] == [([1], [0]), ([0], [1]), ([], [2]), ([4], [3]), ([3], [4])]


def test_labelled_queries(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "tower/1.jpg", "bridge/2.jpg", "tower/0.jpg")
    query = fill(tmp_path / "queries", "tower/q.jpg", "elsewhere/q.jpg")
    found = folder_set(root, query, labels=True)
    assert found.clusters == ["elsewhere", "tower"]
    assert not found.leave_one_out
    assert [entry(found.gnd, i) for i in range(2)] == [([], []), ([1, 2], [])]
    with pytest.raises(InputError, match="no query has another image of its label"):
        folder_set(root, fill(tmp_path / "other", "castle/q.jpg"), labels=True)


def test_query_inside_the_database(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "queries/tower/q.jpg", "tower/1.jpg")
    assert names(folder_set(root, root / "queries").database, root) == ["queries/tower/q.jpg", "tower/1.jpg"]
    found = folder_set(root, root / "queries", labels=True)
    assert entry(found.gnd, 0) == ([1], [0])


def test_links_are_followed_once(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", "1.jpg")
    root = fill(tmp_path / "db", "0.jpg")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    assert names(folder_set(root, outside).database, root) == ["0.jpg", "linked/1.jpg"]


def test_refusals(tmp_path: Path) -> None:
    root = fill(tmp_path / "db", "a/1.jpg", "a/2.jpg", "stray.jpg")
    with pytest.raises(InputError, match=r"dataset\.query .*dataset\.labels=true"):
        folder_set(root)
    with pytest.raises(InputError, match=r"stray\.jpg has no label"):
        folder_set(root, labels=True)
    with pytest.raises(InputError, match=r"database folder not found: .*nowhere"):
        folder_set(tmp_path / "nowhere", root)
    with pytest.raises(InputError, match="database folder not found"):
        folder_set(root / "stray.jpg", root)
    with pytest.raises(InputError, match="query folder not found"):
        folder_set(root, tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file and has no label"):
        folder_set(root, root / "stray.jpg", labels=True)
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no images under database folder .*jpg jpeg png webp bmp tif tiff gif"):
        folder_set(tmp_path / "empty", root)
    with pytest.raises(InputError, match="no query has another image"):
        folder_set(fill(tmp_path / "single", "a/1.jpg", "b/1.jpg"), labels=True)
