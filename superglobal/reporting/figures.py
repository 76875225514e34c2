"""Figures by matplotlib: precision over recall, similarities, a map of descriptors, what a descriptor looks at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from superglobal.reporting.projections import spread
from superglobal.reporting.ranking_figures import COLOURS
from superglobal.reporting.similarities import EDGES
from superglobal.utils.io import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
_STAGES = {"search": ("#0072b2", "--"), "rerank": ("#d55e00", "-")}
_GROUPS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vPX"
_MOST_GROUPS = 28
_LABEL = 26  # characters of a landmark's name
_DPI = 120
_HEAT = "inferno"


def _figure(width: float, height: float) -> Figure:
    """Without pyplot: no window, no global state, whatever backend is set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def draw_curves(
    path: Path, title: str, curves: Mapping[str, Mapping[str, np.ndarray]], counts: Mapping[str, int], metric: str
) -> None:
    """Precision over recall, one panel per protocol, one line per stage.

    Args:
        path: of the PNG.
        title: of the figure.
        curves: stage -> protocol -> (bins,) mean precision over each part of recall, NaN where there is none.
        counts: protocol -> how many queries the mean is over.
        metric: what the area is called.
    """
    protocols = list(next(iter(curves.values())))
    figure = _figure(4.2 * len(protocols) + 0.3, 4.4)
    figure.suptitle(title)
    for axes, protocol in zip(figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True):
        for stage, one in curves.items():
            colour, style = _STAGES[stage]
            values = one[protocol]
            recall = (np.arange(len(values)) + 0.5) / len(values)
            label = f"{stage}: {metric} {100 * values.mean():.2f}" if counts[protocol] else f"{stage}: no queries"
            axes.plot(recall, values, style, color=colour, label=label, linewidth=1.8)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", title=f"{protocol} ({counts[protocol]} queries)")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=9)
    pooled = "of all predictions, surest first" if metric == "GAP" else "mean over queries"
    figure.axes[0].set_ylabel(f"precision, {pooled}")
    _save(figure, path)


def draw_similarities(
    path: Path, title: str, counts: Mapping[str, np.ndarray], reranked: Mapping[str, np.ndarray]
) -> None:
    """Distributions of similarities by what an image is to a query, each of area 1.

    Args:
        path: of the PNG.
        title: of the figure.
        counts: what an image is -> (bins,) pairs, in the bins of `similarities.EDGES`.
        reranked: the same -> scores after reranking of the listed images; empty for no second panel.
    """
    figure = _figure(6.6 if not reranked else 11.6, 4.4)
    figure.suptitle(title)
    panels = figure.subplots(1, 1 + bool(reranked), squeeze=False)[0]
    # Two bins as one: what is drawn has to be seen, what is counted may be finer.
    _densities(panels[0], {name: one.reshape(-1, 2).sum(axis=1) for name, one in counts.items()}, EDGES[::2])
    panels[0].set(xlabel="similarity (cosine)", title="search: all pairs of query and image", ylabel="density")
    if reranked:
        everything = np.concatenate(list(reranked.values()))
        edges = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-6), 61)
        _densities(panels[1], {name: np.histogram(one, edges)[0] for name, one in reranked.items()}, edges)
        panels[1].set(xlabel="score", title="after reranking: the listed images")
    _save(figure, path)


def _densities(axes: Any, counts: Mapping[str, np.ndarray], edges: np.ndarray) -> None:
    used = np.flatnonzero(sum(counts.values(), np.zeros(len(edges) - 1)))
    width = edges[1] - edges[0]
    for name, one in counts.items():
        if one.sum():
            density = one / one.sum() / width
            style = {"color": COLOURS[name], "linestyle": "--" if name == "junk" else "-"}
            label = f"{name} ({one.sum():,} pairs)"
            axes.stairs(density, edges, label=label, linewidth=1.6, **style)
            if name != "junk":
                axes.stairs(density, edges, fill=True, alpha=0.15, color=COLOURS[name])
    if len(used):
        axes.set_xlim(edges[used[0]] - 2 * width, edges[used[-1] + 1] + 2 * width)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=9)


def draw_map(
    path: Path,
    title: str,
    axes_names: Sequence[str],
    images: tuple[np.ndarray, Sequence[str | None]],
    queries: tuple[np.ndarray, Sequence[str | None]],
    thumbnails: Mapping[int, np.ndarray],
    grid: tuple[int, int],
) -> None:
    """Descriptors on a plane, coloured by landmark, queries marked; beside it the images that lie there.

    Args:
        path: of the PNG.
        title: of the figure.
        axes_names: of the two axes.
        images, queries: points (n, 2) and the landmark of each, None for no known one.
        thumbnails: number of an image -> (h, w, 3) uint8; none for no second panel.
        grid: columns and rows of cells of `embedding.spread`, of which each shows one thumbnail.
    """
    figure = _figure(17 if thumbnails else 9.5, 7.6)
    figure.suptitle(title)
    panels = figure.subplots(1, 1 + bool(thumbnails), squeeze=False)[0]
    styles = _styles([*images[1], *queries[1]])
    _points(panels[0], images, queries, styles)
    panels[0].set(xlabel=axes_names[0], ylabel=axes_names[1], xticks=[], yticks=[])
    if thumbnails:
        _photos(panels[1], images, thumbnails, grid, styles)
    _save(figure, path)


def map_thumbnails(points: np.ndarray, grid: tuple[int, int]) -> list[int]:
    """Which images `draw_map` wants to show."""
    return sorted(spread(points, *grid).values())


def _styles(groups: Sequence[str | None]) -> dict[str | None, tuple[str, str]]:
    """Colour and marker of each landmark, those of most images first; the rest have none of their own."""
    names, counts = np.unique([group for group in groups if group is not None] or [""], return_counts=True)
    first = [str(name) for name in names[np.argsort(-counts, kind="stable")][:_MOST_GROUPS]]
    return {name: (_GROUPS[i % len(_GROUPS)], _MARKERS[i // len(_GROUPS)]) for i, name in enumerate(sorted(first))}


def _points(
    axes: Any,
    images: tuple[np.ndarray, Sequence[str | None]],
    queries: tuple[np.ndarray, Sequence[str | None]],
    styles: Mapping[str | None, tuple[str, str]],
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    groups = np.array([group if group in styles else None for group in images[1]], object)
    others = images[0][[group is None for group in groups]]
    if len(others):
        axes.scatter(*others.T, s=10, color="#bdbdbd", linewidths=0)
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=4, color="#bdbdbd", label="other images"))
    for name, (colour, marker) in styles.items():
        mine = images[0][groups == name]
        if len(mine):
            axes.scatter(*mine.T, s=24, color=colour, marker=marker, linewidths=0.4, edgecolors="white")
            label = str(name).rsplit("/", 1)[-1]
            label = label if len(label) <= _LABEL else f"{label[: _LABEL - 3]}..."
            handles.append(Line2D([], [], linestyle="", marker=marker, markersize=5, color=colour, label=label))
    if len(queries[0]):
        colours = [styles[group][0] if group in styles else "#bdbdbd" for group in queries[1]]
        axes.scatter(*queries[0].T, s=150, c=colours, marker="*", edgecolors="black", linewidths=0.8, zorder=3)
        star = Line2D([], [], linestyle="", label="query", marker="*", markersize=11, color="white")
        star.set_markeredgecolor("black")
        handles.append(star)
    axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(handles) // 25)


def _photos(
    axes: Any,
    images: tuple[np.ndarray, Sequence[str | None]],
    thumbnails: Mapping[int, np.ndarray],
    grid: tuple[int, int],
    styles: Mapping[str | None, tuple[str, str]],
) -> None:
    """Each thumbnail in the cell that it was chosen for, framed in its landmark's colour."""
    from matplotlib.patches import Rectangle

    for (column, row), image in spread(images[0], *grid).items():
        picture = thumbnails[image]
        height, width = np.array(picture.shape[:2]) / max(picture.shape[:2]) * 0.88
        left, below = column + (1 - width) / 2, row + (1 - height) / 2
        axes.imshow(picture, extent=(left, left + width, below, below + height), interpolation="antialiased")
        colour = styles[images[1][image]][0] if images[1][image] in styles else "#bdbdbd"
        axes.add_patch(Rectangle((left, below), width, height, fill=False, edgecolor=colour, linewidth=2))
    axes.set(xlim=(0, grid[0]), ylim=(0, grid[1]), xticks=[], yticks=[], aspect="equal")
    axes.set_title("the image in the middle of each part of the map")


@dataclass(frozen=True)
class HeatPanel:
    """One picture of an activation map.

    Attributes:
        photo: (H, W, 3) uint8.
        shares: (H, W), what each pixel adds to a similarity; None for the photo alone.
        caption: above it.
        relevance: a key of `COLOURS`, for the frame.
    """

    photo: np.ndarray
    shares: np.ndarray | None
    caption: str
    relevance: str


def draw_activation(path: Path, title: str, columns: Sequence[Sequence[HeatPanel | None]]) -> None:
    """Heat over photos: each lights up from black (nothing, or less) to yellow (its own largest share).

    Args:
        path: of the PNG.
        title: of the figure.
        columns: of panels from top to bottom, all of one length; None leaves a place free.
    """
    from matplotlib.cm import ScalarMappable

    figure = _figure(2.6 * len(columns) + 0.7, 2.75 * len(columns[0]) + 0.6)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(columns[0]), len(columns), squeeze=False)
    for across, column in enumerate(columns):
        for down, panel in enumerate(column):
            axes = grid[down, across]
            axes.set(xticks=[], yticks=[])
            if panel is None:
                axes.axis("off")
                continue
            axes.imshow(panel.photo if panel.shares is None else heated(panel.photo, panel.shares))
            axes.set_title(panel.caption, fontsize=8)
            for spine in axes.spines.values():
                spine.set(color=COLOURS[panel.relevance], linewidth=3)
    bar = figure.colorbar(ScalarMappable(cmap=_HEAT), ax=grid, shrink=0.5, aspect=30)
    bar.set_label("share of the similarity, of the picture's largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _save(figure, path)


def heated(photo: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The photo in grey, its shares over it in colour: (H, W, 3) uint8. Shares below zero count as zero."""
    from matplotlib import colormaps

    strength = np.clip(shares, 0, None)
    strength = strength / max(strength.max(), 1e-12)
    colour = colormaps[_HEAT](strength)[..., :3]
    grey = np.repeat(photo.mean(axis=2, keepdims=True), 3, axis=2) / 255
    # Bright photos are dimmed, or their dark heat would look like much.
    cover = 0.45 + 0.2 * strength[..., None]
    return np.clip(255 * ((1 - cover) * 0.8 * grey + cover * colour), 0, 255).astype(np.uint8)
