"""Rows of the GPU report, timing, and generated images."""

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

# Width, height and count of the commonest images of ROxford5k and RParis6k together (9,335 of 11,315).
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
    """Raised for a row that this machine cannot run; the message is the reason."""


class OutOfTime(Exception):
    """Raised for a row that is not done in its time."""


@dataclass
class Row:
    """One line of the report.

    Attributes:
        section, name: what was run.
        status: "measured", "passed", "failed", "timeout", "skipped" or "interrupted".
        value, unit: the result.
        ratio, baseline: value over the baseline's value, and the name of the baseline.
        expected: the condition that decides between "passed" and "failed".
        predicted: the gain that was expected before the measurement.
        note: anything else, for a failed row the error.
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
    """Append rows of one section to a file as they are measured, so that a killed section keeps its rows.

    Args:
        section: its name.
        path: JSON lines.
        device: "cuda" or "cpu".
        size: "full", "small" or "tiny".
        deadline: `time.monotonic()` at which the section must end.
        work: folder for images, stores and trainings.
    """

    def __init__(self, section: str, path: Path, device: str, size: str, deadline: float, work: Path) -> None:
        self.section, self.path, self.size, self.deadline, self.work = section, path, size, deadline, work
        self.device = torch.device(device)
        self.cuda = device == "cuda"

    def current(self) -> str:
        """Return the name of the row that was begun last."""
        return self._current.read_text() if self._current.exists() else "start of the section"

    @property
    def _current(self) -> Path:
        return self.work / f"{self.section}.current"

    def pick(self, full: T, small: T, tiny: T) -> T:
        """Return the value for the size of this report."""
        return {"full": full, "small": small, "tiny": tiny}[self.size]

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(
        self, name: str, value: float | None = None, unit: str = "", *, passed: bool | None = None, **more: Any
    ) -> None:
        """Write one row; `passed` makes it a check, `more` are further fields of `Row`."""
        status = more.pop("status", {None: "measured", True: "passed", False: "failed"}[passed])
        row = Row(self.section, name, status, None if value is None else float(value), unit, **more)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"[{self.section}] {format_row(row)}", flush=True)

    def run(self, name: str, function: Callable[[], T], need: float = 0) -> T | None:
        """Call `function`; turn an exception, or less than `need` seconds left, into a row.

        Returns:
            The result, or None if there is none.
        """
        if self.left() < need and self.size != "tiny":
            left = max(0.0, self.left())
            note = f"needs about {need:.0f} s, {left:.0f} s left" if left else "the time of the section was over"
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
        """Raise Skip on a CPU."""
        if not self.cuda:
            raise Skip(f"{what} needs a GPU")

    def seconds(self, function: Callable[[], Any], repeats: int = 5, warmup: int = 2) -> float:
        """Return the median seconds of one call, the device synchronized before and after."""
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
        """Wait for the device."""
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
    """Programs that run beside other work; leaving the context ends those that still run."""

    def __init__(self) -> None:
        self._programs: list[Program] = []

    def start(self, words: Sequence[object], env: dict[str, str] | None = None) -> Program:
        """Start one of the project's programs as `command` does."""
        self._programs.append(command(words, env))
        return self._programs[-1]

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.kill()


def command(words: Sequence[object], env: dict[str, str] | None = None) -> Program:
    """Start one of the project's programs with this interpreter."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Several programs run at a time.
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads} | (env or {})
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment, **pipes)


def finish(process: Program, timeout: float, status: int = 0) -> str:
    """Return the output of a program from `command`.

    Raises:
        RuntimeError: it ends with another status.
        OutOfTime: it does not end in `timeout` seconds.
    """
    try:
        text, _ = process.communicate(timeout=max(1.0, timeout))
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        raise OutOfTime(f"{process.args[1]} ran longer than {timeout:.0f} s: {text[-500:]}") from None  # type: ignore[index]
    print(text, flush=True)
    if process.returncode != status:
        raise RuntimeError(f"{process.args[1]} ended with {process.returncode}: {text[-500:]}")  # type: ignore[index]
    return text


def differences(expected: Any, found: Any) -> int:
    """Return how many ids and ranks differ."""
    ((_, ids), ranks), ((_, other_ids), other_ranks) = expected, found
    return int((ids != other_ids).sum()) + sum(int((a != b).sum()) for a, b in zip(ranks, other_ranks, strict=True))


def sizes(count: int) -> list[tuple[int, int]]:
    """Return `count` (width, height) pairs in the proportions of `REVISITED_SIZES`."""
    weights = np.array([number for _, _, number in REVISITED_SIZES], float)
    drawn = np.random.default_rng(0).choice(len(weights), count, p=weights / weights.sum())
    return [REVISITED_SIZES[i][:2] for i in drawn]


def write_jpegs(folder: Path, dimensions: Sequence[tuple[int, int]]) -> list[Path]:
    """Write one generated JPEG per (width, height), in parallel; call it before the first use of CUDA."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(len(dimensions))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        list(pool.map(_write_jpeg, paths, dimensions, range(len(paths)), chunksize=4))
    return paths


def _write_jpeg(path: Path, size: tuple[int, int], seed: int) -> None:
    """Write shapes of all sizes and a little noise at quality 90: about as many bytes as a photo has."""
    rng, (width, height) = np.random.default_rng(seed), size
    pixels = rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 4
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    path.write_bytes(file.getvalue())
