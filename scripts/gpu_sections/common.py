"""Provide the code that all sections of the GPU report share.

It writes the rows of the report, measures times, runs programs in the background, and generates images.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
T = TypeVar("T")
Program = subprocess.Popen[str]

# Width, height and number of images of the most common sizes in ROxford5k and RParis6k (9,335 of 11,315 images).
REVISITED_SIZES = (
    (1024, 768, 4390),
    (768, 1024, 2601),
    (1024, 683, 706),
    (683, 1024, 386),
    (1024, 681, 371),
    (681, 1024, 177),
    (1024, 682, 176),
    (680, 1024, 109),
    (1024, 680, 68),
    (682, 1024, 98),
    (1024, 766, 63),
    (1024, 685, 57),
    (691, 1024, 44),
    (1024, 684, 44),
    (766, 1024, 15),
    (1024, 769, 15),
    (771, 1024, 15),
)


class Skip(Exception):
    """Error that is raised if a measurement is not possible on this machine. The message gives the reason."""


class OutOfTime(Exception):
    """Error for a measurement that ran longer than its time limit."""


@dataclass
class Row:
    """One line of the report.

    Attributes:
        section: name of the section.
        name: description of the measurement.
        status: "measured", "passed", "failed", "timeout", "skipped" or "interrupted".
        value: result of the measurement; None if there is none.
        unit: unit of the result.
        ratio: result divided by that of the baseline; None if there is no baseline.
        baseline: name of the baseline.
        expected: for a check, the condition that the result must meet, as text.
        predicted: gain that was predicted before the measurement, as text.
        note: additional information, such as the error message of a failed row.
    """

    section: str
    name: str
    status: str
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    baseline: str = ""
    expected: str = ""
    predicted: str = ""
    note: str = ""


class Report:
    """Writer for the rows of one section of the report.

    Each row is written to the file at once, so that the rows of a section are kept if its process is killed.

    Args:
        section: name of the section.
        path: file in JSON Lines format to which the rows are appended.
        device: device to check, "cuda" or "cpu".
        size: size of the inputs, "full", "small" or "tiny".
        deadline: value of `time.monotonic()` at which the section must end.
        work: temporary folder for images, descriptor stores and training runs.
    """

    def __init__(self, section: str, path: Path, device: str, size: str, deadline: float, work: Path) -> None:
        self.section, self.path, self.size, self.deadline, self.work = section, path, size, deadline, work
        self.device = torch.device(device)
        self.cuda = device == "cuda"

    def current(self) -> str:
        """Return the name of the row that is being measured. It is the name in the latest call of `run`."""
        return self._current.read_text() if self._current.exists() else "start of the section"

    @property
    def _current(self) -> Path:
        return self.work / f"{self.section}.current"

    def pick(self, full: T, small: T, tiny: T) -> T:
        """Return `full`, `small` or `tiny`: the argument whose name is the input size of this report."""
        return {"full": full, "small": small, "tiny": tiny}[self.size]

    def left(self) -> float:
        """Return the number of seconds until the deadline of the section."""
        return self.deadline - time.monotonic()

    def add(
        self, name: str, value: float | None = None, unit: str = "", *, passed: bool | None = None, **more: Any
    ) -> None:
        """Write one row to the file, and print it.

        Args:
            name: name of the row.
            value: result of the measurement; None if there is none.
            unit: unit of the result.
            passed: for a check, True if it passed and False if it failed; None for a measurement.
            **more: more fields of `Row`, by name.
        """
        status = more.pop("status", {None: "measured", True: "passed", False: "failed"}[passed])
        row = Row(self.section, name, status, None if value is None else float(value), unit, **more)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"[{self.section}] {format_row(row)}", flush=True)

    def run(self, name: str, function: Callable[[], T], need: float = 0) -> T | None:
        """Call a function that makes measurements and adds rows to the report.

        If the function fails, or is skipped because too little time is left, a row that gives the reason is added.

        Args:
            name: name of the row that is added if the function fails or is skipped.
            function: function to call.
            need: number of seconds that the function is expected to take. The function is skipped if fewer seconds are
                left in the section.

        Returns:
            The result of the function, or None if it failed or was not called.
        """
        if self.left() < need and self.size != "tiny":
            left = max(0.0, self.left())
            note = f"needs about {need:.0f} s, {left:.0f} s left" if left else "the section reached its time limit"
            self.add(name, status="skipped", note=note)
            return None
        self._current.write_text(name)
        try:
            return function()
        except Skip as reason:
            self.add(name, status="skipped", note=str(reason))
        except OutOfTime as reason:
            self.add(name, status="timeout", note=str(reason)[:600])
        except Exception as error:
            traceback.print_exc()
            self.add(name, status="failed", note=f"{type(error).__name__}: {error}"[:600])
        finally:
            if self.cuda:
                torch.cuda.empty_cache()
        return None

    def require_gpu(self, what: str) -> None:
        """Raise `Skip` if this report checks a CPU.

        Args:
            what: name of the check that needs a GPU, put at the start of the error message.
        """
        if not self.cuda:
            raise Skip(f"{what} needs a GPU")

    def seconds(self, function: Callable[[], Any], repeats: int = 5, warmup: int = 2) -> float:
        """Return the median time of one call of a function, in seconds.

        The device is synchronized before and after each call.

        Args:
            function: function to call.
            repeats: number of calls that are measured.
            warmup: number of calls before the first measurement.
        """
        for _ in range(warmup):
            function()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def synchronize(self) -> None:
        """Wait until the device has finished all work that was submitted to it."""
        if self.cuda:
            torch.cuda.synchronize()


def format_row(row: Row) -> str:
    """Return a row as one line of text."""
    text = f"{row.status:8} {row.name}"
    if row.value is not None:
        text += f": {row.value:.6g} {row.unit}"
    if row.ratio is not None:
        text += f" ({row.ratio:.2f} x {row.baseline})"
    return text + "".join(f" [{part}]" for part in (row.expected, row.predicted, row.note) if part)


class Background:
    """Context manager for background programs. Programs that still run when the `with` statement ends are killed."""

    def __init__(self) -> None:
        self._programs: list[Program] = []

    def start(self, words: Sequence[object], env: dict[str, str] | None = None) -> Program:
        """Start a Python program of this repository, and return its process.

        Args:
            words: arguments for the Python interpreter, such as the path of a script and its arguments.
            env: environment variables that are set in addition to those of this process.
        """
        self._programs.append(command(words, env))
        return self._programs[-1]

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.kill()


def command(words: Sequence[object], env: dict[str, str] | None = None) -> Program:
    """Start a Python program of this repository, and return its process without waiting for it.

    Args:
        words: arguments for the Python interpreter, such as the path of a script and its arguments.
        env: environment variables that are set in addition to those of this process.
    """
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Several programs run at the same time, so each one uses a quarter of the cores.
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads} | (env or {})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment, **pipes)


def finish(process: Program, timeout: float, status: int = 0) -> str:
    """Wait for a program that `command` started, and return its output (stdout and stderr).

    Raises:
        RuntimeError: the program ended with an exit status other than `status`.
        OutOfTime: the program ran longer than `timeout` seconds, and was killed.
    """
    try:
        text, _ = process.communicate(timeout=max(1.0, timeout))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        raise OutOfTime(f"{process.args[1]} ran longer than {timeout:.0f} s: {text[-500:]}") from None  # type: ignore[index]
    print(text, flush=True)
    if process.returncode != status:
        raise RuntimeError(f"{process.args[1]} ended with exit status {process.returncode}: {text[-500:]}")  # type: ignore[index]
    return text


def differences(expected: Any, found: Any) -> int:
    """Return the number of differing ids plus the number of differing ranks in two results of `search_and_rank`."""
    ((_, ids), ranks), ((_, other_ids), other_ranks) = expected, found
    return int((ids != other_ids).sum()) + sum(int((a != b).sum()) for a, b in zip(ranks, other_ranks, strict=True))


def sizes(count: int) -> list[tuple[int, int]]:
    """Draw `count` image sizes (width, height) at random from `REVISITED_SIZES`.

    The probability of a size is proportional to the number of images of this size in ROxford5k and RParis6k.
    """
    weights = np.array([number for _, _, number in REVISITED_SIZES], float)
    drawn = np.random.default_rng(0).choice(len(weights), count, p=weights / weights.sum())
    return [REVISITED_SIZES[i][:2] for i in drawn]


def write_jpegs(folder: Path, dimensions: Sequence[tuple[int, int]]) -> list[Path]:
    """Generate one JPEG file for each (width, height), and return the paths.

    Call this function before CUDA is initialized, because it forks the process, and CUDA does not work in a fork of a
    process that has initialized it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(len(dimensions))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        list(pool.map(_write_jpeg, paths, dimensions, range(len(paths)), chunksize=4))
    return paths


def _write_jpeg(path: Path, size: tuple[int, int], seed: int) -> None:
    """Write a random JPEG image of quality 90, with patterns and noise that make the file about as large as a photo.

    Args:
        path: file to write.
        size: width and height in pixels.
        seed: seed of the random pixels.
    """
    rng, (width, height) = np.random.default_rng(seed), size
    pixels = rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 4
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    path.write_bytes(file.getvalue())
