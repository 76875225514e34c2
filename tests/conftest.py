"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from sets import write_distractors, write_revisited

from superglobal.toy.make import make_toy

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(DATA))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images and ground truth, which only continuous integration has."""
    if not SHARED.is_dir():
        pytest.skip(f"real images are missing ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def cvnet_checkpoint(tmp_path_factory):
    """Return a function depth -> path of a synthetic checkpoint in the CVNet file format."""
    from synth_ckpt import synth_state

    folder = tmp_path_factory.mktemp("cvnet")

    def make(depth: int) -> Path:
        path = folder / f"r{depth}.pyth"
        if not path.exists():
            manifest = json.loads((DATA / f"manifest_cvnet_r{depth}.json").read_text())
            torch.save({"epoch": 0, "model_state": synth_state(manifest, 7)}, path)
        return path

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write a `paths.data` with the set "mini" in the Revisited layout and the distractors "noise"."""
    root = tmp_path_factory.mktemp("data")
    write_revisited(root)
    write_distractors(root)
    return root


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory, worker_id) -> Path:
    """Render a `paths.data` with the toy set "tiny" (seed 3) in `toy/`, once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "toy_data"
    with FileLock(f"{root}.lock"):
        make_toy(root / "toy", "tiny", seed=3)
    return root


# Continuous integration has everything that tests can need, except for the real images on a public server.
MAX_SKIPPED_IN_CI = 0


def pytest_sessionfinish(session, exitstatus):
    """Fail in continuous integration if a test was skipped: it would pass with the feature broken."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or not os.environ.get("CI"):
        return
    skipped = sum(SHARED.is_dir() or str(SHARED) not in str(r.longrepr) for r in reporter.stats.get("skipped", []))
    if skipped > MAX_SKIPPED_IN_CI:
        reporter.write_line(f"{skipped} tests skipped, at most {MAX_SKIPPED_IN_CI} allowed", red=True)
        session.exitstatus = 1
