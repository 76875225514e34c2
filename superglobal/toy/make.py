"""Render the toy data set: images of landmarks in the layouts of the official data sets.

You can try and test every command on it without a download. Its folder contains:

- `gldv2/`: train, index and test images as a/b/c/<id>.jpg, with the lists and solutions of GLDv2;
- `toy/`: `jpg/` and `gnd_toy.pkl`, as in Revisited Oxford and Paris;
- `toy_distractors/`: `jpg/` and `toy_distractors.txt`;
- `photos.csv`: one row per image with its pose, light, visible fraction and box;
- `toy.json`: a summary, written when the data set is complete.

Training, evaluation (index, retrieval queries, `toy/`) and distractors have different landmarks. Recognition assigns
training landmarks to images, so the test split also contains images of training landmarks.

A data set depends only on its size and seed. The pixels are the same on every machine. The JPEG files are the same
wherever libjpeg is the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from superglobal.errors import InputError
from superglobal.toy.layout import write_layouts
from superglobal.toy.photo import Photo, take
from superglobal.toy.plan import Shot, plan, size_of
from superglobal.utils.io import write_atomically

# Increment the version whenever the pixels or the rules for easy, hard and junk images change.
VERSION = 2
_FINISHED, _STARTED = "toy.json", "toy.unfinished.json"
Progress = Callable[[int, int], None]
"""Function that is called with the number of finished images and the number of all images."""


def make_toy(
    out: str | Path, size: str = "small", seed: int = 0, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Render the toy data set into `out`. Resume an interrupted call, and keep a complete data set as it is.

    Args:
        out: folder, which must be new, be empty, or contain the same data set.
        size: name of one of `SIZES`.
        seed: non-negative seed; each seed gives different landmarks.
        workers: number of processes; None for one per CPU that this process may use.
        progress: function that is called after each landmark with the numbers of finished and of all images.

    Returns:
        The contents of `toy.json`: version, size, seed, and the numbers of images and of easy, hard and junk pairs.

    Raises:
        InputError: the size is unknown, the seed or the number of workers is out of range, `out` contains other files,
            or a worker process died.
    """
    out, chosen = Path(out), size_of(size)
    if seed < 0:
        raise InputError(f"toy data set: seed={seed}: expected an integer >= 0")
    if workers is not None and workers < 1:
        raise InputError(f"toy data set: workers={workers}: expected an integer >= 1")
    identity = {"version": VERSION, "size": size, "seed": seed}
    shots = plan(chosen, seed)
    done = _claim(out, identity)
    if done and all((out / shot.file).is_file() for shot in shots):
        return done
    (out / _FINISHED).unlink(missing_ok=True)  # Some images have been deleted since.
    write_atomically(out / _STARTED, json.dumps(identity).encode())
    photos: dict[Shot, Photo] = {}
    for batch in _render(out, seed, chosen.side, shots, workers or _cpus()):
        photos |= batch
        if progress:
            progress(len(photos), len(shots))
    pairs = write_layouts(out, [photos[shot] for shot in shots])
    for stale in out.rglob(".*.jpg.*"):  # Workers that were killed while writing left these files.
        stale.unlink()
    summary = identity | {"photos": dict(Counter(shot.set for shot in shots)), "pairs": pairs}
    write_atomically(out / _FINISHED, (json.dumps(summary, indent=1) + "\n").encode())
    (out / _STARTED).unlink()
    return summary


def _claim(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of the complete data set in `out`, or None if the data set must be rendered.

    Raises:
        InputError: `out` is a file, is not readable, or contains a different data set or other files.
    """
    try:
        entries = {path.name for path in out.iterdir()} if out.exists() else set()
        marker = next((name for name in (_FINISHED, _STARTED) if name in entries), None)
        found = json.loads((out / marker).read_text()) if marker else None
    except NotADirectoryError as error:
        raise InputError(f"toy data set: {out} is a file: expected a folder; choose another path with --out") from error
    except (OSError, ValueError) as error:
        message = f"toy data set: cannot read {out} ({error})"
        raise InputError(f"{message}; remove the folder, or choose another one with --out") from error
    if found is None:
        if entries:
            raise InputError(
                f"toy data set: {out} contains other files, such as {min(entries)}: expected a new or empty folder; "
                "choose another one with --out"
            )
        return None
    if not isinstance(found, dict) or {key: found.get(key) for key in identity} != identity:
        there, wanted = (
            ", ".join(f"{key} {values.get(key)}" for key in identity)
            for values in (found if isinstance(found, dict) else {}, identity)
        )
        raise InputError(
            f"toy data set: {out} contains a different one ({there}): expected {wanted}; remove the folder, or choose "
            "another one with --out"
        )
    return found if marker == _FINISHED else None


def _render(out: Path, seed: int, side: int, shots: list[Shot], workers: int) -> Iterator[dict[Shot, Photo]]:
    """Render the images in batches of one landmark, so that each landmark is constructed only once."""
    groups: dict[tuple[str, int], list[Shot]] = {}
    for shot in shots:
        groups.setdefault((shot.place, shot.landmark), []).append(shot)
    if workers == 1:
        yield from (_take_all(out, seed, side, batch) for batch in groups.values())
        return
    # A forked worker starts without importing anything, and it is safe here because it uses only NumPy and Pillow. On
    # other systems than Linux fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # Ctrl-C in a terminal ends the workers immediately and silently, which is safe because file writes are atomic.
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        futures = [pool.submit(_take_all, out, seed, side, batch) for batch in groups.values()]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool as error:
            message = f"toy data set: one of {workers} worker processes died, possibly because memory ran out"
            raise InputError(f"{message}; run again with fewer --workers to resume in {out}") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take_all(out: Path, seed: int, side: int, shots: list[Shot]) -> dict[Shot, Photo]:
    """Render the images of one batch in a worker."""
    return {shot: take(out, seed, side, shot) for shot in shots}


def _cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
