"""Measure the time and the peak memory of one variant of a benchmark.

A variant is one of the functions that a benchmark compares. Each variant runs in a new process, so that the peak memory
of the process does not include other variants.
"""

from __future__ import annotations

import multiprocessing
import queue
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
"""Measurements of one variant, as a row of the benchmark's table: name -> value of a JSON type."""


def _status(key: str) -> float:
    """Return the current or the peak memory usage of this process in MB.

    Args:
        key: field of /proc/self/status: "VmRSS" for the current memory, "VmHWM" for the peak memory. On a system
            without /proc, the function returns the peak memory for both fields.
    """
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(make: Callable[[], Callable[[], Any]], repeats: int, answers: Any) -> None:
    """Measure a variant of a benchmark in this process.

    Args:
        make: function that creates the inputs of the variant, and returns a function that runs the variant once.
        repeats: number of runs.
        answers: queue for the result: the median seconds of a run, the peak memory in MB (excluding the inputs), and
            the value that the last run returned.
    """
    run = make()
    with suppress(OSError):  # On Linux, this resets VmHWM, so that the creation of the inputs does not count.
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    answers.put((statistics.median(seconds), _status("VmHWM") - before, result))


def measured(make: Callable[[], Callable[[], Any]], repeats: int) -> tuple[float, float, Any]:
    """Measure a variant of a benchmark in a new process.

    Args:
        make: function that creates the inputs of the variant, and returns a function that runs the variant once.
        repeats: number of runs.

    Returns:
        The median seconds of a run, the peak memory in MB (excluding the inputs), and the result of the last run.

    Raises:
        RuntimeError: the process ended without a result.
    """
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
