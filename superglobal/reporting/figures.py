"""Compute and draw figures of a result.

The figures are precision-recall curves, distributions of similarities, a map of descriptors, and heat maps of images.
Only the functions that draw import matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.metrics.gldv2 import DEPTH, first_hits
from superglobal.reporting.ranking_figures import COLORS
from superglobal.retrieval.rows import Rows, as_queries, as_rows
from superglobal.retrieval.scan import Block, scan
from superglobal.retrieval.scores import pair_scores
from superglobal.utils.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECALL_BINS = 100
"""Number of recall intervals of a precision-recall curve."""
BINS = 200
"""Number of histogram bins for similarities from -1 to 1."""
EDGES = np.linspace(-1, 1, BINS + 1)
"""Edges of the histogram bins. A bin includes its lower edge; the last bin includes both edges."""
PROJECTIONS = ("pca", "tsne")
_STAGES = {"search": ("#0072b2", "--"), "rerank": ("#d55e00", "-")}
_LANDMARK_COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
_OTHER = "#bdbdbd"
_MAX_LANDMARKS = 28
_MAX_LABEL = 26  # maximum number of characters in the label of a landmark
_HEAT = "inferno"


def _figure(width: float, height: float) -> Figure:
    """Create a figure of the given size in inches.

    The figure is created without pyplot, which would keep it in global state and may need a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def trapezoidal_steps(ranks: Any, n_positives: int) -> np.ndarray:
    """Return the precision-recall curve of a query of Revisited Oxford or Paris.

    The area under the curve is the AP of the query, see `metrics.revisited.average_precision`. Recall rises from 0 to 1
    in n_positives equal steps, one per positive. In step j = 0, 1, ..., precision changes linearly from j / r_j (1 if
    r_j = 0) to (j + 1) / (r_j + 1), where r_j is the rank of the j-th retrieved positive.

    Args:
        ranks: (P,) 0-based ranks of the retrieved positives, in a ranking without the ignored images.
        n_positives: number of positives, including those that were not retrieved.

    Returns:
        (n_positives, 2) float64 precision at the start and the end of each step; 0 for positives that were not
        retrieved.
    """
    r = np.sort(np.asarray(ranks, dtype=np.int64))
    steps, j = np.zeros((n_positives, 2)), np.arange(len(r))
    steps[: len(r), 0] = np.where(r == 0, 1.0, j / np.maximum(r, 1))
    steps[: len(r), 1] = (j + 1) / (r + 1)
    return steps


def rectangular_steps(predicted: np.ndarray, relevant: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Return the precision-recall curve of a query of GLDv2.

    The area under the curve is the AP of the query, see `metrics.gldv2.average_precision_at`.

    Args:
        predicted: (m,) ids of the retrieved images, best first.
        relevant: ids of the positives.
        depth: number of retrieved images that count.

    Returns:
        (min(len(relevant), depth), 2) float64 precision at the start and the end of each step of recall. Both values
        are equal, because precision is constant within a step.
    """
    ranks = np.flatnonzero(first_hits(predicted, relevant, depth)) + 1
    steps = np.zeros((min(len(relevant), depth), 2))
    steps[: len(ranks)] = (np.arange(1, len(ranks) + 1) / ranks)[:, None]
    return steps


def precision_over_recall(steps: np.ndarray, bins: int = RECALL_BINS) -> np.ndarray:
    """Return the mean precision in each of several equal intervals of recall.

    The mean over all intervals is the area under the curve.

    Args:
        steps: (n, 2) precision at the start and the end of n >= 1 equal steps of recall, with linear interpolation in
            between.
        bins: number of intervals.

    Returns:
        (bins,) float64 mean precision, from 0 to 1.
    """
    n = len(steps)
    # `area_before[j]` is the area under the curve before step j. Recall is measured in steps, so a step has width 1.
    area_before = np.concatenate([[0.0], np.cumsum(steps.mean(axis=1))])
    edges = np.linspace(0, n, bins + 1)
    step = np.minimum(edges.astype(np.int64), n - 1)
    inside = edges - step
    low, high = steps[step].T
    return np.diff(area_before[step] + low * inside + (high - low) * inside**2 / 2) * bins / n


def precision_curves(steps: Sequence[np.ndarray], bins: int = RECALL_BINS) -> np.ndarray:
    """Return the mean precision of several queries in equal intervals of recall.

    Args:
        steps: for each query, the precision (n, 2) at the start and the end of each of its n equal steps of recall;
            empty for a query without positives.
        bins: number of intervals.

    Returns:
        (Q, bins) float64 mean precision, from 0 to 1; NaN for queries without positives.
    """
    return np.stack([precision_over_recall(s, bins) if len(s) else np.full(bins, np.nan) for s in steps])


def draw_curves(
    path: Path, title: str, curves: Mapping[str, Mapping[str, np.ndarray]], counts: Mapping[str, int], metric: str
) -> None:
    """Draw precision-recall curves, with one panel per protocol and one curve per stage (search, rerank).

    Args:
        path: PNG file to write.
        title: title of the figure.
        curves: stage -> protocol -> (bins,) mean precision in equal intervals of recall; NaN if there are no queries.
        counts: protocol -> number of queries.
        metric: name of the metric that the area under the curve equals, shown in the legend.
    """
    protocols = list(next(iter(curves.values())))
    figure = _figure(4.2 * len(protocols) + 0.3, 4.4)
    figure.suptitle(title)
    for axes, protocol in zip(figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True):
        for stage, by_protocol in curves.items():
            color, style = _STAGES[stage]
            values = by_protocol[protocol]
            recall = (np.arange(len(values)) + 0.5) / len(values)
            label = f"{stage}: {metric} {100 * values.mean():.2f}" if counts[protocol] else f"{stage}: no queries"
            axes.plot(recall, values, style, color=color, label=label, linewidth=1.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", title=f"{protocol} ({counts[protocol]} queries)")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=9)
    over = "of all predictions, most confident first" if metric == "GAP" else "mean over queries"
    figure.axes[0].set_ylabel(f"precision, {over}")
    _save(figure, path)


def bin_of(scores: np.ndarray) -> np.ndarray:
    """Return the index of the histogram bin that contains each similarity, as int64. `EDGES` defines the bins."""
    return np.clip(np.floor((scores + 1) * (BINS / 2)), 0, BINS - 1).astype(np.int64)


def similarity_counts(
    Q: Any,
    X: Any,
    relevant: Sequence[Mapping[str, Any]],
    *,
    exclude: np.ndarray | None = None,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
) -> dict[str, np.ndarray]:
    """Compute one histogram of similarities per relevance, over all pairs of a query and a database image.

    The counts are exact: rounding never moves a pair to a neighboring bin.

    Args:
        Q: (Q, D) query descriptors.
        X: (N, D) database descriptors, or any other type that `as_rows` accepts. The database is read once, and rows
            that it marks as skipped are not counted.
        relevant: for each query, a dict from the name of a relevance, such as "easy", to the ids of the database images
            with this relevance. An image has at most one relevance to a query.
        exclude: (Q,) id of one database image per query that is not counted, such as the query itself; None to count
            all images.
        device: device of the computation; None for the default.
        block_rows: number of database rows read at a time.

    Returns:
        Relevance -> (BINS,) int64 number of pairs in each bin. "negative" contains the pairs with no other relevance.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    (counter,) = scan(queries, rows, lambda tolerance: [_BinCounter(tolerance)], exclude, device, block_rows)
    names = dict.fromkeys(name for ids in relevant for name in ids)
    counts = {name: _count_pairs(queries, rows, [ids.get(name, ()) for ids in relevant], exclude) for name in names}
    return {**counts, "negative": counter.counts - sum(counts.values(), np.zeros(BINS, np.int64))}


def _count_pairs(queries: np.ndarray, rows: Rows, ids: Sequence[Any], exclude: np.ndarray | None) -> np.ndarray:
    """Compute the histogram of similarities over given pairs of a query and a database image.

    Args:
        queries: (Q, D) float32 query descriptors.
        rows: database descriptors; rows that are marked as skipped are not counted.
        ids: for each query, ids of the database images that are paired with the query.
        exclude: (Q,) id of one database image per query that is not counted; None to count all images.

    Returns:
        (BINS,) int64 number of pairs in each bin.
    """
    query_of = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    row_of = np.concatenate([np.asarray(row, np.int64) for row in ids])
    counted = ~np.isin(row_of, rows.skipped)
    if exclude is not None:
        counted &= row_of != exclude[query_of]
    scores = pair_scores(queries, rows, query_of[counted], row_of[counted])
    return np.bincount(bin_of(scores), minlength=BINS)


class _BinCounter:
    """Histogram of all similarities that `scan` computes.

    A rounding error could move a similarity near the edge of a bin to the neighboring bin. Such similarities are
    therefore recomputed in float64.

    Args:
        tolerance: largest rounding error of a similarity in float32.
    """

    def __init__(self, tolerance: float) -> None:
        self.counts = np.zeros(BINS, np.int64)
        # Similarities that are closer to an edge of their bin than this fraction of a bin could be rounded into the
        # neighboring bin.
        self._guard = BINS / 2 * tolerance + 1e-4

    def finish(self) -> float:
        return 0.0

    def add(self, block: Block) -> None:
        position = (block.scores + 1) * (BINS / 2)
        counted = torch.isfinite(position)
        near = counted & ((position - position.round()).abs() < self._guard)
        certain = position[counted & ~near].floor().clamp(0, BINS - 1).long()
        self.counts += torch.bincount(certain, minlength=BINS).cpu().numpy()
        query_of, row_of = (index.cpu().numpy() for index in near.nonzero(as_tuple=True))
        self.counts += np.bincount(bin_of(block.pair_scores(query_of, row_of)), minlength=BINS)


def draw_similarities(
    path: Path, title: str, counts: Mapping[str, np.ndarray], reranked: Mapping[str, np.ndarray]
) -> None:
    """Draw the distribution of similarities for each relevance. Each distribution is normalized to area 1.

    Args:
        path: PNG file to write.
        title: title of the figure.
        counts: relevance -> (BINS,) number of pairs in each bin, from `similarity_counts`.
        reranked: relevance -> scores of the images in the shortlists after reranking, shown in a second panel; empty
            for no second panel.
    """
    figure = _figure(6.6 if not reranked else 11.6, 4.4)
    figure.suptitle(title)
    panels = figure.subplots(1, 1 + bool(reranked), squeeze=False)[0]
    # Merge pairs of neighboring bins, because the curves would otherwise be too noisy.
    _draw_densities(panels[0], {name: c.reshape(-1, 2).sum(axis=1) for name, c in counts.items()}, EDGES[::2])
    panels[0].set(xlabel="similarity (cosine)", title="search: all pairs of query and image", ylabel="density")
    if reranked:
        scores = np.concatenate(list(reranked.values()))
        edges = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), 61)
        _draw_densities(panels[1], {name: np.histogram(s, edges)[0] for name, s in reranked.items()}, edges)
        panels[1].set(xlabel="score", title="after reranking: the listed images")
    _save(figure, path)


def _draw_densities(axes: Any, counts: Mapping[str, np.ndarray], edges: np.ndarray) -> None:
    used = np.flatnonzero(sum(counts.values(), np.zeros(len(edges) - 1)))
    width = edges[1] - edges[0]
    for name, count in counts.items():
        if count.sum():
            density, color, is_junk = count / count.sum() / width, COLORS[name], name == "junk"
            label = f"{name} ({count.sum():,} pairs)"
            axes.stairs(density, edges, label=label, linewidth=1.6, color=color, linestyle="--" if is_junk else "-")
            if not is_junk:
                axes.stairs(density, edges, fill=True, alpha=0.15, color=color)
    if len(used):
        axes.set_xlim(edges[used[0]] - 2 * width, edges[used[-1] + 1] + 2 * width)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)


def sample_images(landmarks: Sequence[str | None], count: int, skipped: np.ndarray, seed: int) -> np.ndarray:
    """Choose images for the map of descriptors at random.

    At least half of the images have a known landmark, if there are enough such images.

    Args:
        landmarks: landmark of each database image; None if unknown.
        count: maximum number of images to choose.
        skipped: ids of the images without a descriptor. These images cannot be chosen.
        seed: seed of the random choice.

    Returns:
        (n,) int64 ids of the chosen images, in ascending order.
    """
    rng = np.random.default_rng(seed)
    known = np.array([landmark is not None for landmark in landmarks])
    available = np.ones(len(landmarks), bool)
    available[skipped] = False
    with_landmark, without = (rng.permutation(np.flatnonzero(available & mask)) for mask in (known, ~known))
    n = min(len(with_landmark), max(count - len(without), (count + 1) // 2))
    return np.sort(np.concatenate([with_landmark[:n], without[: count - n]]))


def principal_plane(X: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project vectors onto their first two principal components.

    The sign of a component is chosen so that its entry of largest magnitude is positive.

    Args:
        X: (n, D) vectors that define the components.
        others: (m, D) more vectors to project onto the same components.

    Returns:
        The coordinates of `X`, (n, 2), the coordinates of `others`, (m, 2), and the fraction of the variance that each
        component explains, (2,); all float64.
    """
    mean = X.mean(axis=0, dtype=np.float64)
    _, lengths, axes = np.linalg.svd(X.astype(np.float64) - mean, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])[:, None]
    return (X - mean) @ axes.T, (others - mean) @ axes.T, lengths[:2] ** 2 / max((lengths**2).sum(), 1e-300)


def project(X: np.ndarray, others: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Project descriptors onto a plane by PCA or t-SNE (van der Maaten and Hinton, 2008).

    PCA is fitted on the images only, see `principal_plane`; t-SNE is fitted on images and queries together.

    Args:
        X: (n, D) descriptors of the images.
        others: (m, D) descriptors of the queries.
        method: one of `PROJECTIONS`.
        seed: seed of t-SNE.

    Returns:
        The coordinates of the images, (n, 2), the coordinates of the queries, (m, 2), and labels for the two axes.

    Raises:
        InputError: there are fewer than five images, or scikit-learn is not installed.
    """
    if len(X) < 5:
        raise InputError(f"map: got {len(X)} images, expected at least 5")
    if method == "pca":
        points, more, fractions = principal_plane(X, others)
        return points, more, [f"axis {i + 1} ({100 * part:.1f} % of the variance)" for i, part in enumerate(fractions)]
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError(
            "--map tsne: scikit-learn is not installed; run `pip install scikit-learn`, or use --map pca"
        ) from error
    rows = np.concatenate([X, others])
    points = TSNE(init="pca", perplexity=min(30.0, (len(rows) - 1) / 3), random_state=seed).fit_transform(rows)
    return points[: len(X)], points[len(X) :], ["t-SNE 1", "t-SNE 2"]


def grid_cells(points: np.ndarray, columns: int, rows: int) -> dict[tuple[int, int], int]:
    """Lay a grid over points, and choose one point in each grid cell, the one nearest to the center of the cell.

    Args:
        points: (n, 2) points; the grid covers their bounding box.
        columns: number of columns of the grid.
        rows: number of rows of the grid.

    Returns:
        (column, row) -> index of the point. Rows are counted from the bottom, and cells without points are left out.
    """
    low, size = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-12)
    position = (points - low) / size * [columns, rows]
    cell = np.minimum(position.astype(np.int64), [columns - 1, rows - 1])
    distance = np.abs(position - cell - 0.5).max(axis=1)
    nearest: dict[tuple[int, int], int] = {}
    for point in np.argsort(distance, kind="stable"):
        nearest.setdefault((int(cell[point, 0]), int(cell[point, 1])), int(point))
    return nearest


def draw_map(
    path: Path,
    title: str,
    axis_labels: Sequence[str],
    images: tuple[np.ndarray, Sequence[str | None]],
    queries: tuple[np.ndarray, Sequence[str | None]],
    thumbnails: Mapping[int, np.ndarray],
    grid: tuple[int, int],
) -> None:
    """Draw projected descriptors as points, colored by landmark, with the queries as stars.

    A second panel divides the same plane into a grid, and shows a thumbnail of one image in each cell.

    Args:
        path: PNG file to write.
        title: title of the figure.
        axis_labels: labels of the two axes.
        images: coordinates of the images, (n, 2), and the landmark of each image; None if unknown.
        queries: coordinates of the queries, (m, 2), and the landmark of each query; None if unknown.
        thumbnails: index of an image that `grid_cells` chose -> its thumbnail, (h, w, 3) uint8; empty for no second
            panel.
        grid: numbers of columns and rows of the grid of thumbnails.
    """
    figure = _figure(17 if thumbnails else 9.5, 7.6)
    figure.suptitle(title)
    panels = figure.subplots(1, 1 + bool(thumbnails), squeeze=False)[0]
    styles = _landmark_styles([*images[1], *queries[1]])
    _draw_points(panels[0], images, queries, styles)
    panels[0].set(xlabel=axis_labels[0], ylabel=axis_labels[1], xticks=[], yticks=[])
    if thumbnails:
        _draw_thumbnails(panels[1], grid_cells(images[0], *grid), images[1], thumbnails, styles)
        panels[1].set(xlim=(0, grid[0]), ylim=(0, grid[1]))
    _save(figure, path)


def _landmark_styles(landmarks: Sequence[str | None]) -> dict[str | None, tuple[str, str]]:
    """Assign colors and markers to the landmarks with the most images.

    Args:
        landmarks: landmark of each image; None if unknown.

    Returns:
        Landmark -> (color, marker), for at most `_MAX_LANDMARKS` landmarks.
    """
    names, counts = np.unique([name for name in landmarks if name is not None] or [""], return_counts=True)
    largest = [str(name) for name in names[np.argsort(-counts, kind="stable")][:_MAX_LANDMARKS]]
    count = len(_LANDMARK_COLORS)
    return {name: (_LANDMARK_COLORS[i % count], _MARKERS[i // count]) for i, name in enumerate(sorted(largest))}


def _draw_points(axes: Any, images: Any, queries: Any, styles: Mapping[str | None, tuple[str, str]]) -> None:
    landmarks = np.array([name if name in styles else None for name in images[1]], object)
    others = images[0][[name is None for name in landmarks]]
    if len(others):
        axes.scatter(*others.T, s=10, color=_OTHER, linewidths=0, label="other images")
    for name, (color, marker) in styles.items():
        points = images[0][landmarks == name]
        if len(points):
            label = str(name).rsplit("/", 1)[-1]
            label = label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 3]}..."
            axes.scatter(*points.T, s=24, color=color, marker=marker, linewidths=0.4, edgecolors="white", label=label)
    if len(queries[0]):
        colors = [styles.get(name, (_OTHER,))[0] for name in queries[1]]
        style = {"s": 150, "marker": "*", "edgecolors": "black", "linewidths": 0.8, "zorder": 3}
        axes.scatter(*queries[0].T, c=colors, **style)
        axes.scatter([], [], color="white", label="query", **style)
    count = len(axes.get_legend_handles_labels()[0])
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + count // 25)


def _draw_thumbnails(axes: Any, cells: Any, landmarks: Any, thumbnails: Any, styles: Any) -> None:
    """Draw thumbnails into the cells of a grid, each with a frame in the color of its landmark.

    Args:
        axes: axes to draw into.
        cells: (column, row) of a cell -> index of the image to draw into this cell.
        landmarks: landmark of each image; None if unknown.
        thumbnails: index of an image -> its thumbnail, (h, w, 3) uint8.
        styles: landmark -> (color, marker), from `_landmark_styles`.
    """
    from matplotlib.patches import Rectangle

    for (column, row), index in cells.items():
        image = thumbnails[index]
        height, width = np.array(image.shape[:2]) / max(image.shape[:2]) * 0.88
        left, bottom = column + (1 - width) / 2, row + (1 - height) / 2
        axes.imshow(image, extent=(left, left + width, bottom, bottom + height), interpolation="antialiased")
        color = styles.get(landmarks[index], (_OTHER,))[0]
        axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=color, linewidth=2))
    axes.set(xticks=[], yticks=[], aspect="equal", title="the image nearest to the center of each grid cell")


@dataclass(frozen=True)
class HeatPanel:
    """Panel in a figure of heat maps, which shows one image."""

    image: np.ndarray  # (H, W, 3) uint8
    shares: np.ndarray | None  # (H, W) contribution of each pixel to a similarity; None for no heat map
    caption: str
    relevance: str  # key of `COLORS` that determines the color of the frame


def draw_heat_maps(path: Path, title: str, columns: Sequence[Sequence[HeatPanel | None]]) -> None:
    """Draw images overlaid with heat maps that show how much each pixel contributes to a similarity.

    The colors range from black (zero or negative contribution) to yellow (largest contribution in the image).

    Args:
        path: PNG file to write.
        title: title of the figure.
        columns: for each column of the figure, its panels from top to bottom. All columns have the same length; None
            leaves a cell empty.
    """
    from matplotlib.cm import ScalarMappable

    figure = _figure(2.6 * len(columns) + 0.7, 2.75 * len(columns[0]) + 0.6)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(columns[0]), len(columns), squeeze=False)
    for axes, panel in zip(grid.T.flat, (panel for column in columns for panel in column), strict=True):
        axes.set(xticks=[], yticks=[])
        if panel is None:
            axes.axis("off")
            continue
        axes.imshow(panel.image if panel.shares is None else heat_overlay(panel.image, panel.shares))
        axes.set_title(panel.caption, fontsize=8)
        for spine in axes.spines.values():
            spine.set(color=COLORS[panel.relevance], linewidth=3)
    bar = figure.colorbar(ScalarMappable(cmap=_HEAT), ax=grid, shrink=0.5, aspect=30)
    bar.set_label("contribution to the similarity, relative to the largest in the image", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _save(figure, path)


def heat_overlay(image: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Convert an image to gray, overlay it with a heat map, and return the result, (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        shares: (H, W) contribution of each pixel to a similarity; negative contributions count as zero.
    """
    from matplotlib import colormaps

    strength = np.clip(shares, 0, None)
    strength = strength / max(strength.max(), 1e-12)
    color = colormaps[_HEAT](strength)[..., :3]
    gray = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2) / 255
    # Dim the image. Otherwise a dark color of the heat map on a bright image would look like a large contribution.
    cover = 0.45 + 0.2 * strength[..., None]
    return np.clip(255 * ((1 - cover) * 0.8 * gray + cover * color), 0, 255).astype(np.uint8)
