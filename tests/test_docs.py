"""The documentation is correct: its code runs, and its commands, settings, messages and links exist."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import is_dataclass
from inspect import isfunction, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
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
from superglobal.data.evaluation_set import _LOADERS
from superglobal.data.folder import folder_set
from superglobal.evaluation.pipeline import evaluate
from superglobal.models.weights import read_weights
from superglobal.reranking.base import RERANKERS
from superglobal.training.train import train

PAGES = [document for document in DOCUMENTS if document != "README.md"]
EXTENDING, OWN_IMAGES = "docs/contributing/extending.md", "docs/start/own_images.md"
TUNING = "docs/guides/whitening_and_tuning.md"
# The additions of EXTENDING that other tests run, in processes of their own, because they change the settings.
ADDITIONS = {"rerank.kind=density", "rerank=density", "dataset=places"}
QUIET = ["logger=csv", "trainer=cpu", "trainer.num_workers=0", "trainer.progress=false", "figures.queries=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cvnet_checkpoint) -> Path:
    """Write what the pages assume.

    Images by folder, a query, Revisited sets, weights of CVNet, a shared model, images with a list of judgments.
    """
    root = tmp_path_factory.mktemp("docs")
    write_folders(root / "photos", landmarks=10, views=4)
    (root / "photos" / "label0" / "0.jpg").unlink()
    texture(0, 0).save(root / "photos" / "label0" / "0.png")
    texture(2, 7).save(root / "query.jpg")
    write_revisited(root / "data")
    write_revisited(root / "data", "roxford5k", landmarks=2)
    (root / "data" / "cvnet").mkdir()
    for link in (root / "data" / "cvnet", root):
        (link / "CVPR2022_CVNet_R50.pyth").symlink_to(cvnet_checkpoint(50))
    superglobal.save_pretrained(superglobal.load_model("random", backbone="test_resnet"), root / "shared")
    for group, text in {"pooling": "gem_plus: false\n", "rerank": "kind: superglobal\nK: 5\n"}.items():
        tuned = root / "outputs/tune/demo/conf" / group / "demo_tuned.yaml"  # as tuning writes it
        tuned.parent.mkdir(parents=True)
        tuned.write_text(text)
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
def namespaces(folder) -> dict[str, dict[str, Any]]:
    """Run the code of each page in `folder` and return the names that it defines."""
    namespaces: dict[str, dict[str, Any]] = {}
    rerankers, loaders = dict(RERANKERS), dict(_LOADERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for page in PAGES:
            namespaces[page] = {"__name__": "__main__"}
            for block in (*blocks(text_of(page), "yaml"), *blocks(text_of(page), "python")):
                if block.file:
                    Path(block.file).parent.mkdir(parents=True, exist_ok=True)
                    Path(block.file).write_text(block.text)
                elif block.language == "python":
                    code = compile(block.text, page, "exec")
                    if not block.needs:
                        exec(code, namespaces[page])
    # What the pages register must not reach other tests of this process.
    for registry, before in ((RERANKERS, rerankers), (_LOADERS, loaders)):
        for name in set(registry) - set(before):
            del registry[name]
    return namespaces


def command_of(page: str, *words: str) -> list[str]:
    """Return the one command of a page that contains all these words."""
    (command,) = [c for c in commands(text_of(page)) if set(words) <= set(c)]
    return command


def test_the_code_of_the_pages_runs(namespaces):
    assert {page for page, names in namespaces.items() if len(names) > 2} >= {
        EXTENDING,
        OWN_IMAGES,
        TUNING,
        "docs/background/protocol.md",
    }
    own, tuning = namespaces[OWN_IMAGES], namespaces[TUNING]
    assert own["data"].database[own["ids"][0, 0]].path.parent.name == "label2"
    assert tuning["best"] in tuning["ap"]


def test_the_example_of_sharing_loads_what_it_saved(namespaces):
    saved, loaded = (namespaces["docs/guides/sharing.md"][name].state_dict() for name in ("model", "again"))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_commands_are_found():
    line = "`OMP_NUM_THREADS=1 python\nscripts/bench.py heads` `python` `eval.py` `superglobal share a b`"
    assert commands(line) == [["scripts/bench.py", "heads"], ["superglobal share", "a", "b"]]
    assert commands("```bash\nOMP_NUM_THREADS=1 superglobal toy-data  # note\n```") == [["superglobal toy-data"]]


def test_commands_of_every_program_are_found():
    """Without this, the next test would pass if no command were recognized."""
    programs = [words[0] for document in DOCUMENTS for words in commands(text_of(document))]
    assert {program.removeprefix("superglobal ") for program in programs} >= COMMANDS.keys() - {"evaluate", "train"}
    assert programs.count("eval.py") > 50
    assert programs.count("train.py") > 15


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_accepted(document, folder, namespaces, monkeypatch):
    text = text_of(document)
    named = re.findall(r"`superglobal ([a-z][a-z0-9-]*)`", text)
    assert set(named) <= set(COMMANDS)
    for words in commands(text):
        if ADDITIONS & set(words):
            continue
        if words[0] in CONFIGURED:
            composed(words, folder)
        else:
            require_arguments(words, monkeypatch)


def test_own_photos_are_trained_on_and_searched(folder, namespaces, monkeypatch):
    monkeypatch.chdir(folder)
    words = command_of(OWN_IMAGES, "train.py", "data=folder")
    less = ["optim.epochs=1", "optim.batch_size=8", "data.image_size=64", *QUIET[:-1]]
    score = train(composed([*words, *less], folder), folder / "outputs" / "train" / "finetune_photos")
    assert score > 0.5
    words = command_of(OWN_IMAGES, "eval.py", "weights=outputs/train/finetune_photos/best.safetensors")
    (folder / "new_photos").symlink_to(folder / "photos")
    assert evaluate(composed([*words, *QUIET], folder), folder / "outputs" / "eval" / "trained") > 0.5
    result = json.loads(Path("outputs/eval/trained/results.json").read_text())
    assert result["weights"].endswith("finetune_photos/best.safetensors")


def test_the_whitening_layer_alone_is_trained(folder, namespaces, monkeypatch):
    monkeypatch.chdir(folder)
    words = command_of(TUNING, "train.py", "experiment=finetune_whitening")
    less = ["optim.epochs=1", "data.image_size=96", *QUIET[:-1]]
    train(composed([*words, *less], folder), folder / "outputs" / "train" / "whitening")
    before, after = (
        read_weights(f).state for f in ("whitened.safetensors", "outputs/train/whitening/best.safetensors")
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert "whitening.weight" in changed
    assert not [name for name in changed if name.startswith("backbone")]


def test_own_options_and_own_descriptors_are_evaluated(folder, namespaces, monkeypatch):
    monkeypatch.chdir(folder)
    spoc = command_of(EXTENDING, "eval.py", "pooling=spoc")
    stores = ["scales=1", "store.dtype=float32", "paths.stores=spoc/stores"]
    evaluate(composed([*spoc, *QUIET, *stores], folder), folder / "spoc")
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
    own = command_of(EXTENDING, "eval.py", "descriptors.query=Q.npy")
    score = evaluate(composed([*own, *QUIET], folder), folder / "own")
    Q, X, data = np.load("Q.npy"), np.load("X.npy"), superglobal.revisited_set("data", "mini")
    ids = superglobal.rerank(Q, X, superglobal.search(Q, X, k=len(X))[1])[1]
    assert score == pytest.approx(superglobal.revisited_map(Q, X, data, ids).map["medium"])


def test_a_registered_network_is_evaluated(folder, namespaces):
    words = ["backbone=timm", "backbone.name=my_net", "weights=random", "dataset=folder", *QUIET]
    words += [
        f"dataset.database={folder / 'photos'}",
        f"dataset.query={folder / 'query.jpg'}",
        f"paths.outputs={folder}",
    ]
    assert words[0] in command_of(EXTENDING, "my_eval.py")
    command = [sys.executable, str(folder / "my_eval.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("eval/folder/*/rankings.csv"))


def test_a_new_kind_of_data_set_is_evaluated(folder, namespaces):
    (command,) = [words for words in commands(text_of(EXTENDING)) if "dataset=places" in words]
    code = "import my_dataset; from superglobal.cli.hydra_commands import evaluate; evaluate()"

    def run(*words: str) -> str:
        program = [sys.executable, "-c", code, *words]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*command[1:], *QUIET, "dataset.listing=images.csv")
    (path,) = folder.glob("outputs/eval/places/*/results.json")
    result = json.loads(path.read_text())
    assert result["config"]["dataset"]["kind"] == "csv"
    assert set(result["metrics"]["search"]["map"]) == {"all"}
    assert "dataset.listing" in run("--help")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for path, anchor in links(document):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def names_in(schema: Any, start: str = "") -> set[str]:
    """Return the dotted names of the settings of a schema."""
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
