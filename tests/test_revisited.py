"""Loaders of the Revisited sets: ground truth from valid pickles only, evaluation sets and distractors."""

import functools
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from superglobal.data.distractors import load_distractors
from superglobal.data.evaluation_set import require_images
from superglobal.data.images import ImageItem
from superglobal.data.revisited import load_ground_truth, query_landmarks, revisited_set
from superglobal.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"


# The text of this small object has 2**100 brackets.
NESTED: Any = functools.reduce(lambda inner, _: [inner, inner], range(100), 0)


def truth(**first_query: Any) -> dict[str, Any]:
    """Return ground truth of two queries, with changes to the first one."""
    first = {"bbx": [1, 2.5, 30, 40], "easy": [0], "hard": [2, 1], "junk": []} | first_query
    second = {"bbx": [0, 0, 9, 9], "easy": [], "hard": [], "junk": [3]}
    return {"imlist": ["a_1", "b_2", "c_3", "d_4"], "qimlist": ["old_hall_000013", "gate"], "gnd": [first, second]}


def write(path: Path, data: Any, protocol: int = 4) -> Path:
    """Write data as a pickle and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(data, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "kind",
    [
        *(list, tuple, set, np.array),
        lambda ids: [np.int64(i) for i in ids],
        lambda ids: np.array(ids, dtype=">i2"),
        lambda ids: np.array(ids, dtype=float),
        lambda ids: np.array(ids, dtype=object),
    ],
)
def test_ids_are_read_from_any_plain_type(kind: Any, protocol: int, tmp_path: Path) -> None:
    data = truth(easy=kind([0]), hard=kind([1, 2]), junk=range(3, 4), bbx=np.array([1, 2.5, 30, 40]))
    data["imlist"] = np.array(data["imlist"])
    data["qimlist"] = np.array(data["qimlist"], dtype=object)
    loaded = load_ground_truth(write(tmp_path / "gnd_x.pkl", data, protocol))
    assert loaded.name == "x"
    assert loaded.imlist == ["a_1", "b_2", "c_3", "d_4"]
    assert loaded.qimlist == ["old_hall_000013", "gate"]
    first = loaded.gnd[0]
    assert first["bbx"] == (1.0, 2.5, 30.0, 40.0)
    for key, expected in {"easy": [0], "hard": [1, 2], "junk": [3]}.items():
        assert first[key].dtype == np.int64
        assert first[key].tolist() == expected
    assert loaded.gnd[1]["easy"].shape == (0,)


def test_the_order_of_ids_is_kept_and_boxes_may_be_missing(tmp_path: Path) -> None:
    data = truth()
    del data["gnd"][1]["bbx"]
    loaded = load_ground_truth(write(tmp_path / "gnd.pkl", data))
    assert loaded.gnd[0]["hard"].tolist() == [2, 1]
    assert loaded.gnd[1]["bbx"] is None


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    # The file has the form that Python 2 and NumPy 1 write: byte strings, numpy.core, raw array data as str.
    data = pickle.dumps(truth(easy=np.array([0, 3])), 2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "gnd.pkl").write_bytes(data)
    assert load_ground_truth(tmp_path / "gnd.pkl").gnd[0]["easy"].tolist() == [0, 3]
    python2 = b"(dS'imlist'\n(lS'a'\nasS'qimlist'\n(lS'q'\nasS'gnd'\n(l(dS'easy'\n"
    python2 += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    python2 += b"(I1\n(I1\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    python2 += b"S'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntbsS'hard'\n(lsS'junk'\nc__builtin__\nxrange\n(I0\ntRsas."
    (tmp_path / "gnd.pkl").write_bytes(python2)
    loaded = load_ground_truth(tmp_path / "gnd.pkl")
    assert loaded.imlist == ["a"]
    assert loaded.gnd[0]["easy"].tolist() == [0]


class Call:
    """Object whose pickle calls an arbitrary function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (lambda canary: Call(os.system, f"touch {canary}"), "system"),
        (lambda canary: Call(eval, f"open({str(canary)!r}, 'w')"), "eval"),
        (lambda canary: Call(open, str(canary), "w"), "open"),
        (lambda canary: np.array([Call(Path.touch, canary)], dtype=object), "getattr|Path"),
        (lambda canary: Call(np.save, str(canary), 1), "save"),
    ],
)
def test_malicious_pickles_run_no_code(attack: Any, named: str, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary.npy"
    path = write(tmp_path / "gnd_evil.pkl", truth(easy=attack(canary)), protocol)
    with pytest.raises(InputError, match=rf"gnd_evil\.pkl: .* contains code \([\w.]*({named})"):
        load_ground_truth(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())  # the attack works: an ordinary load runs it
    assert canary.exists()


def test_dotted_names_and_crafted_arrays_raise_errors(tmp_path: Path) -> None:
    path = tmp_path / "gnd.pkl"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x10dtype.__reduce__\x93.")
    with pytest.raises(InputError, match=r"numpy\.dtype\.__reduce__"):
        load_ground_truth(path)
    dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    path.write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nt"
        + dtype
        + b"I00\nS'AAAAAAAA'\ntb."  # an object array that contains eight raw bytes
    )
    with pytest.raises(InputError, match="array of type 'O8'"):
        load_ground_truth(path)
    path.write_bytes(b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"S'AAAAAAAA'\ntR.")
    with pytest.raises(InputError, match="array of type 'O8'"):
        load_ground_truth(path)


def test_pickles_that_need_much_memory_raise_errors(tmp_path: Path) -> None:
    empty = np.zeros((0, 3))
    bomb = pickle.dumps(truth(easy=empty), 4).replace(b"K\x00K\x03\x86", b"J\xff\xff\xff\x7fK\x00\x86")
    (tmp_path / "gnd_a.pkl").write_bytes(bomb)
    assert load_ground_truth(tmp_path / "gnd_a.pkl").gnd[0]["easy"].size == 0
    for kind in (set, frozenset):
        with pytest.raises(InputError, match="set of a range, expected a list"):
            load_ground_truth(write(tmp_path / "gnd_b.pkl", truth(easy=Call(kind, range(10**12)))))


def test_damaged_pickles_raise_errors(tmp_path: Path) -> None:
    whole = pickle.dumps(truth(easy=np.array([0])))
    path = tmp_path / "gnd.pkl"
    for data in [whole[:k] for k in range(0, len(whole), 7)] + [b"<html>404</html>", b"\x80\x09.", bytes(100)]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"gnd\.pkl"):
            load_ground_truth(path)
    with pytest.raises(InputError, match=r"not found: .*gone\.pkl"):
        load_ground_truth(tmp_path / "gone.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"easy": [4]}, r"query 0 \(old_hall_000013\), easy: index 4, expected 0 to 3"),
        ({"junk": [-1]}, r"junk: index -1, expected"),
        ({"hard": [0]}, r"hard: index 0 is also in easy"),
        ({"easy": [3, 3]}, r"easy: index 3 is also in easy"),
        ({"easy": [0.5]}, r"easy: 0\.5, expected an index"),
        ({"easy": [float("nan")]}, r"easy: nan, expected"),
        ({"easy": ["0"]}, r"easy: '0', expected"),
        ({"easy": range(10**12)}, r"easy: 1000000000000 indices, expected at most 4"),
        ({"easy": range(10**30)}, r"easy: \d+ indices, expected at most 4"),
        ({"easy": 3}, r"easy: int, expected a list"),
        ({"easy": {1, "a"}}, r"easy: 'a', expected"),
        ({"easy": [10**400]}, r"easy: index 1000.*\.\.\..*, expected 0 to 3"),
        ({"easy": [10**5000]}, r"easy: index int of too many digits, expected 0 to 3"),
        ({"bbx": [1, 2, 3, 10**400]}, r"bbx: .*expected four numbers"),
        ({"easy": [NESTED]}, r"easy: \[\[\[.*, expected an index"),
        ({"bbx": [NESTED] * 4}, r"bbx: .*expected four numbers"),
        ({"bbx": [1, 2, 3]}, r"query 0 \(old_hall_000013\), bbx: \[1, 2, 3\], expected four numbers"),
        ({"bbx": [1, 2, 3, float("inf")]}, r"bbx: .*expected four numbers"),
    ],
)
def test_contradictory_ground_truth_raises_errors(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"gnd_x\.pkl: .*{message}"):
        load_ground_truth(write(tmp_path / "gnd_x.pkl", truth(**change)))


def test_missing_fields_raise_errors(tmp_path: Path) -> None:
    for key in ("imlist", "qimlist", "gnd"):
        data = truth()
        del data[key]
        with pytest.raises(InputError, match=f"{key} is missing"):
            load_ground_truth(write(tmp_path / "gnd.pkl", data))
    data = truth()
    del data["gnd"][1]["hard"]
    with pytest.raises(InputError, match=r"query 1 \(gate\), hard is missing"):
        load_ground_truth(write(tmp_path / "gnd.pkl", data))
    with pytest.raises(InputError, match="gnd has 1 entries, expected 2"):
        load_ground_truth(write(tmp_path / "gnd.pkl", truth() | {"gnd": truth()["gnd"][:1]}))
    with pytest.raises(InputError, match="expected a dict"):
        load_ground_truth(write(tmp_path / "gnd.pkl", [1, 2]))


def test_revisited_set_lists_images_queries_and_landmarks(tmp_path: Path) -> None:
    data = truth()
    data["imlist"][1] = "b_2.png"
    write(tmp_path / "mine" / "gnd_mine.pkl", data)
    dataset = revisited_set(tmp_path, "mine")
    jpg = tmp_path / "mine" / "jpg"
    assert dataset.database[:2] == [ImageItem(jpg / "a_1.jpg"), ImageItem(jpg / "b_2.png")]
    assert dataset.queries[0] == ImageItem(jpg / "old_hall_000013.jpg", (1.0, 2.5, 30.0, 40.0))
    assert dataset.clusters == ["old_hall_000013", "gate"]
    assert (dataset.protocols, dataset.leave_one_out, dataset.name) == ("revisited", False, "mine")
    assert dataset.gnd is not None
    assert [item.box for item in revisited_set(tmp_path, "mine", crop_query=False).queries] == [None, None]
    data["imlist"][1] = "../../etc/passwd"
    write(tmp_path / "mine" / "gnd_mine.pkl", data)
    with pytest.raises(InputError, match="not a relative path"):
        revisited_set(tmp_path, "mine")


def test_queries_with_common_positives_have_the_same_landmark(tmp_path: Path) -> None:
    positives = [[0, 1, 2, 3], [9], [2, 3, 4, 5], [4, 5, 6, 7], [7, 8, 10, 11], []]
    gnd = [{"easy": ids[:1], "hard": ids[1:], "junk": []} for ids in positives]
    data = {"imlist": [f"i{i}" for i in range(12)], "qimlist": list("abcdef"), "gnd": gnd}
    landmarks = query_landmarks(load_ground_truth(write(tmp_path / "gnd_x.pkl", data)))
    assert landmarks == ["a", "b", "a", "a", "e", "f"]  # c joins a and d (2 of 6); e shares 1 of 7 with d


def test_missing_set_names_the_download_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gnd_roxford5k\.pkl(.|\n)*https://(.|\n)*superglobal download roxford5k"):
        revisited_set(tmp_path, "roxford5k")
    with pytest.raises(InputError, match=r"superglobal download rparis6k"):
        revisited_set(tmp_path, "rparis6k")
    with pytest.raises(InputError, match=r"mine is expected as .*mine/gnd_mine\.pkl"):
        revisited_set(tmp_path, "mine")


@pytest.mark.parametrize(("name", "database", "landmarks"), [("roxford5k", 4993, 12), ("rparis6k", 6322, 11)])
def test_the_official_ground_truth_is_read(name: str, database: int, landmarks: int) -> None:
    path = SHARED / "gnd" / f"gnd_{name}.pkl"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    loaded = load_ground_truth(path)
    assert (loaded.name, len(loaded.imlist), len(loaded.qimlist)) == (name, database, 70)
    assert len(set(query_landmarks(loaded))) == landmarks
    original = pickle.loads(path.read_bytes())  # the official file can be trusted
    for entry, raw in zip(loaded.gnd, original["gnd"], strict=True):
        assert entry["bbx"] == tuple(raw["bbx"])
        assert all(entry[key].tolist() == list(raw[key]) for key in ("easy", "hard", "junk"))


def test_the_real_images_are_complete() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} does not exist")
    dataset = revisited_set(SHARED, "roxford_mini")
    assert len(set(dataset.clusters or [])) == 12
    distractors = load_distractors(SHARED, "distractors_mini")
    sets = [("queries", dataset.queries, ""), ("database", dataset.database, ""), ("distractors", distractors, "")]
    checked = require_images(sets)
    counts = {title: len(report.signatures) for title, report in checked.items()}
    assert counts == dict(queries=70, database=775, distractors=154)


def test_distractors_are_read_from_their_list(tmp_path: Path) -> None:
    folder = tmp_path / "extra"
    folder.mkdir()
    (folder / "extra.txt").write_text("a b.JPG\n\n  sub/c.png  \r\nd\n", encoding="utf-8")
    names = ["a b.JPG", "sub/c.png", "d.jpg"]
    assert [item.path for item in load_distractors(tmp_path, "extra")] == [folder / "jpg" / n for n in names]
    for lines, message in [
        ("a.jpg\nb.jpg\na\n", r"a\.jpg is listed twice"),
        ("/etc/passwd\n", "not a relative path"),
        ("x/../../y.jpg\n", "not a relative path"),
        ("\n\n", "extra.txt: empty"),
    ]:
        (folder / "extra.txt").write_text(lines)
        with pytest.raises(InputError, match=message):
            load_distractors(tmp_path, "extra")
    (folder / "extra.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_distractors(tmp_path, "extra")
    with pytest.raises(InputError, match=r"revisitop1m\.txt(.|\n)*superglobal download revisitop1m"):
        load_distractors(tmp_path, "revisitop1m")


def test_one_message_lists_all_missing_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG")
    good, cut = tmp_path / "good.jpg", tmp_path / "cut.jpg"
    good.write_bytes(buffer.getvalue())
    cut.write_bytes(buffer.getvalue()[:-4])
    items = [ImageItem(tmp_path / f"gone_{i}.jpg") for i in range(7)] + [ImageItem(good), ImageItem(cut)]
    sets = [("database", items, "had from HERE"), ("queries", [ImageItem(cut)], "had from HERE")]
    sets.append(("distractors", [ImageItem(good)], "NOT SHOWN"))
    with pytest.raises(InputError) as error:
        require_images(sets, also=["weights not found: w.pth"])
    text = str(error.value)
    assert "database: 7 of 9 images missing, 1 corrupt" in text
    assert "queries: 0 of 1 images missing, 1 corrupt" in text
    assert f"{cut}: truncated JPEG" in text
    assert text.count("gone_") == 5
    assert "and 3 more" in text
    assert text.count("had from HERE") == 1
    assert "NOT SHOWN" not in text
    assert text.endswith("weights not found: w.pth")
    with pytest.raises(InputError, match="weights"):
        require_images([("queries", [ImageItem(good)], "")], also=["weights not found"])
    checked = require_images([("queries", [ImageItem(good)], ""), ("database", [ImageItem(good)] * 2, "")])
    assert checked["database"].signatures == checked["queries"].signatures * 2


def test_a_set_whose_elements_cannot_be_sorted_raises_an_error(tmp_path):
    path = tmp_path / "gnd_x.pkl"
    path.write_bytes(pickle.dumps({"imlist": {(1,), ("a",)}, "qimlist": [], "gnd": []}))
    with pytest.raises(InputError, match="imlist: a set whose elements cannot be sorted"):
        load_ground_truth(path)
