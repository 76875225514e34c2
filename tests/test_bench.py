"""Benchmarks write the rows of their table to a JSON file, with the machine, and report a wrong argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runs import environment

ROOT = Path(__file__).parents[1]


def bench(*words: object, status: int = 0) -> str:
    """Run scripts/bench.py, which must exit with `status`, and return its output."""
    line = [sys.executable, str(ROOT / "scripts" / "bench.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)), timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rows_of_the_table_are_also_written_to_json(tmp_path):
    path = tmp_path / "search.json"
    small = ["search", "--dim", 16, "--repeats", 1, "--queries", 3]
    output = bench(*small, "--json", path, "--rows", 2000).splitlines()
    report = json.loads(path.read_text())
    assert report["format"] == "superglobal-benchmark-1"
    assert report["benchmark"] == "search"
    assert report["arguments"] == [*map(str, small[1:]), "--rows", "2000"]
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert len(report["rows"]) == len(output) - 1 > 1
    for row, line in zip(report["rows"], output[1:], strict=True):
        assert line.startswith(row["variant"])
        assert f"{row['seconds']:8.2f} s{row['ratio']:6.2f} x" in line
    output = bench(*small, "--rows", 300, status=2)
    assert output.splitlines()[-1].startswith("error: k=400: expected 1..300")
