"""The README is short, and its code and its first command run; so do the examples that the pages have from it."""

from __future__ import annotations

import re
import subprocess
import sys

from documents import DOCUMENTS, ROOT, blocks, commands, text_of
from sets import texture, write_folders, write_revisited

README = text_of("README.md")


def test_it_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12_000
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / image).stat().st_size < 300_000


def test_the_first_example_finds_the_right_image(tmp_path):
    write_folders(tmp_path / "photos", landmarks=4)
    texture(2, 7).save(tmp_path / "query.jpg")
    first = next(words for words in commands(README, inline=False) if words[0] == "eval.py")
    assert "dataset.database=photos" in first
    placed = [re.sub(r"^(dataset\.\w+)=", rf"\1={tmp_path}/", word) for word in first]
    command = [sys.executable, *placed, f"paths.outputs={tmp_path}", "logger=csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranked = next(tmp_path.rglob("rankings.csv")).read_text().splitlines()
    assert "label2/" in ranked[1]


def test_the_python_example_runs(tmp_path, cvnet_checkpoint, monkeypatch):
    (block,) = blocks(README, "python")
    write_revisited(tmp_path / "data", "roxford5k", landmarks=2)
    (tmp_path / "data" / "cvnet").mkdir()
    (tmp_path / "data" / "cvnet" / "CVPR2022_CVNet_R50.pyth").symlink_to(cvnet_checkpoint(50))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block.text, "README.md", "exec"), names)
    assert set(names["result"].map) == {"easy", "medium", "hard"}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    shell = [block.text for page in DOCUMENTS for block in blocks(text_of(page), "bash")]
    for target in re.findall(r"^make (\S+)", "\n".join(shell), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
