"""The README is true: its commands are commands, its code runs, its picture of the code is the code."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from documents import ROOT, blocks, commands, composed, text_of
from sets import texture, write_folders, write_revisited

import superglobal
from superglobal.data.catalogue import SOURCE_NAMES, select_sources

README = text_of("README.md")


@pytest.mark.parametrize(
    ("script", "least"),
    [
        ("eval.py", 8),
        ("train.py", 3),
        ("scripts/tune_pooling.py", 2),
        ("scripts/compare_rerankers.py", 2),
        ("scripts/demo.py", 3),
    ],
)
def test_every_command_is_a_valid_configuration(script, least):
    found = [words for words in commands(README, inline=False) if words[0] == script]
    assert len(found) >= least
    for words in found:
        composed(words)


def test_every_download_command_names_what_there_is():
    parser = runpy.run_path(str(ROOT / "scripts" / "download.py"))["parser"]()
    found = [parser.parse_args(words[1:]) for words in commands(README) if words[0] == "scripts/download.py"]
    assert len(found) >= 5
    assert all(args.list or select_sources(args.names) for args in found)
    mentioned = re.findall(r"download\.py ((?:[a-z0-9]+(?:-[a-z]+)? ?)+)", README.replace("\n   ", " "))
    assert len(mentioned) >= 8
    assert {name for names in mentioned for name in names.split()} <= set(SOURCE_NAMES)


def test_the_commands_for_pictures_are_parsed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import visualize

    found = [words[1:] for words in commands(README, inline=False) if words[0] == "scripts/visualize.py"]
    assert len(found) >= 4
    for words in found:
        parsed = visualize.parser().parse_args(words)
        assert str(parsed.folder) == "FOLDER"
        assert set(parsed.kinds) <= set(visualize.KINDS), words
    assert ["scripts/report.py", "FOLDER", "--baseline", "OTHER"] in commands(README, inline=False)
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 400_000, picture


def test_the_first_example_finds_the_right_photo(tmp_path):
    write_folders(tmp_path / "photos", landmarks=4)
    texture(2, 7).save(tmp_path / "query.jpg")
    first = next(words for words in commands(README, inline=False) if words[0] == "eval.py")
    assert "dataset=folder" in first
    placed = [re.sub(r"=(photos|query\.jpg)$", rf"={tmp_path}/\1", word) for word in first]
    command = [sys.executable, *placed, f"paths.outputs={tmp_path}", "logger=csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranked = next(tmp_path.rglob("rankings.csv")).read_text().splitlines()
    assert "label2/" in ranked[1]


def test_the_python_example_runs(tmp_path, cvnet_checkpoint, monkeypatch):
    texts = [block.text for block in blocks(README, "python")]
    (code,) = (text for text in texts if "load_model" in text and "revisited_map" in text)
    folder = write_revisited(tmp_path, "roxford5k", landmarks=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tmp_path)
    (tmp_path / "CVPR2022_CVNet_R50.pyth").symlink_to(cvnet_checkpoint(50))
    assert folder.is_dir()
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert set(names["result"].map) == {"easy", "medium", "hard"}
    (rivals,) = (text for text in texts if "kreciprocal" in text)
    exec(compile(rivals, "README.md", "exec"), names)
    assert sorted(names["ids"][0]) == list(range(len(names["X"])))
    assert np.allclose(np.linalg.norm(names["X"], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("script", ["scripts/share.py", "scripts/export.py", "examples/vectordb.py"])
def test_every_command_of_a_script_is_one_that_it_takes(script):
    found = [words[1:] for words in commands(README, inline=False) if words[0] == script]
    assert found
    parser = runpy.run_path(str(ROOT / script))["_parser"]()
    for words in found:
        parser.parse_args(words)


def test_the_example_of_sharing_runs(tmp_path, monkeypatch):
    (code,) = (block.text for block in blocks(README, "python") if "save_pretrained" in block.text)
    monkeypatch.chdir(tmp_path)
    superglobal.save_pretrained(superglobal.load_model("random", backbone="test_resnet"), "shared")
    exec(compile(code, "README.md", "exec"), {})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def test_how_it_is_built_names_every_file_of_the_package():
    section = README.split("## How it is built")[1].split("\n## ")[0]
    package = {p.name for p in (ROOT / "superglobal").rglob("*.py")}
    named = set(re.findall(r"(\w+\.py)", section))
    assert package <= named
    programs = {p.name for place in (".", "scripts", "examples") for p in (ROOT / place).glob("*.py")}
    assert named <= package | programs
    assert programs - {p.name for p in ROOT.glob("*.py")} <= named
    for folder in (p.name for p in (ROOT / "conf").iterdir() if p.is_dir()):
        assert f"{folder}/" in section, folder


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "install"])
def test_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_nothing_is_left_to_be_filled_in():
    assert "@@" not in README
