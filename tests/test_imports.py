"""Imports go one way: a file imports only from folders below its own, and files never import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom. Folders of one layer may not import each other.
LAYERS = [
    {"cli"},
    {"search_page", "tuning"},
    {"evaluation"},
    {"training"},
    {"loggers"},
    {"config"},
    {"reporting"},
    {"reranking", "metrics"},
    {"retrieval"},
    {"download"},
    {"models"},
    {"toy"},
    {"data"},
    {"utils"},
    {"errors"},
]
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}


def module_name(path: Path) -> str:
    """Return the dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((ROOT / "superglobal").rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Return all modules that a file imports, including imports inside functions and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {member if member in MODULES else str(node.module) for member in members}
    return names


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def folder_of(module: str) -> str:
    """Return the folder of the package that a module is in; empty for the package itself."""
    return [*module.split("."), ""][1]


def test_a_file_imports_only_from_folders_below_its_own():
    # The public API imports from everywhere. Commands import the version from it.
    inside = [name for name in MODULES if name not in ("superglobal", "superglobal.__main__", "superglobal.api")]
    assert {folder_of(name) for name in inside} == LEVEL.keys()
    pairs = {(name, target) for name in inside for target in IMPORTS[name] & MODULES.keys()}
    violations = set()
    for name, target in pairs:
        folder, target_folder = folder_of(name), folder_of(target)
        if folder != target_folder and (LEVEL[folder] >= LEVEL[target_folder] if target_folder else folder != "cli"):
            violations.add((name, target))
    assert not violations


def test_files_do_not_import_each_other_in_a_circle():
    # Raises CycleError with the circle.
    graphlib.TopologicalSorter({name: targets & MODULES.keys() - {name} for name, targets in IMPORTS.items()}).prepare()


def test_the_core_imports_neither_lightning_nor_hydra():
    folders = ("models", "retrieval", "reranking", "metrics", "data", "reporting", "utils")
    core = [name for name in MODULES if folder_of(name) in folders and name != "superglobal.data.datamodules"]
    frameworks = ("pytorch_lightning", "lightning_fabric", "hydra", "wandb", "gradio")
    for name in core:
        assert not {target.split(".")[0] for target in IMPORTS[name]} & set(frameworks), name
    code = f"import sys; sys.modules.update(dict.fromkeys({frameworks})); import {', '.join(core)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_the_toy_data_command_imports_the_renderer():
    users = {name for name, targets in IMPORTS.items() if any(folder_of(t) == "toy" for t in targets & MODULES.keys())}
    assert {name for name in users if folder_of(name) != "toy"} == {"superglobal.cli.toy_data"}


WITHOUT_POSIX = f"""
import asyncio, multiprocessing, os, signal, subprocess, sys
from pathlib import Path
import cv2, filelock, huggingface_hub, hydra, PIL.Image, pytorch_lightning, timm, torch

sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"]))
multiprocessing.get_all_start_methods = lambda: ["spawn"]
for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGKILL", "SIGHUP", "SIGALRM"):
    delattr(signal, name)
for name in ("fork", "pread", "killpg", "setsid", "posix_fallocate", "sched_getaffinity"):
    delattr(os, name)

import {", ".join(name for name in MODULES if name != "superglobal.search_page.page")}  # The page imports gradio.

superglobal.data.datamodules.init_worker(0)
assert superglobal.data.datamodules.worker_start_method(2, 2) is None
assert len(list(superglobal.data.datamodules.ImageLoader(range(4)))) == 4
try:
    superglobal.data.prepare_gldv2._tar_files(Path("."), Path("."))
except superglobal.errors.InputError as error:
    print(error)
"""


def test_the_package_works_without_what_windows_lacks():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reading images from tar files needs Linux or macOS" in done.stdout


@pytest.mark.parametrize("module", ["superglobal", "superglobal.cli"])
def test_an_import_is_fast_and_portable(module):
    """Avoid libraries that take seconds to import and modules that are missing on some systems."""
    unwanted = ("torch", "numpy", "timm", "hydra", "pytorch_lightning", "matplotlib", "fcntl", "resource")
    code = f"import sys; old = set(sys.modules); import {module}; print(*set({unwanted}) & set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
