"""The code and the first commands of the README run."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
from documents import DOCUMENTS, ROOT, blocks, commands, text_of
from sets import texture, write_folders, write_revisited

import superglobal

README = text_of("README.md")


def test_the_first_example_finds_the_right_image(tmp_path):
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


def test_the_example_of_sharing_runs(tmp_path, monkeypatch):
    (code,) = (block.text for block in blocks(README, "python") if "save_pretrained" in block.text)
    monkeypatch.chdir(tmp_path)
    superglobal.save_pretrained(superglobal.load_model("random", backbone="test_resnet"), "shared")
    exec(compile(code, "README.md", "exec"), {})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    shell = [block.text for page in DOCUMENTS for block in blocks(text_of(page), "bash")]
    for target in re.findall(r"^make (\S+)", "\n".join(shell), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
