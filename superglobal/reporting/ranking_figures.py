"""Sheets of queries with their ranked results, before and after reranking, or by two runs."""

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
from superglobal.reporting.results import Stages
from superglobal.utils.io import write_atomically

_SIDE, _BORDER, _GAP, _TEXT = 148, 5, 6, 14
_CELL, _LINE = _SIDE + 2 * _BORDER + _GAP, _SIDE + 2 * _BORDER + _TEXT + _GAP
_TITLE, _COLUMNS, _BETWEEN, _BOX = 22, 5, 18, "#ffe600"
COLOURS = {
    "easy": "#009e73",
    "positive": "#009e73",
    "hard": "#e69f00",
    "junk": "#8c8c8c",
    "negative": "#d55e00",
    "query": "#0072b2",
    "unlabelled": "#bdbdbd",
}
"""Of what an image is to a query: from the palette of Okabe and Ito, which the colour-blind tell apart."""
KINDS = {
    "revisited": ("easy", "hard", "junk", "negative"),
    "labels": ("positive", "junk", "negative"),
    "landmarks": ("positive", "negative"),
    "none": ("unlabelled",),
}
"""By the protocols of a set, what an image can be to a query."""


@dataclass(frozen=True)
class Ranking:
    """One ranking of a query: its name, and its best `scores` and `ids` (k,), best first; an id of -1 is none."""

    name: str
    scores: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Two rankings of one query, or one alone, under a title. `full`: the ids (n,) of each as far as they are known."""

    query: int
    title: str
    rankings: Sequence[Ranking]
    full: Sequence[np.ndarray]


def draw_sheet(
    path: Path, dataset: EvaluationSet, database: Sequence[ImageItem], stages: Stages, queries: int, ranks: int
) -> None:
    """Write a PNG: per query one line per stage, borders by relevance, the query's box drawn.

    Args:
        path: of the PNG.
        dataset: queries and, where known, ground truth.
        database: images by id, distractors included.
        stages: name -> (scores, ids), each (Q, k).
        queries: how many, spread evenly over the list.
        ranks: how many results of each.
    """
    shown = np.unique(np.linspace(0, len(dataset.queries) - 1, min(queries, len(dataset.queries))).astype(int))
    ranks = min(ranks, next(iter(stages.values()))[1].shape[1])
    sheet = Image.new("RGB", (_CELL * (ranks + 1) + _GAP, _LINE * len(shown) * len(stages) + 2 * _TEXT + _GAP), "white")
    _legend(sheet, dataset)
    y = 2 * _TEXT
    for query in shown:
        for stage, (scores, ids) in stages.items():
            _cell(sheet, _GAP, y, draw_query(dataset.queries[query]), "query", stage)
            for rank in range(ranks):
                image = int(ids[query, rank])
                picture = Image.fromarray(read_image(database[image].path, max_side=_SIDE))
                caption = f"{rank + 1}  {scores[query, rank]:.3f}"
                _cell(sheet, _GAP + _CELL * (rank + 1), y, picture, relevance(dataset, query, image), caption)
            y += _LINE
    _write(path, sheet)


def draw_comparisons(
    path: Path, dataset: EvaluationSet, database: Sequence[ImageItem], comparisons: Sequence[Comparison]
) -> None:
    """Write a PNG: per query its picture, then its rankings side by side, five results a line.

    Under a result stand rank, score and what it is to the query; and where there are two rankings, its place in the
    other one: how far it came up or went down is marked by a triangle.

    Args:
        path: of the PNG.
        dataset: queries and, where known, ground truth.
        database: images by id, distractors included.
        comparisons: in the order in which they are shown.
    """
    most = max(len(one.rankings) for one in comparisons)
    width = _CELL + most * (_COLUMNS * _CELL + _BETWEEN) + _GAP
    heights = [2 * _TITLE + _LINE * max(-(-len(r.ids) // _COLUMNS) for r in one.rankings) for one in comparisons]
    sheet = Image.new("RGB", (width, 2 * _TEXT + sum(heights) + _GAP), "white")
    _legend(sheet, dataset)
    photos: dict[Path, Image.Image] = {}
    y = 2 * _TEXT
    for one, height in zip(comparisons, heights, strict=True):
        _comparison(sheet, y, dataset, database, one, photos)
        y += height
    _write(path, sheet)


def _comparison(
    sheet: Image.Image,
    y: int,
    dataset: EvaluationSet,
    database: Sequence[ImageItem],
    one: Comparison,
    photos: dict[Path, Image.Image],
) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.line((_GAP, y, sheet.width - _GAP, y), fill="#bdbdbd")
    draw.text((_GAP, y + 3), one.title, fill="black", font=ImageFont.load_default(14))
    _cell(sheet, _GAP, y + 2 * _TITLE, draw_query(dataset.queries[one.query]), "query", "query")
    for side, ranking in enumerate(one.rankings):
        left = _CELL + _GAP + _BETWEEN + side * (_COLUMNS * _CELL + _BETWEEN)
        draw.text((left, y + _TITLE + 3), ranking.name, fill="black", font=ImageFont.load_default(14))
        for rank, (score, image) in enumerate(zip(ranking.scores, ranking.ids, strict=True)):
            if image < 0:
                continue
            at = left + rank % _COLUMNS * _CELL, y + 2 * _TITLE + rank // _COLUMNS * _LINE
            what, place = relevance(dataset, one.query, int(image)), database[int(image)].path
            if place not in photos:
                photos[place] = Image.fromarray(read_image(place, max_side=_SIDE))
            named = "" if what == "unlabelled" else f"  {what}"
            _cell(sheet, *at, photos[place], what, f"{rank + 1}  {score:.3f}{named}")
            if len(one.full) > 1:
                _movement(sheet, *at, rank, moved_from(one.full[1 - side], int(image)), later=side == 1)


def moved_from(other: np.ndarray, image: int) -> int | None:
    """The 0-based place of an image in another list of ids; None where that does not have it."""
    places = np.flatnonzero(other == image)
    return int(places[0]) if len(places) else None


def _movement(sheet: Image.Image, x: int, y: int, rank: int, other: int | None, later: bool) -> None:
    """In the right corner under a cell the rank in the other list, with a triangle up or down in the later one."""
    draw, right = ImageDraw.Draw(sheet), x + _SIDE + 2 * _BORDER - 2
    text = "not listed" if other is None else f"{'from' if later else 'to'} {other + 1}"
    middle = y + _SIDE + 2 * _BORDER + _TEXT // 2 + 1
    if later and other is not None and other != rank:
        up = 1 if rank < other else -1
        colour = COLOURS["query"] if up == 1 else COLOURS["negative"]
        draw.polygon(
            [(right - 8, middle + 4 * up), (right, middle + 4 * up), (right - 4, middle - 4 * up)], fill=colour
        )
        right -= 12
    draw.text((right, middle), text, fill="black", font=ImageFont.load_default(11), anchor="rm")


def relevance(dataset: EvaluationSet, query: int, image: int) -> str:
    """What an image of the database is to a query: a key of `COLOURS`."""
    if dataset.gnd is None:
        return "unlabelled"
    entry: dict[str, Any] = dataset.gnd[query]
    return next((name for name in ("easy", "hard", "positive", "junk") if image in entry.get(name, ())), "negative")


def draw_query(item: ImageItem) -> Image.Image:
    """A query's whole photo, small, its box drawn."""
    picture = Image.fromarray(read_image(item.path))
    if item.box is not None:
        width = max(2, round(max(picture.size) / _SIDE * 2))
        ImageDraw.Draw(picture).rectangle(item.box, outline=_BOX, width=width)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _cell(sheet: Image.Image, x: int, y: int, picture: Image.Image, relevance: str, caption: str) -> None:
    frame = _SIDE + 2 * _BORDER
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x, y, x + frame - 1, y + frame - 1), fill=COLOURS[relevance])
    draw.rectangle((x + _BORDER, y + _BORDER, x + frame - 1 - _BORDER, y + frame - 1 - _BORDER), fill="#f4f4f4")
    sheet.paste(picture, (x + (frame - picture.width) // 2, y + (frame - picture.height) // 2))
    draw.text((x + 2, y + frame), caption, fill="black", font=ImageFont.load_default(11))


def _legend(sheet: Image.Image, dataset: EvaluationSet) -> None:
    draw, x = ImageDraw.Draw(sheet), _GAP
    names = KINDS[dataset.protocols] if dataset.gnd is not None else ()
    for name in ("query", *names):
        draw.rectangle((x, 6, x + 12, 18), fill=COLOURS[name])
        draw.text((x + 16, 4), name, fill="black", font=ImageFont.load_default(12))
        x += 90


def draw_results(
    dataset: EvaluationSet, database: Sequence[ImageItem], query: int, scores: np.ndarray, ids: np.ndarray
) -> Image.Image:
    """Ranked results of one query side by side, borders by relevance, rank and score under each.

    Args:
        dataset: with ground truth where known.
        database: images by id, distractors included.
        query: its number.
        scores, ids: (k,) of its first results.
    """
    strip = Image.new("RGB", (_CELL * max(1, len(ids)), _SIDE + 2 * _BORDER + _TEXT), "white")
    for rank, (score, image) in enumerate(zip(scores, ids.tolist(), strict=True)):
        picture = Image.fromarray(read_image(database[image].path, max_side=_SIDE))
        _cell(strip, _CELL * rank, 0, picture, relevance(dataset, query, image), f"{rank + 1}  {score:.3f}")
    return strip


def draw_thumbnail(item: ImageItem) -> Image.Image:
    """A photo, small."""
    return Image.fromarray(read_image(item.path, max_side=_SIDE))


def _write(path: Path, sheet: Image.Image) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
