"""Draw figures of a finished evaluation from its saved results and stored descriptors."""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from superglobal.data.evaluation_set import EvaluationSet, RecognitionTruth
from superglobal.data.images import ImageItem, image_tensor, read_image
from superglobal.data.lazy_sequence import file_names
from superglobal.errors import InputError, one_of, printable
from superglobal.evaluation.pipeline import search_device
from superglobal.evaluation.ranking_sheets import (
    FigureOptions,
    draw_sheets,
    require_images,
    select_queries,
    with_image_hint,
)
from superglobal.evaluation.saved_run import FinishedRun, mean_precision, relevance_sets
from superglobal.models.attribution import Contributions, contributions
from superglobal.models.extract import extract
from superglobal.models.network import RetrievalNetwork
from superglobal.reporting import figures
from superglobal.reporting.figures import HeatPanel
from superglobal.reporting.ranking_figures import RELEVANCES, relevance
from superglobal.reporting.results import METRICS, metric_key
from superglobal.utils.io import write_text

log = logging.getLogger(__name__)
_MAX_QUERIES = 1000  # maximum number of queries in the similarity histograms; if there are more, a sample is used
_GRID = (9, 8)  # numbers of columns and rows in the grid of thumbnails beside the map
_THUMBNAIL_SIDE = 96  # longer side of a thumbnail on the map, in pixels
_PANEL_SIDE = 480  # longer side in pixels of an image in an activation figure


def visualize(
    folder: Path, kinds: Sequence[str], options: FigureOptions, overrides: Sequence[str] = ()
) -> tuple[list[Path], list[str]]:
    """Draw figures of a result into its subfolder `figures/`, and write an `index.html` that shows them.

    Args:
        folder: folder of one result.
        kinds: kinds of figures to draw, such as "curves" (see `DRAWN`); if empty, all kinds that apply to the result.
        options: options of the figures.
        overrides: paths of moved files, see `FinishedRun`.

    Returns:
        The paths of the figures, and the reasons why kinds were left out, one text for each. If `kinds` is not empty,
        there are no reasons, because no kind is left out.

    Raises:
        InputError: a requested kind does not apply, its inputs are missing, or no figure could be drawn.
    """
    run = FinishedRun(folder, overrides)
    options.validate(run.summary["counts"]["queries"])
    if options.method not in figures.PROJECTIONS:
        raise InputError(f"map={options.method}: expected {one_of(options.method, figures.PROJECTIONS)}")
    target = run.folder / "figures"
    paths: list[Path] = []
    reasons: list[str] = []
    for kind in kinds or DRAWN:
        try:
            paths += DRAWN[kind](run, target, options)
        except InputError as error:
            if kinds:
                raise
            reasons.append(f"{kind}: {str(error).removeprefix(f'{kind}: ')}")
    if not paths:
        raise InputError("no figure could be drawn:\n" + "\n".join(reasons))
    _write_index(run, target)
    return paths, reasons


def draw_activation(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    """Draw heat maps of the regions that make a query similar to its first results, one figure per query.

    The network processes only the images in the figures. A heat map shows the exact contribution of each region to the
    similarity, summed over scales (see `models/attribution.py`).

    Returns:
        The paths of the figures.
    """
    if run.uses_descriptor_files:
        raise InputError(
            "activation: requires a network, but the descriptors are from files; draw curves, similarities or map"
        )
    require_images(run, "activation")
    assert run.dataset is not None
    network = run.network().to(search_device(run.config))
    names = file_names(run.dataset.queries, run.dataset.root)
    whitening = run.config.whitening.kind
    details = "" if whitening == "none" else f", before whitening={whitening}"
    details += f", sum of {len(network.scales)} scales" if len(network.scales) > 1 else ", one scale"
    paths = []
    for query in map(int, next(iter(select_queries(run, options, 2).values()))):
        ids = list(run.stages.values())[-1][1][query][: options.ranks or 4]
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(names[query]).stem)[:60]
        path = target / f"activation-{query:04d}-{name}.png"
        title = f"query {query}: {names[query]}. Contributions of regions to the similarity{details}"
        with with_image_hint(run):
            columns = _activation_columns(run, network, query, [int(image) for image in ids if image >= 0])
            figures.draw_heat_maps(path, title, columns)
        paths.append(path)
    return paths


def _activation_columns(
    run: FinishedRun, network: RetrievalNetwork, query: int, ids: Sequence[int]
) -> list[list[HeatPanel | None]]:
    """Return the panels of an activation figure: one column for the query, and one column for each result.

    The first column contains the image of the query, and a heat map of the contributions to the similarity of the query
    with itself. The column of a result contains the image of the result, and two heat maps of the contributions to the
    similarity of the query and the result: one drawn on the query, and one drawn on the result.

    Args:
        run: finished evaluation.
        network: network that extracted the descriptors, on its device.
        query: number of the query.
        ids: database ids of the results, best first.
    """
    assert run.dataset is not None
    max_side = run.config.dataset.max_side
    items = [run.dataset.queries[query], *(run.images[image] for image in ids)]
    images = [read_image(item.path, item.box, max_side) for item in items]
    descriptors = extract(network, images)
    shown = [read_image(item.path, item.box, min(_PANEL_SIDE, max_side or _PANEL_SIDE)) for item in items]

    def panel(image: int, compared_with: int, caption: str, kind: str) -> HeatPanel:
        shares = contributions(network, image_tensor(images[image]), descriptors[compared_with])
        heat = shares.heatmap(*shown[image].shape[:2])
        return HeatPanel(shown[image], heat, f"{caption}\n{_shares_text(shares)}", kind)

    columns: list[list[HeatPanel | None]] = [
        [HeatPanel(shown[0], None, "query", "query"), panel(0, 0, "query with itself", "query"), None]
    ]
    for rank, image in enumerate(ids, 1):
        kind = relevance(run.dataset, query, image)
        label = "" if kind == "unlabeled" else f", {kind}"
        caption = f"rank {rank}{label}\nsimilarity {float(descriptors[0] @ descriptors[rank]):.3f}"
        columns.append(
            [
                HeatPanel(shown[rank], None, caption, kind),
                panel(0, rank, f"query, with rank {rank}", "query"),
                panel(rank, 0, f"rank {rank}, with query", kind),
            ]
        )
    return columns


def _shares_text(shares: Contributions) -> str:
    """Format the contributions of regions to a similarity as text.

    The text contains the sum of the positive contributions, the sum of the negative contributions, and the contribution
    of the bias. Numbers that would be rounded to zero are left out.
    """
    values = np.concatenate([scale.ravel() for scale in shares.maps])
    parts = [f"{values[values > 0].sum():+.3f}", f"{values[values < 0].sum():+.3f}"]
    text = f"regions {' '.join(part for part in parts if abs(float(part)) >= 5e-4)}"
    return text + (f", bias {shares.bias:+.3f}" if abs(shares.bias) >= 5e-4 else "")


def draw_curves(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    """Draw the mean precision-recall curve of each protocol and stage, and return the path of the figure."""
    if not run.summary["metrics"]:
        raise InputError("curves: precision needs labels, but this result has none")
    curves, counts = mean_precision(run)
    metric = METRICS[metric_key(run.summary["metrics"]["search"])]
    path = target / "precision-recall.png"
    figures.draw_curves(path, _title(run), curves, counts, metric)
    return [path]


def draw_similarities(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    """Draw histograms of the similarities between queries and database images, one per relevance such as "positive".

    With reranking, the figure also shows the reranking scores.

    Returns:
        The path of the figure.
    """
    dataset = run.dataset
    if dataset is None or dataset.gnd is None:
        raise InputError("similarities: positive pairs need labels, but this result has none")
    inputs, device, sets = run.inputs, search_device(run.config), relevance_sets(dataset)
    queries = np.arange(len(sets))
    title = _title(run)
    if len(queries) > _MAX_QUERIES:
        queries = np.sort(np.random.default_rng(options.seed).permutation(queries)[:_MAX_QUERIES])
        title += f", a random sample of {_MAX_QUERIES} queries"
    exclude = inputs.exclude()
    counts = figures.similarity_counts(
        inputs.query_block()[queries],
        inputs.database,
        [sets[i] for i in queries],
        exclude=None if exclude is None else exclude[queries],
        device=device,
    )
    path = target / "similarities.png"
    ordered = {name: counts[name] for name in RELEVANCES[dataset.protocols] if name in counts}
    figures.draw_similarities(path, title, ordered, _reranked_scores(run, queries))
    return [path]


def _reranked_scores(run: FinishedRun, queries: np.ndarray) -> dict[str, np.ndarray]:
    """Return the reranking scores of the database images in the shortlists, grouped by their relevance to the query.

    Args:
        run: finished evaluation.
        queries: (n,) numbers of the queries.

    Returns:
        Scores (n_pairs,) of all pairs of a query and a database image, by relevance such as "positive" or "negative";
        an empty dict if there was no reranking.
    """
    if "rerank" not in run.stages:
        return {}
    assert run.dataset is not None
    scores, ids = run.stages["rerank"]
    sets = relevance_sets(run.dataset)
    by_relevance: dict[str, list[np.ndarray]] = {name: [] for name in RELEVANCES[run.dataset.protocols]}
    for query in queries:
        remaining = np.isfinite(scores[query]) & (ids[query] >= 0)
        for name, members in sets[query].items():
            selected = np.isin(ids[query], members) & remaining
            by_relevance[name].append(scores[query][selected])
            remaining &= ~selected
        by_relevance["negative"].append(scores[query][remaining])
    return {name: np.concatenate(parts) for name, parts in by_relevance.items() if any(len(part) for part in parts)}


def draw_map(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    """Draw a sample of the descriptors, projected onto a plane and colored by landmark; return the figure's path."""
    inputs, dataset, method, seed = run.inputs, run.dataset, options.method, options.seed
    total = len(inputs.database)
    landmarks = [None] * total if dataset is None else landmarks_of(dataset, total)
    ids = figures.sample_images(landmarks, options.images, inputs.database.skipped, seed)
    queries = np.empty(0, np.int64)
    # With leave-one-out, the queries are database images, which the map already shows.
    if dataset is None or not dataset.leave_one_out:
        order = np.random.default_rng([seed, 1]).permutation(len(inputs.queries))
        queries = np.sort(order[: max(1, options.images // 4)])
    X, Q = inputs.database.take(ids), inputs.queries.take(queries)
    points, query_points, axes = figures.project(X, Q, method, seed)
    clusters = None if dataset is None else dataset.clusters
    query_landmarks = [clusters[int(i)] or None if clusters is not None else None for i in queries]
    thumbnails: dict[int, np.ndarray] = {}
    if dataset is not None and not run.uses_descriptor_files:
        cells = sorted(figures.grid_cells(points, *_GRID).values())
        thumbnails = _thumbnails([(n, run.images[int(ids[n])]) for n in cells])
    axes_text = axes[0].split(" ")[0] if method == "tsne" else "their two main axes"
    title = f"{_title(run)}: descriptors by {axes_text}, {len(ids)} of {total} images"
    path = target / f"map-{method}.png"
    labeled_points = points, [landmarks[i] for i in ids]
    figures.draw_map(path, title, axes, labeled_points, (query_points, query_landmarks), thumbnails, _GRID)
    return [path]


def _thumbnails(items: Sequence[tuple[int, ImageItem]]) -> dict[int, np.ndarray]:
    """Return a thumbnail (H, W, 3) of each image, for the map.

    Args:
        items: (number, image) pairs. The number is the key of the image's thumbnail in the returned dict.

    Returns:
        Dict number -> thumbnail; empty if an image is unreadable, in which case the map is drawn without thumbnails.
    """
    try:
        return {n: read_image(item.path, max_side=_THUMBNAIL_SIDE) for n, item in items}
    except InputError as error:
        log.warning("cannot load the thumbnails, drawing the map without them: %s", error)
        return {}


def landmarks_of(dataset: EvaluationSet, total: int) -> list[str | None]:
    """Return the landmark of each database image; None for images of unknown landmark, such as junk and distractors.

    An image that is positive for queries of several landmarks is assigned to the last of these landmarks.

    Args:
        dataset: evaluation set.
        total: number of database images, including distractors.
    """
    landmarks: list[str | None] = [None] * total
    if isinstance(dataset.landmark_truth, RecognitionTruth):
        labels = dataset.landmark_truth.labels
        return [str(label) for label in labels] + landmarks[len(labels) :]
    for entry, name in zip(relevance_sets(dataset), dataset.clusters or (), strict=bool(dataset.clusters)):
        for kind, ids in entry.items():
            for image in ids if kind != "junk" else ():
                landmarks[int(image)] = name
    return landmarks


def _title(run: FinishedRun) -> str:
    """Return the names of the data set and the weights, as a title for figures."""
    weights = Path(str(run.summary["weights"]))
    short = weights.parent.name if weights.parent.name and weights.suffix == ".safetensors" else str(weights)
    return f"{run.summary['dataset']}, weights {short}"


def _write_index(run: FinishedRun, target: Path) -> None:
    """Write `index.html`, a page that shows all PNG figures in the folder `target`."""
    files = [path.name for path in sorted(target.glob("*.png"))]
    title = html.escape(printable(f"{_title(run)}: {run.folder.name}"))
    # A relative URL starts with "./", because the part of a name before a colon would be taken for its scheme.
    names = [(html.escape(printable(file)), f"./{quote(os.fsencode(file))}") for file in files]
    body = "".join(
        f'<h2 id="{number}">{name.removesuffix(".png")}</h2>\n<a href="{url}">'
        f'<img src="{url}" alt="{name}" loading="lazy"></a>\n'
        for number, (name, url) in enumerate(names)
    )
    links = " · ".join(f'<a href="#{i}">{name.removesuffix(".png")}</a>' for i, (name, _) in enumerate(names))
    style = "body{font-family:sans-serif;margin:1.5em}img{max-width:100%;border:1px solid #ddd}"
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>\n'
    write_text(target / "index.html", f"{page}<h1>{title}</h1>\n<p>{links}</p>\n{body}</html>\n")


DRAWN: dict[str, Callable[[FinishedRun, Path, FigureOptions], list[Path]]] = {
    "sheets": draw_sheets,
    "activation": draw_activation,
    "curves": draw_curves,
    "similarities": draw_similarities,
    "map": draw_map,
}
"""Drawing function for each kind of figure."""
