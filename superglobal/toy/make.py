"""The toy set: rendered landmarks in the official layouts, for trying and testing everything without a download.

Below its folder: `gldv2/` (train, index and test in a/b/c/<16 hex>.jpg with GLDv2's lists and solutions), `toy/`
(`jpg/`, `gnd_toy.pkl`, as the Revisited sets), `toy_distractors/` (`jpg/`, `toy_distractors.txt`), `photos.csv` (a line
per photo: pose, light, visible share, box) and, once all is there, `toy.json`.

Landmarks of training are never those of evaluation (index, retrieval queries of test, `toy/`), nor those among the
distractors. Recognition, which asks for the training landmark, has test photos of its own of training landmarks.
A set depends on size and seed alone. Its photos' pixels are the same on every machine, its JPEGs where libjpeg is.
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

VERSION = 2  # of the pixels and rules: raised with every change of either
_FINISHED, _STARTED = "toy.json", "toy.unfinished.json"
Progress = Callable[[int, int], None]
"""Called with the photos done and all photos."""


def make_toy(
    out: str | Path, size: str = "small", seed: int = 0, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Render a toy set into `out`, or go on where an earlier call was interrupted, or find that it is there.

    Args:
        out: folder of the set; new, empty, or holding the same set.
        size: one of `SIZES`.
        seed: 0 or more; other seeds give other landmarks.
        workers: processes, by default one per CPU of this process.
        progress: told now and then how far it is.

    Returns:
        The contents of `toy.json`: version, size, seed, and counts of photos and of easy, hard and junk pairs.

    Raises:
        InputError: no such size, a bad seed or number of workers, or `out` holds something else.
    """
    out, chosen = Path(out), size_of(size)
    if seed < 0:
        raise InputError(f"toy set: seed is {seed}; expected 0 or more")
    if workers is not None and workers < 1:
        raise InputError(f"toy set: workers is {workers}; expected 1 or more")
    identity = {"version": VERSION, "size": size, "seed": seed}
    shots = plan(chosen, seed)
    done = _claim(out, identity)
    if done and all((out / shot.file).is_file() for shot in shots):
        return done
    (out / _FINISHED).unlink(missing_ok=True)  # photos were lost since
    write_atomically(out / _STARTED, json.dumps(identity).encode())
    photos: dict[Shot, Photo] = {}
    for batch in _render(out, seed, chosen.side, shots, workers or _cpus()):
        photos |= batch
        if progress:
            progress(len(photos), len(shots))
    pairs = write_layouts(out, [photos[shot] for shot in shots])
    for stale in out.rglob(".*.jpg.*"):  # of workers that were killed while writing
        stale.unlink()
    summary = identity | {"photos": dict(Counter(shot.set for shot in shots)), "pairs": pairs}
    write_atomically(out / _FINISHED, (json.dumps(summary, indent=1) + "\n").encode())
    (out / _STARTED).unlink()
    return summary


def _claim(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of the finished set in `out`, None if it is still to be made there; InputError if it cannot be."""
    try:
        entries = {path.name for path in out.iterdir()} if out.exists() else set()
        marker = next((name for name in (_FINISHED, _STARTED) if name in entries), None)
        found = json.loads((out / marker).read_text()) if marker else None
    except NotADirectoryError as error:
        raise InputError(f"toy set: {out} is a file; choose a folder with --out") from error
    except (OSError, ValueError) as error:
        raise InputError(f"toy set: {out} cannot be read ({error}); remove the folder or choose another") from error
    if found is None:
        if entries:
            raise InputError(
                f"toy set: {out} holds something else ({min(entries)}, ...); choose a new folder with --out"
            )
        return None
    if not isinstance(found, dict) or {key: found.get(key) for key in identity} != identity:
        there, wanted = (
            ", ".join(f"{key} {values.get(key)}" for key in identity)
            for values in (found if isinstance(found, dict) else {}, identity)
        )
        raise InputError(
            f"toy set: {out} holds another one ({there}; asked for was {wanted}); remove the folder or choose another "
            "with --out"
        )
    return found if marker == _FINISHED else None


def _render(out: Path, seed: int, side: int, shots: list[Shot], workers: int) -> Iterator[dict[Shot, Photo]]:
    """Photos in batches of one landmark, so that each landmark is built once."""
    groups: dict[tuple[str, int], list[Shot]] = {}
    for shot in shots:
        groups.setdefault((shot.place, shot.landmark), []).append(shot)
    if workers == 1:
        yield from (_take_all(out, seed, side, batch) for batch in groups.values())
        return
    # A fork has everything imported; nothing but NumPy and Pillow runs in it. Elsewhere it is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # Ctrl-C in a terminal ends the workers at once and without a word; photos are written whole or not at all.
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        futures = [pool.submit(_take_all, out, seed, side, batch) for batch in groups.values()]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool as error:
            message = f"toy set: a worker process of {workers} died, perhaps for want of memory"
            raise InputError(f"{message}; call again with fewer --workers, {out} goes on where it was") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _take_all(out: Path, seed: int, side: int, shots: list[Shot]) -> dict[Shot, Photo]:
    return {shot: take(out, seed, side, shot) for shot in shots}


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
