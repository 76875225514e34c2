"""The GPU report: every section runs on a CPU at a reduced size, and failures become rows of the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_sections.common import Report, Skip  # noqa: E402

SECTIONS = ["correctness", "extraction", "training", "search", "processes"]
# Rows that are skipped on a CPU.
ON_A_GPU = {
    "out-of-memory halving",
    "time per operation",
    "GPU decoder",
    "Trainer, compiled",
    "variants of the plain loop",
}


def run(out: Path, *words: object, status: int = 0) -> str:
    """Run scripts/gpu_report.py, which must exit with `status`, and return its output."""
    line = [sys.executable, str(ROOT / "scripts" / "gpu_report.py"), "--out", str(out), *map(str, words)]
    done = subprocess.run(line, cwd=out.parent, capture_output=True, text=True, timeout=580)
    assert done.returncode == status, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    output = run(tmp_path / "report", "--device", "cpu", "--size", "tiny", "--minutes", 9)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["format"] == "superglobal-gpu-report-1"
    assert list(report["seconds"]) == SECTIONS
    rows = report["rows"]
    assert {row["section"] for row in rows} == set(SECTIONS)
    skipped = {row["name"] for row in rows if row["status"] == "skipped"}
    assert skipped - {"FAISS"} == ON_A_GPU
    checks = [row for row in rows if row["status"] == "passed"]
    assert len(checks) >= 15
    assert all(row["expected"] for row in checks)
    assert all(row["value"] is not None and row["unit"] for row in rows if row["status"] == "measured")
    assert "expected a positive number" in run(tmp_path / "other", "--device", "cpu", "--minutes", -1, status=2)
    assert "without a report" in run(tmp_path / "report", "--device", "cpu", status=2)
    page = (tmp_path / "report" / "report.md").read_text()
    assert [line[4:].lower() for line in page.splitlines() if line.startswith("### ")] == [*SECTIONS, "plan"]
    assert f"{len(checks)} passed" in output.splitlines()[-1]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_the_report_without_a_gpu_suggests_device_cpu(tmp_path):
    assert "nvidia-smi finds no GPU; use --device cpu" in run(tmp_path / "report", status=2)
    assert not (tmp_path / "report").exists()


def test_a_section_that_times_out_becomes_a_row(tmp_path):
    words = ["--device", "cpu", "--minutes", 0.01, "--sections", "correctness", "processes"]
    run(tmp_path / "report", *words)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert {row["section"] for row in rows if row["status"] == "timeout"} == {"correctness", "processes"}


def test_an_interrupted_report_keeps_its_rows_and_ends_its_processes(tmp_path):
    line = [sys.executable, str(ROOT / "scripts" / "gpu_report.py"), "--device", "cpu", "--sections", "correctness"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as output:
        process = subprocess.Popen([*line, "--out", str(tmp_path / "report")], stdout=output, stderr=output, env=env)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("gpu_report_*/data/toy")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "log").read_text()
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert rows[-1]["status"] == "interrupted"
    assert not list(tmp_path.glob("gpu_report_*"))
    assert "Traceback" not in (tmp_path / "log").read_text()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            assert f"TMPDIR={tmp_path}".encode() not in path.read_bytes().split(b"\0"), path


def report_of(tmp_path, seconds: float) -> Report:
    """Return a report with a time limit in seconds."""
    return Report("search", tmp_path / "rows.jsonl", "cpu", "small", time.monotonic() + seconds, tmp_path)


def test_an_exception_and_a_skip_become_rows(tmp_path):
    report = report_of(tmp_path, 100)

    def fails() -> None:
        raise ValueError("no such thing")

    def skips() -> None:
        raise Skip("no FAISS")

    assert report.run("fails", fails) is None
    assert report.run("skips", skips) is None
    assert report.run("late", lambda: 3, need=200) is None
    assert report.run("runs", lambda: 3) == 3
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    summary = [(row["name"], row["status"], row["note"]) for row in rows]
    assert summary[:2] == [("fails", "failed", "ValueError: no such thing"), ("skips", "skipped", "no FAISS")]
    assert summary[2][:2] == ("late", "skipped")
    assert len(summary) == 3
