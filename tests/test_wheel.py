"""An installed wheel works without a checkout, from any folder.

This does not prove that the declared dependencies are complete or resolvable, nor anything about other versions of
Python or other systems: the packages are those of the environment that runs the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from superglobal.config import conf_dir

ROOT = Path(__file__).parents[1]


def run(*words: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("WANDB")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a source distribution, which is built from a copy of the checkout's files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("superglobal", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, archive, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory) -> Path:
    """The command of a new environment that sees this one's packages, but not the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file gives the packages of a folder, and leaves its own .pth files (editable installations) out.
    (packages / "base.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", wheel, cwd=environment)
    where = run(python, "-c", "import superglobal; print(superglobal.__file__)", cwd=environment)
    assert Path(where.strip()).is_relative_to(packages)
    return environment / "bin" / "superglobal"


def test_a_wheel_has_the_files_of_the_package_and_the_configurations(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path for path in (ROOT / "superglobal").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    wanted = {f"superglobal/{path.relative_to(ROOT / 'superglobal').as_posix()}" for path in package}
    wanted |= {f"superglobal/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert files == wanted


def test_a_checkout_uses_its_own_configurations():
    assert conf_dir() == ROOT / "conf"


def test_the_installed_command_renders_and_evaluates(program, tmp_path):
    run(program, "toy-data", "--size", "tiny", cwd=tmp_path)
    options = tmp_path / "options" / "pooling"
    options.mkdir(parents=True)
    (options / "mean.yaml").write_text("gem_plus: false\nregional: false\nscale: false\nrelup: 'off'\np: 1.0\n")
    words = [
        "--config-dir",
        "options",
        "dataset=toy",
        "pooling=mean",
        "backbone=test_resnet",
        "weights=random",
        "scales=1",
    ]
    words += ["logger=csv", "trainer.accelerator=cpu", "trainer.num_workers=0"]
    text = run(program, "evaluate", "-m", *words, "rerank=none,superglobal", cwd=tmp_path)
    results = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("outputs/eval/sweep/*/*/results.json")
    }
    assert len(results) == 2
    for name, result in results.items():
        assert result["config"]["pooling"]["p"] == 1
        assert set(result["metrics"]) == ({"search"} if "rerank=none" in name else {"search", "rerank"})
        assert all(0 < value < 1 for value in result["metrics"]["search"]["map"].values())
    assert "toy: 12 queries, 56 images" in text


def test_the_installed_command_trains_in_two_processes(program, toy_data, tmp_path):
    """Lightning starts the second process with the same command line."""
    words = ["experiment=quickstart", "data.image_size=64", "validation.fraction=0.25", "validation.sets=[]", "dim=32"]
    words += [
        "optim.epochs=1",
        "optim.batch_size=12",
        f"paths.data={toy_data}",
        "logger=csv",
        "trainer.accelerator=cpu",
    ]
    words += ["trainer.num_workers=0", "trainer.devices=2", "trainer.strategy=ddp"]
    text = run(program, "train", *words, cwd=tmp_path)
    assert (tmp_path / "outputs" / "train" / "quickstart" / "best.safetensors").is_file(), text
