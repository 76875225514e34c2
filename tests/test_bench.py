"""Benchmarks write the rows of their table to a JSON file, with the machine, and report a wrong argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runs import environment

ROOT = Path(__file__).parents[1]


def bench(*words: object, status: int = 0) -> str:
    line = [sys.executable, str(ROOT / "scripts" / "bench.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)), timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_table_is_written_as_json_too(tmp_path):
    path = tmp_path / "search.json"
    small = ["search", "--dim", 16, "--repeats", 1, "--queries", 3]
    said = bench(*small, "--json", path, "--rows", 2000).splitlines()
    found = json.loads(path.read_text())
    assert found["format"] == "superglobal-benchmark-1"
    assert found["benchmark"] == "search"
    assert found["arguments"] == [*map(str, small[1:]), "--rows", "2000"]
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]
    assert len(found["rows"]) == len(said) - 1 > 1
    for row, line in zip(found["rows"], said[1:], strict=True):
        assert line.startswith(row["variant"])
        assert f"{row['seconds']:8.2f} s{row['ratio']:6.2f} x" in line
    said = bench(*small, "--rows", 300, status=2)
    assert said.splitlines()[-1].startswith("error: k=400: expected 1..300")
