"""Measure each variant of a benchmark in its own process, so that the peak memory is that of one variant."""

from __future__ import annotations

import multiprocessing
import queue
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

Measured = dict[str, Any]
"""A row of the table of a benchmark, in JSON types."""


def _status(key: str) -> float:
    """Return a value of /proc/self/status in MB, e.g. VmRSS. Without /proc, return the peak of the process so far."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(make: Callable[[], Callable[[], Any]], repeats: int, answers: Any) -> None:
    """Build the inputs, run `repeats` times, and send (median seconds, MB in addition to the inputs, last result)."""
    run = make()
    before = _status("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    answers.put((statistics.median(seconds), _status("VmHWM") - before, result))


def measured(make: Callable[[], Callable[[], Any]], repeats: int) -> tuple[float, float, Any]:
    """Run `_measure` in a new process and return its result."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_measure, args=(make, repeats, answers))
    process.start()
    while True:
        try:
            answer = answers.get(timeout=1)
            break
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError(
                    f"the benchmark process ended with exit status {process.exitcode}, possibly out of memory"
                ) from None
    process.join()
    return answer
