"""An installed wheel works without a checkout, from any folder.

The packages are those of the environment that runs the tests, so the tests do not show that the declared dependencies
are complete or resolvable, or that other versions of Python or other systems work.
"""

from __future__ import annotations

import json
import os
import re
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
    """Run a command and return its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("WANDB")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build a wheel from a source distribution of a copy of the checkout."""
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
    """Install the wheel into a new environment that uses the packages of this one, and return its command."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file adds the packages of a folder, but not those of its own .pth files (editable installs).
    (packages / "base.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", wheel, cwd=environment)
    location = run(python, "-c", "import superglobal; print(superglobal.__file__)", cwd=environment)
    assert Path(location.strip()).is_relative_to(packages)
    return environment / "bin" / "superglobal"


def test_a_wheel_contains_the_package_and_the_configurations(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path for path in (ROOT / "superglobal").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {f"superglobal/{path.relative_to(ROOT / 'superglobal').as_posix()}" for path in package}
    expected |= {f"superglobal/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert files == expected


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
    assert re.search(r"toy: 12 queries( \(.*\))?, 56 images", text)


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
