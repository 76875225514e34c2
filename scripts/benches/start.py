"""Compare the time that commands need to start with the time to import torch."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benches.common import Measured

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "eval.py --help": ["eval.py", "--help"],
    "superglobal store --help": ["-m", "superglobal", "store", "--help"],
    "imports of an evaluation": ["-c", "import superglobal.evaluation.pipeline"],
}


def seconds(words: list[str]) -> tuple[float, float]:
    """Run the Python interpreter once with arguments `words`; return the elapsed and the processor time in seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def main(argv: list[str]) -> list[Measured]:
    """Measure the start-up time of each command, print the medians, and return one row per command.

    The commands take turns, so that changes in the load of the machine affect all of them.
    """
    parser = argparse.ArgumentParser("bench.py start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="number of calls of each command")
    repeats = parser.parse_args(argv).repeats
    times = {name: [] for name in COMMANDS}
    for words in COMMANDS.values():
        seconds(words)  # reads the files into the page cache, so that the measured runs do not wait for the disk
    for _ in range(repeats):
        for name, words in COMMANDS.items():
            times[name].append(seconds(words))
    base = statistics.median(cpu for _, cpu in times["import torch"])
    rows: list[Measured] = []
    for name, values in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name:32}{wall:7.2f} s{cpu:7.2f} s of CPU{cpu / base:7.2f} x")
        rows.append({"command": name, "seconds": wall, "cpu_seconds": cpu, "ratio": cpu / base})
    return rows
