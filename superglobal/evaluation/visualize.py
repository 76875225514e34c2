"""Pictures of a finished evaluation, from what it stored: nothing is extracted again."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from superglobal.data.evaluation_set import EvaluationSet, RecognitionTruth
from superglobal.data.images import ImageItem, read_image
from superglobal.errors import InputError
from superglobal.evaluation.heatmaps import draw_activations
from superglobal.evaluation.pipeline import search_device
from superglobal.evaluation.ranking_sheets import FigureOptions, check_training_images, chosen, draw_sheets, with_photos
from superglobal.evaluation.saved_run import FinishedRun, mean_precision, relevance_sets
from superglobal.reporting import figures as plots
from superglobal.reporting.ranking_figures import RELEVANCES
from superglobal.reporting.results import METRICS, metric_key
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)
_MOST_QUERIES = 1000  # whose similarities are counted; drawn by the seed where there are more
_GRID = (9, 8)  # thumbnails beside the map
_THUMBNAIL = 96  # pixels


def visualize(folder: Path, kinds: Sequence[str], options: FigureOptions) -> tuple[list[Path], list[str]]:
    """Draw pictures of the result in `folder` into its `figures/`, and `index.html` that shows them.

    Args:
        folder: of one result.
        kinds: of `DRAWN`; empty for all that apply.
        options: what they show.

    Returns:
        The files, and why kinds were left out where all were asked for.

    Raises:
        InputError: a kind that was asked for does not apply or lacks what it needs, or none could be drawn.
    """
    run = FinishedRun(folder)
    _check(run, options)
    target = run.folder / "figures"
    paths: list[Path] = []
    left_out: list[str] = []
    for kind in kinds or DRAWN:
        try:
            paths += DRAWN[kind](run, target, options)
        except InputError as error:
            if kinds:
                raise
            left_out.append(f"{kind}: {str(error).removeprefix(f'{kind}: ')}")
    if not paths:
        raise InputError("nothing could be drawn:\n" + "\n".join(left_out))
    _write_index(run, target)
    return paths, left_out


def _check(run: FinishedRun, options: FigureOptions) -> None:
    count = run.summary["counts"]["queries"]
    for number in options.numbers:
        if not 0 <= number < count:
            raise InputError(f"query {number}: the result has {count} queries, 0 to {count - 1} (see rankings.csv)")
    for name, value in (("queries", options.queries), ("ranks", options.ranks), ("images", options.images)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: expected at least 1")
    if options.method not in plots.PROJECTIONS:
        raise InputError(f"map={options.method}: expected one of {', '.join(plots.PROJECTIONS)}")


def _activation(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    if run.own_descriptors:
        raise InputError("activation: own descriptors have no network here to look into; curves, similarities, map")
    check_training_images(run, "activation")
    paths: list[Path] = []
    numbers = next(iter(chosen(run, options, 2).values()))
    with_photos(run, lambda: paths.extend(draw_activations(run, target, numbers, options.ranks or 4)))
    return paths


def _curves(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    if not run.summary["metrics"]:
        raise InputError("curves: precision needs to know what is right, and this result has no labels")
    curves, counts = mean_precision(run)
    metric = METRICS[metric_key(run.summary["metrics"]["search"])]
    path = target / "precision-recall.png"
    plots.draw_curves(path, _about(run), curves, counts, metric)
    return [path]


def _similarities(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    dataset = run.dataset
    if dataset is None or dataset.gnd is None:
        raise InputError("similarities: which pairs are positive is not known, this result has no labels")
    inputs, device, sets = run.inputs, search_device(run.config), relevance_sets(dataset)
    queries = np.arange(len(sets))
    title = _about(run)
    if len(queries) > _MOST_QUERIES:
        queries = np.sort(np.random.default_rng(options.seed).permutation(queries)[:_MOST_QUERIES])
        title += f", {_MOST_QUERIES} queries drawn by lot"
    exclude = inputs.exclude()
    some, own = [sets[i] for i in queries], None if exclude is None else exclude[queries]
    counts = plots.similarity_counts(inputs.query_block()[queries], inputs.database, some, exclude=own, device=device)
    path = target / "similarities.png"
    order = [name for name in RELEVANCES[dataset.protocols] if name in counts]
    plots.draw_similarities(path, title, {name: counts[name] for name in order}, _rescored(run, queries))
    return [path]


def _rescored(run: FinishedRun, queries: np.ndarray) -> dict[str, np.ndarray]:
    """What an image is to a query -> scores after reranking of those that are listed."""
    if "rerank" not in run.stages:
        return {}
    assert run.dataset is not None
    scores, ids = run.stages["rerank"]
    sets = relevance_sets(run.dataset)
    found: dict[str, list[np.ndarray]] = {name: [] for name in RELEVANCES[run.dataset.protocols]}
    for query in queries:
        left = np.isfinite(scores[query]) & (ids[query] >= 0)
        for name, wanted in sets[query].items():
            mine = np.isin(ids[query], wanted) & left
            found[name].append(scores[query][mine])
            left &= ~mine
        found["negative"].append(scores[query][left])
    return {name: np.concatenate(parts) for name, parts in found.items() if any(len(part) for part in parts)}


def _map(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    inputs, dataset = run.inputs, run.dataset
    total = len(inputs.database)
    groups = [None] * total if dataset is None else landmarks_of(dataset, total)
    ids = plots.sample_images(groups, options.images, inputs.database.skipped, options.seed)
    # Where the database is the queries, each is there already.
    alone = dataset is not None and dataset.leave_one_out
    queries = np.empty(0, np.int64) if alone else _some(len(inputs.queries), max(1, options.images // 4), options.seed)
    X, Q = inputs.database.take(ids), inputs.queries.take(queries)
    points, marked, names = plots.project(X, Q, options.method, options.seed)
    where = points, [groups[i] for i in ids]
    clusters = None if dataset is None else dataset.clusters
    stars = marked, [clusters[int(i)] or None if clusters is not None else None for i in queries]
    thumbnails: dict[int, np.ndarray] = {}
    if dataset is not None and not run.own_descriptors:
        thumbnails = _thumbnails(
            [(n, run.images[int(ids[n])]) for n in sorted(plots.grid_cells(points, *_GRID).values())]
        )
    title = (
        f"{_about(run)}: descriptors by {names[0].split(' ')[0] if options.method == 'tsne' else 'their two main axes'}"
    )
    title += f", {len(ids)} of {total} images"
    path = target / f"map-{options.method}.png"
    plots.draw_map(path, title, names, where, stars, thumbnails, _GRID)
    return [path]


def _thumbnails(shown: Sequence[tuple[int, ImageItem]]) -> dict[int, np.ndarray]:
    """None at all where one is gone: the map is one of descriptors."""
    try:
        return {n: read_image(item.path, max_side=_THUMBNAIL) for n, item in shown}
    except InputError as error:
        log.warning("map without thumbnails: %s", error)
        return {}


def _some(total: int, count: int, seed: int) -> np.ndarray:
    """(n,) ascending, at most `count` of `total` numbers."""
    return np.sort(np.random.default_rng([seed, 1]).permutation(total)[:count])


def landmarks_of(dataset: EvaluationSet, total: int) -> list[str | None]:
    """The landmark of each of `total` database images, None where none is known; junk is of none.

    An image that is positive for queries of several landmarks counts to the last.
    """
    found: list[str | None] = [None] * total
    if isinstance(dataset.landmark_truth, RecognitionTruth):
        return [str(label) for label in dataset.landmark_truth.labels] + [None] * (
            total - len(dataset.landmark_truth.labels)
        )
    for entry, name in zip(relevance_sets(dataset), dataset.clusters or (), strict=bool(dataset.clusters)):
        for kind, ids in entry.items():
            for image in ids if kind != "junk" else ():
                found[int(image)] = name
    return found


def _about(run: FinishedRun) -> str:
    """Data set and weights, for a title."""
    weights = Path(str(run.summary["weights"]))
    short = weights.parent.name if weights.parent.name and weights.suffix == ".safetensors" else str(weights)
    return f"{run.summary['dataset']}, weights {short}"


def _write_index(run: FinishedRun, target: Path) -> None:
    """`index.html`, which shows all pictures of the folder, by their names; it needs nothing else."""
    names = sorted(path.name for path in target.glob("*.png"))
    title = html.escape(f"{_about(run)}: {run.folder.name}")
    body = "".join(
        f'<h2 id="{html.escape(n)}">{html.escape(n.removesuffix(".png"))}</h2>\n<a href="{html.escape(n)}">'
        f'<img src="{html.escape(n)}" alt="{html.escape(n)}" loading="lazy"></a>\n'
        for n in names
    )
    links = " · ".join(f'<a href="#{html.escape(n)}">{html.escape(n.removesuffix(".png"))}</a>' for n in names)
    style = "body{font-family:sans-serif;margin:1.5em}img{max-width:100%;border:1px solid #ddd}"
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>\n'
    write_atomically(target / "index.html", f"{page}<h1>{title}</h1>\n<p>{links}</p>\n{body}</html>\n".encode())


DRAWN: dict[str, Callable[[FinishedRun, Path, FigureOptions], list[Path]]] = {
    "sheets": draw_sheets,
    "activation": _activation,
    "curves": _curves,
    "similarities": _similarities,
    "map": _map,
}
"""Kinds of pictures."""
