"""Draw images that show queries and their top results, for the stages of one run or for two runs side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from superglobal.data.evaluation_set import EvaluationSet
from superglobal.data.images import ImageItem, read_image
from superglobal.errors import printable
from superglobal.reporting.results import Stages, cosine_texts
from superglobal.utils.io import write_atomically

# Sizes in pixels: longer side of a thumbnail, width of the colored border, gap between thumbnails, height of a caption,
# height of a title line in a comparison, and gap between the two rankings of a comparison.
_SIDE, _BORDER, _GAP, _CAPTION, _TITLE, _BETWEEN = 148, 5, 6, 14, 22, 18
_FRAME = _SIDE + 2 * _BORDER
_CELL, _LINE = _FRAME + _GAP, _FRAME + _CAPTION + _GAP
_COLUMNS = 5  # number of results per row of a comparison
_BOX = "#ffe600"
COLORS = {
    "easy": "#009e73",
    "positive": "#009e73",
    "hard": "#e69f00",
    "junk": "#8c8c8c",
    "negative": "#d55e00",
    "query": "#0072b2",
    "unlabeled": "#bdbdbd",
}
"""Relevance of an image to a query -> color. The colors are from the color-blind safe palette of Okabe and Ito."""
RELEVANCES = {
    "revisited": ("easy", "hard", "junk", "negative"),
    "labels": ("positive", "junk", "negative"),
    "landmarks": ("positive", "negative"),
    "none": ("unlabeled",),
}
"""Value of `EvaluationSet.protocols` -> possible relevances of an image to a query, which are keys of `COLORS`."""


@dataclass(frozen=True)
class Ranking:
    """Top results of a query, as ranked by one stage of a run."""

    name: str  # title above the results
    scores: np.ndarray  # (k,) scores of the results to show, best first
    ids: np.ndarray  # (k,) database ids of these results; -1 leaves the place of a result empty


@dataclass(frozen=True)
class Comparison:
    """One or two rankings of the database for the same query, to be shown side by side."""

    query: int  # index of the query
    title: str
    rankings: Sequence[Ranking]
    full: Sequence[np.ndarray]  # for each ranking, the (n,) int64 ids of all ranked images, including hidden ones


def draw_sheet(
    path: Path, dataset: EvaluationSet, database: Sequence[ImageItem], stages: Stages, queries: int, ranks: int
) -> None:
    """Write a PNG file that shows queries and their top results, with one row for each query and stage.

    The color of the border of a result shows its relevance. The caption contains the rank, the cosine similarity and
    the file name.

    Args:
        path: PNG file to write.
        dataset: evaluation set that contains the queries and, if known, the ground truth.
        database: database images, indexed by id, including distractors.
        stages: stage -> scores and ids of the results, each of shape (Q, k) for all Q queries, best first.
        queries: number of queries to show; they are spread evenly over the list of all queries.
        ranks: number of results to show per query.
    """
    shown = spread_evenly(len(dataset.queries), queries)
    ranks = min(ranks, next(iter(stages.values()))[1].shape[1])
    line = _LINE + _CAPTION
    height = line * len(shown) * len(stages) + 2 * _CAPTION + _GAP
    sheet = Image.new("RGB", (_CELL * (ranks + 1) + _GAP, height), "white")
    _draw_legend(sheet, dataset)
    y = 2 * _CAPTION
    for query in shown:
        for stage, (_, ids) in stages.items():
            item = dataset.queries[query]
            _draw_cell(sheet, _GAP, y, query_thumbnail(item), "query", stage, item.path.name)
            texts = cosine_texts(stages, stage, query, ranks)
            sheet.paste(result_strip(dataset, database, query, texts, ids[query, :ranks]), (_GAP + _CELL, y))
            y += line
    _save(path, sheet)


def draw_comparisons(
    path: Path, dataset: EvaluationSet, database: Sequence[ImageItem], comparisons: Sequence[Comparison]
) -> None:
    """Write a PNG file that shows one or two rankings for each query side by side, with five results per row.

    The caption of a result contains the rank, the score and the relevance. If there are two rankings, the caption also
    contains the rank in the other ranking. A triangle in the second ranking shows whether a result moved up or down.

    Args:
        path: PNG file to write.
        dataset: evaluation set that contains the queries and, if known, the ground truth.
        database: database images, indexed by id, including distractors.
        comparisons: comparisons to draw, from top to bottom.
    """
    width = _CELL + max(len(c.rankings) for c in comparisons) * (_COLUMNS * _CELL + _BETWEEN) + _GAP
    heights = [2 * _TITLE + _LINE * max(-(-len(r.ids) // _COLUMNS) for r in c.rankings) for c in comparisons]
    sheet = Image.new("RGB", (width, 2 * _CAPTION + sum(heights) + _GAP), "white")
    _draw_legend(sheet, dataset)
    thumbnails: dict[int, Image.Image] = {}
    y = 2 * _CAPTION
    for comparison, height in zip(comparisons, heights, strict=True):
        _draw_comparison(sheet, y, dataset, database, comparison, thumbnails)
        y += height
    _save(path, sheet)


def _draw_comparison(
    sheet: Image.Image,
    y: int,
    dataset: EvaluationSet,
    database: Sequence[ImageItem],
    comparison: Comparison,
    thumbnails: dict[int, Image.Image],
) -> None:
    draw, query = ImageDraw.Draw(sheet), comparison.query
    draw.line((_GAP, y, sheet.width - _GAP, y), fill="#bdbdbd")
    draw.text((_GAP, y + 3), comparison.title, fill="black", font=ImageFont.load_default(14))
    _draw_cell(sheet, _GAP, y + 2 * _TITLE, query_thumbnail(dataset.queries[query]), "query", "query")
    for side, ranking in enumerate(comparison.rankings):
        left = _CELL + _GAP + _BETWEEN + side * (_COLUMNS * _CELL + _BETWEEN)
        draw.text((left, y + _TITLE + 3), ranking.name, fill="black", font=ImageFont.load_default(14))
        for rank, (score, image) in enumerate(zip(ranking.scores, ranking.ids.tolist(), strict=True)):
            if image < 0:
                continue
            if image not in thumbnails:
                thumbnails[image] = thumbnail(database[image])
            kind = relevance(dataset, query, image)
            caption = f"{rank + 1}  {score:.3f}" + ("" if kind == "unlabeled" else f"  {kind}")
            position = left + rank % _COLUMNS * _CELL, y + 2 * _TITLE + rank // _COLUMNS * _LINE
            _draw_cell(sheet, *position, thumbnails[image], kind, caption)
            if len(comparison.full) > 1:
                other_rank = find_rank(comparison.full[1 - side], image)
                _draw_movement(sheet, *position, rank, other_rank, is_later=side == 1)


def find_rank(ids: np.ndarray, image: int) -> int | None:
    """Return the 0-based rank of an image in a list of ids, or None if the list does not contain the image."""
    ranks = np.flatnonzero(ids == image)
    return int(ranks[0]) if len(ranks) else None


def _draw_movement(sheet: Image.Image, x: int, y: int, rank: int, other_rank: int | None, is_later: bool) -> None:
    """Write the rank of an image in the other ranking below the image, and mark a changed rank with a triangle.

    Args:
        sheet: figure to draw into.
        x: left edge of the image in pixels, including the border.
        y: upper edge of the image in pixels, including the border.
        rank: 0-based rank in the ranking that is drawn.
        other_rank: 0-based rank in the other ranking; None if the other ranking does not contain the image.
        is_later: True if the ranking that is drawn is the second one. The triangle is drawn only in the second ranking.
    """
    draw, right = ImageDraw.Draw(sheet), x + _FRAME - 2
    text = "not listed" if other_rank is None else f"{'from' if is_later else 'to'} {other_rank + 1}"
    middle = y + _FRAME + _CAPTION // 2 + 1
    if is_later and other_rank is not None and other_rank != rank:
        up = 1 if rank < other_rank else -1
        color = COLORS["query"] if up == 1 else COLORS["negative"]
        base, top = middle + 4 * up, middle - 4 * up
        draw.polygon([(right - 8, base), (right, base), (right - 4, top)], fill=color)
        right -= 12
    draw.text((right, middle), text, fill="black", font=ImageFont.load_default(11), anchor="rm")


def relevance(dataset: EvaluationSet, query: int, image: int) -> str:
    """Return the relevance of a database image to a query, as a key of `COLORS`.

    Args:
        dataset: evaluation set that contains the ground truth, if known.
        query: index of the query.
        image: id of the database image.
    """
    if dataset.gnd is None:
        return "unlabeled"
    entry: dict[str, Any] = dataset.gnd[query]
    return next((name for name in ("easy", "hard", "positive", "junk") if image in entry.get(name, ())), "negative")


def result_strip(
    dataset: EvaluationSet, database: Sequence[ImageItem], query: int, scores: Sequence[str], ids: np.ndarray
) -> Image.Image:
    """Draw the results of a query side by side, each with its rank, score and file name.

    The color of the border of a result shows its relevance.

    Args:
        dataset: evaluation set that contains the ground truth, if known.
        database: database images, indexed by id, including distractors.
        query: index of the query.
        scores: scores of the k results as text, best first.
        ids: (k,) database ids of the results; -1 for no result.

    Returns:
        RGB image of one row of k thumbnails. The place of an id of -1 stays empty.
    """
    strip = Image.new("RGB", (_CELL * max(1, len(ids)), _FRAME + 2 * _CAPTION), "white")
    for rank, (score, image) in enumerate(zip(scores, ids.tolist(), strict=True)):
        if image < 0:
            continue
        kind = relevance(dataset, query, image)
        item = database[image]
        _draw_cell(strip, _CELL * rank, 0, thumbnail(item), kind, f"{rank + 1}  {score}", item.path.name)
    return strip


def query_thumbnail(item: ImageItem) -> Image.Image:
    """Return an RGB thumbnail of the whole image of a query. If the query is a box in the image, the box is framed."""
    image = Image.fromarray(read_image(item.path))
    if item.box is not None:
        width = max(2, round(max(image.size) / _SIDE * 2))
        ImageDraw.Draw(image).rectangle(item.box, outline=_BOX, width=width)
    image.thumbnail((_SIDE, _SIDE))
    return image


def thumbnail(item: ImageItem) -> Image.Image:
    """Return an RGB thumbnail of the whole image, even if the item has a box."""
    return Image.fromarray(read_image(item.path, max_side=_SIDE))


def spread_evenly(count: int, limit: int) -> list[int]:
    """Return min(count, limit) evenly spaced integers from 0 to count - 1, in ascending order."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int)).tolist() if count and limit else []


def _draw_cell(sheet: Image.Image, x: int, y: int, image: Image.Image, kind: str, caption: str, name: str = "") -> None:
    """Draw a thumbnail with a border, a caption and, if given, a second line with a file name, which is shortened."""
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw.rectangle((x, y, x + _FRAME - 1, y + _FRAME - 1), fill=COLORS[kind])
    inner = x + _BORDER, y + _BORDER, x + _FRAME - 1 - _BORDER, y + _FRAME - 1 - _BORDER
    draw.rectangle(inner, fill="#f4f4f4")
    sheet.paste(image, (x + (_FRAME - image.width) // 2, y + (_FRAME - image.height) // 2))
    draw.text((x + 2, y + _FRAME), caption, fill="black", font=font)
    text, kept = printable(name), len(name)
    while draw.textlength(text, font) > _FRAME - 2:  # The ends of a name differ more often than its middle.
        kept -= 1
        text = f"{printable(name)[: kept // 2]}...{printable(name)[-kept // 2 :]}"
    draw.text((x + 2, y + _FRAME + _CAPTION), text, fill="black", font=font)


def _draw_legend(sheet: Image.Image, dataset: EvaluationSet) -> None:
    draw, x = ImageDraw.Draw(sheet), _GAP
    for kind in ("query", *(RELEVANCES[dataset.protocols] if dataset.gnd is not None else ())):
        draw.rectangle((x, 6, x + 12, 18), fill=COLORS[kind])
        draw.text((x + 16, 4), kind, fill="black", font=ImageFont.load_default(12))
        x += 90


def _save(path: Path, sheet: Image.Image) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
