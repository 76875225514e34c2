"""Render the toy data set: images of landmarks in the layouts of the official data sets.

With it you can try and test every command without a download. Its folder contains:

- `gldv2/`: train, index and test images as a/b/c/<id>.jpg, with the same lists and solution files as GLDv2;
- `toy/`: `jpg/` and `gnd_toy.pkl`, as in Revisited Oxford and Paris;
- `toy_distractors/`: `jpg/` and its list of images, `toy_distractors.txt`;
- `photos.csv`: one row per image with its camera pose, light, visible fraction and bounding box;
- `toy.json`: a summary, written when the data set is complete.

The training images, the evaluation images (index, retrieval queries and `toy/`) and the distractors show different
landmarks. The recognition task assigns training landmarks to test images, so the test split also contains images of
training landmarks.

A data set depends only on its size and seed. The pixels are the same on every machine. The JPEG files are the same
wherever libjpeg is the same.
"""

from __future__ import annotations

import json
import multiprocessing
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
from superglobal.utils.distributed import available_cpus
from superglobal.utils.io import read_json, write_atomically

# Increment the version whenever the pixels or the rules for easy, hard and junk images change.
VERSION = 2
_FINISHED, _STARTED = "toy.json", "toy.unfinished.json"
Progress = Callable[[int, int], None]
"""Callback that receives the number of finished images and the total number of images."""


def make_toy(
    out: str | Path, size: str = "small", seed: int = 0, workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Render the toy data set into `out`.

    If `out` contains a part of this data set, render only the missing images. If the data set is complete, change
    nothing.

    Args:
        out: output folder. It must be new or empty, or contain a data set of the same version, size and seed.
        size: a key of `SIZES`.
        seed: non-negative integer; each seed gives different landmarks.
        workers: number of processes; None for one per CPU that this process may use.
        progress: function called after each landmark with the number of finished images and the total number.

    Returns:
        The contents of `toy.json`: "version", "size", "seed", "photos" (the number of images in each set), and "pairs"
        (the numbers of easy, hard and junk pairs).

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
    (out / _FINISHED).unlink(missing_ok=True)  # The summary is out of date if images were deleted after it was written.
    write_atomically(out / _STARTED, json.dumps(identity).encode())
    photos: dict[Shot, Photo] = {}
    for batch in _render(out, seed, chosen.side, shots, workers or available_cpus()):
        photos |= batch
        if progress:
            progress(len(photos), len(shots))
    pairs = write_layouts(out, [photos[shot] for shot in shots])
    # Delete the temporary files of workers that were killed while they wrote an image.
    for stale in out.rglob(".*.jpg.*"):
        stale.unlink()
    summary = identity | {"photos": dict(Counter(shot.set for shot in shots)), "pairs": pairs}
    write_atomically(out / _FINISHED, (json.dumps(summary, indent=1) + "\n").encode())
    (out / _STARTED).unlink()
    return summary


def _claim(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Check that `out` can contain the requested data set.

    Return the contents of `toy.json` if an earlier run has finished the data set, else None.

    Args:
        out: output folder.
        identity: version, size and seed of the requested data set.

    Raises:
        InputError: `out` is a file, is not readable, or contains a different data set or other files.
    """
    try:
        entries = {path.name for path in out.iterdir()} if out.exists() else set()
        marker = next((name for name in (_FINISHED, _STARTED) if name in entries), None)
        found = read_json(out / marker) if marker else None
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
            f"toy data set: {out} contains a different toy data set ({there}): expected {wanted}; remove the folder, "
            "or choose another one with --out"
        )
    return found if marker == _FINISHED else None


def _render(out: Path, seed: int, side: int, shots: list[Shot], workers: int) -> Iterator[dict[Shot, Photo]]:
    """Render the images in batches, and yield the rows of `photos.csv` of each finished batch.

    A batch contains all images of one landmark, so that each landmark is constructed only once.

    Args:
        out: output folder.
        seed: seed of the data set.
        side: longer side of the images in pixels.
        shots: the images to render.
        workers: number of processes.

    Raises:
        InputError: a worker process died.
    """
    groups: dict[tuple[str, int], list[Shot]] = {}
    for shot in shots:
        groups.setdefault((shot.place, shot.landmark), []).append(shot)
    if workers == 1:
        yield from (_take_all(out, seed, side, batch) for batch in groups.values())
        return
    # Forked workers start fast because they do not have to import the modules again. Forking is safe here because the
    # workers use only NumPy and Pillow; on systems other than Linux it is not safe.
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
    """Render the images of one batch.

    Args:
        out: output folder.
        seed: seed of the data set.
        side: longer side of the images in pixels.
        shots: the images to render, all of one landmark.

    Returns:
        The row of `photos.csv` for each image.
    """
    return {shot: take(out, seed, side, shot) for shot in shots}
