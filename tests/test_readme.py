"""The README is true: its commands are commands, its code runs, its picture of the code is the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from sets import texture, write_folders, write_revisited

from superglobal.checks import validated
from superglobal.config import CompareConfig, DemoConfig, EvalConfig, TrainConfig, TuneConfig, register

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(start: str) -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith(start)]


@pytest.mark.parametrize(
    ("script", "schema", "least"),
    [
        ("eval", EvalConfig, 8),
        ("train", TrainConfig, 3),
        ("scripts/tune_pooling", TuneConfig, 2),
        ("scripts/compare_rerankers", CompareConfig, 2),
        ("scripts/demo", DemoConfig, 3),
    ],
)
def test_every_command_is_a_valid_configuration(script, schema, least):
    found = commands(f"python {script}.py")
    assert len(found) >= least
    register()
    for command in found:
        overrides = [o for o in shlex.split(command)[2:] if o != "-m"]
        plain = [re.sub(r"=glob\(\*\)$", "=gem", o if o.endswith("]") else o.split(",")[0]) for o in overrides]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose(script.split("_")[0].split("/")[-1], overrides=plain)
        # A store alone says what the rest is: tests/test_page_search.py.
        if not isinstance(cfg.get("store"), str):
            validated(cfg, schema)


def test_the_first_example_finds_the_right_photo(tmp_path):
    write_folders(tmp_path / "photos", landmarks=4)
    texture(2, 7).save(tmp_path / "query.jpg")
    first = commands("python eval.py")[0]
    assert "dataset=folder" in first
    for name in ("photos", "query.jpg"):
        first = first.replace(name, str(tmp_path / name))
    command = [sys.executable, *shlex.split(first)[1:], f"paths.outputs={tmp_path}", "logger=csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranked = next(tmp_path.rglob("rankings.csv")).read_text().splitlines()
    assert "label2/" in ranked[1]


def test_the_python_example_runs(tmp_path, cvnet_checkpoint, monkeypatch):
    (code,) = (b for b in blocks("python") if "load_model" in b and "revisited_map" in b)
    folder = write_revisited(tmp_path, "roxford5k", landmarks=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tmp_path)
    (tmp_path / "CVPR2022_CVNet_R50.pyth").symlink_to(cvnet_checkpoint(50))
    assert folder.is_dir()
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert set(names["result"].map) == {"easy", "medium", "hard"}
    assert np.allclose(np.linalg.norm(names["X"], axis=1), 1, atol=1e-5)


def test_how_it_is_built_names_every_file_of_the_package():
    section = README.split("## How it is built")[1].split("\n## ")[0]
    package = {p.name for p in (ROOT / "superglobal").rglob("*.py")}
    named = set(re.findall(r"(\w+\.py)", section))
    assert package <= named
    assert named <= package | {p.name for p in (*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py"))}
    for folder in (p.name for p in (ROOT / "conf").iterdir() if p.is_dir()):
        assert f"{folder}/" in section, folder


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "install"])
def test_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_nothing_is_left_to_be_filled_in():
    assert "@@" not in README
