"""The documentation is true: its code runs, its commands are commands, its settings, messages and links are there."""

from __future__ import annotations

import ast
import csv
import re
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from inspect import isfunction, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from documents import (
    CONFIGURED,
    DOCUMENTS,
    ROOT,
    anchors,
    blocks,
    commands,
    composed,
    links,
    require_arguments,
    text_of,
)
from sets import texture, write_folders, write_revisited

import superglobal
from superglobal import cli
from superglobal.cli import COMMANDS
from superglobal.data.folder import folder_set
from superglobal.evaluation.pipeline import evaluate
from superglobal.models.weights import read_weights
from superglobal.training.train import train

PAGES = [document for document in DOCUMENTS if document != "README.md"]
QUIET = ["logger=csv", "trainer=cpu", "trainer.num_workers=0", "trainer.progress=false", "figures.queries=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the pages say is there: photos by place, a query, a Revisited set, pictures with a list of judgements."""
    root = tmp_path_factory.mktemp("place")
    write_folders(root / "photos", landmarks=10, views=4)
    (root / "photos" / "label0" / "0.jpg").unlink()
    texture(0, 0).save(root / "photos" / "label0" / "0.png")
    texture(2, 7).save(root / "query.jpg")
    write_revisited(root / "data")
    for option in ("pooling/gem", "rerank/superglobal"):  # what a tuning writes
        tuned = root / "outputs/tune/quickstart/conf" / Path(option).parent / "quickstart_tuned.yaml"
        tuned.parent.mkdir(parents=True)
        shutil.copy(ROOT / "conf" / f"{option}.yaml", tuned)
    (root / "pictures").mkdir()
    with (root / "judged.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "x1", "y1", "x2", "y2", "image", "relevance"])
        for landmark in range(3):
            for view, relevance in enumerate(["query", "easy", "easy", "hard", "junk"]):
                texture(landmark, view).save(root / "pictures" / f"{landmark}_{view}.jpg")
                if view:
                    rows.writerow([f"{landmark}_0.jpg", 5, 5, 100, 90, f"{landmark}_{view}.jpg", relevance])
    return root


@pytest.fixture(scope="module")
def ran(place) -> dict[str, dict[str, Any]]:
    """Names that the code of each page made, run in `place`; its files are written there."""
    found: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        for page in PAGES:
            found[page] = {"__name__": "__main__"}
            for block in (*blocks(text_of(page), "yaml"), *blocks(text_of(page), "python")):
                if block.file:
                    Path(block.file).parent.mkdir(parents=True, exist_ok=True)
                    Path(block.file).write_text(block.text)
                elif block.language == "python":
                    code = compile(block.text, page, "exec")
                    if not block.needs:
                        exec(code, found[page])
    return found


def in_place(place: Path, page: str, *words: str) -> list[str]:
    """The one command of a page that has all these words."""
    (found,) = [c for c in commands(text_of(page)) if set(words) <= set(c)]
    return found


def test_the_code_of_the_pages_runs(ran):
    assert {page for page, names in ran.items() if len(names) > 2} >= {
        "docs/cookbook.md",
        "docs/evaluation.md",
        "docs/own_photos.md",
    }
    own, cookbook = ran["docs/own_photos.md"], ran["docs/cookbook.md"]
    assert own["data"].database[own["ids"][0, 0]].path.parent.name == "label2"
    assert cookbook["best"] in cookbook["ap"]


def test_commands_are_found():
    line = "`OMP_NUM_THREADS=1 python\nscripts/bench.py heads` `python` `eval.py` `superglobal share a b`"
    assert commands(line) == [["scripts/bench.py", "heads"], ["superglobal share", "a", "b"]]
    assert commands("```bash\nOMP_NUM_THREADS=1 superglobal toy-data  # note\n```") == [["superglobal toy-data"]]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_accepted(document, place, ran, monkeypatch):
    text = text_of(document)
    named = re.findall(r"`superglobal ([a-z][a-z0-9-]*)`", text)
    assert set(named) <= set(COMMANDS)
    for words in commands(text):
        if words[0] in CONFIGURED:
            composed(words, place)
        else:
            require_arguments(words, monkeypatch)


def test_photos_brought_into_the_layout_are_trained_on(place, ran, monkeypatch):
    monkeypatch.chdir(place)
    images = {link.stem: link.resolve() for link in Path("data/mine/train").rglob("*.jpg")}
    assert set(images.values()) == {path for path in (place / "photos").rglob("*") if path.is_file()}
    with Path("data/mine/train_clean.csv").open() as file:
        places = [{images[image].parent.name for image in row["images"].split()} for row in csv.DictReader(file)]
    assert sorted(places, key=str) == sorted(({f"label{i}"} for i in range(10)), key=str)
    words = in_place(place, "docs/own_photos.md", "train.py", "name=mine")
    less = ["optim.epochs=1", "optim.batch_size=8", "data.image_size=64", *QUIET[:-1]]
    train(composed([*words, *less], place), place / "outputs" / "train" / "mine")
    about = read_weights("outputs/train/mine/best.safetensors")
    assert about.backbone == "tf_efficientnet_lite0"


def test_the_whitening_layer_alone_is_trained(place, ran, monkeypatch):
    monkeypatch.chdir(place)
    words = in_place(place, "docs/cookbook.md", "train.py", "experiment=finetune_whitening")
    less = ["optim.epochs=1", "data.image_size=96", *QUIET[:-1]]
    train(composed([*words, *less], place), place / "outputs" / "train" / "whitening")
    before, after = (
        read_weights(f).state for f in ("whitened.safetensors", "outputs/train/whitening/best.safetensors")
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert "whitening.weight" in changed
    assert not [name for name in changed if name.startswith("backbone")]


def test_own_options_and_own_descriptors_are_evaluated(place, ran, monkeypatch):
    monkeypatch.chdir(place)
    spoc = in_place(place, "docs/cookbook.md", "eval.py", "pooling=spoc")
    stores = ["scales=1", "store.dtype=float32", "paths.stores=spoc/stores"]
    evaluate(composed([*spoc, *QUIET, *stores], place), place / "spoc")
    (store,) = Path("spoc/stores").glob("*database*")
    assert cli.main(["store", "export", str(store), "spoc.npy"]) == 0
    pooling = {"gem_plus": False, "regional": False, "scale": False, "relup": "off"}
    items = folder_set("photos", labels=True).database
    mean, gem = (
        superglobal.extract(
            superglobal.load_model("package", backbone="efficientnet_lite0", pooling=pooling | {"p": p}, scales=1),
            items,
            max_side=1024,
        )
        for p in (1.0, 3.0)
    )
    np.testing.assert_allclose(np.load("spoc.npy"), mean, atol=1e-5)
    assert not np.allclose(gem, mean, atol=1e-2)
    own = in_place(place, "docs/cookbook.md", "eval.py", "descriptors.query=Q.npy")
    score = evaluate(composed([*own, *QUIET], place), place / "own")
    Q, X, data = np.load("Q.npy"), np.load("X.npy"), superglobal.revisited_set("data", "mini")
    ids = superglobal.rerank(Q, X, superglobal.search(Q, X, k=len(X))[1])[1]
    assert score == pytest.approx(superglobal.revisited_map(Q, X, data, ids).map["medium"])


def test_a_registered_network_is_evaluated(place, ran):
    words = ["backbone=timm", "backbone.name=my_net", "weights=random", "dataset=folder", *QUIET]
    words += [f"dataset.database={place / 'photos'}", f"dataset.query={place / 'query.jpg'}", f"paths.outputs={place}"]
    assert words[0] in in_place(place, "docs/cookbook.md", "my_eval.py")
    command = [sys.executable, str(place / "my_eval.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(place.glob("eval/folder/*/rankings.csv"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for path, anchor in links(document):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    assert {path for path, _ in links("README.md")} >= set(PAGES)


def names_in(schema: Any, start: str = "") -> set[str]:
    """Dotted names of a schema's settings."""
    found = set()
    for name, hint in get_type_hints(schema).items():
        inner = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        found |= {start + name} | (names_in(inner, f"{start}{name}.") if inner else set())
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_of_the_pages_exists(page):
    known = set().union(*(names_in(schema) for _, schema in CONFIGURED.values()))
    known |= {name.rpartition(".")[2] for name in known}
    known |= {group.name for group in (ROOT / "conf").iterdir() if group.is_dir()}
    for function in filter(isfunction, (getattr(superglobal, name) for name in superglobal.__all__)):
        known |= set(signature(function).parameters)
    named = re.findall(r"`\+?([a-z_]+(?:\.\w+)*)=[^`(]*`", text_of(page))
    assert set(named) <= known | {"ap"}, set(named) - known


def templates() -> list[str]:
    """All texts of the code but its docstrings, what is filled in left as NUL."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"

    files = [*(ROOT / "superglobal").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in docstrings]
    return [text(node) for node in texts]


def test_every_message_of_the_errors_page_is_in_the_code():
    quoted = re.findall(r"^\| `(.+?)` \|", text_of("docs/errors.md"), re.M)
    assert len(quoted) > 80
    texts = templates()
    for message in quoted:
        fixed = re.split(r"<[^>]+>", message)
        assert sum(map(len, fixed)) >= 10, message
        wanted = re.compile(".*".join(re.escape(part) for part in fixed), re.DOTALL)
        assert any(wanted.search(one) for one in texts if fixed[0] in one), message
