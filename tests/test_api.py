"""The public names of the package: documented, and imported on first use only."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from runs import environment

import superglobal

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """Run code in a new interpreter and return its output."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_no_dependency():
    packages = {"torch", "numpy", "timm", "torchvision", "huggingface_hub", "PIL", "cv2"}
    imported = set(python("import sys, superglobal; print(superglobal.__version__, *sys.modules)").split())
    assert superglobal.__version__ in imported
    assert not packages & imported
    assert "superglobal.api" not in imported


def test_public_names_import_without_lightning_and_hydra():
    missing = ["pytorch_lightning", "lightning", "hydra", "omegaconf", "wandb"]
    block = f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
    names = set(python(f"{block}from superglobal import *\nprint(*dir())").split())
    assert {"load_model", "extract", "search", "rerank", "GeM", "ArcFace"} <= set(superglobal.__all__) <= names


def test_every_public_name_is_listed_and_documented():
    for name in superglobal.__all__:
        value = getattr(superglobal, name)
        assert value.__name__ == name
        assert value.__module__.startswith("superglobal.")
        assert value.__doc__, name
        assert name in dir(superglobal)


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="load_modle"):
        superglobal.load_modle  # noqa: B018
    with pytest.raises(ImportError, match="load_modle"):
        exec("from superglobal import load_modle")


def test_the_version_is_that_of_the_installed_package():
    assert superglobal.__version__ == metadata.version("superglobal")
