"""A sheet of queries with their ranked results, before and after reranking."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from superglobal.data.images import ImageItem, read_image
from superglobal.data.sets import EvaluationSet
from superglobal.files import write_atomically
from superglobal.retrieval.report import Stages

_SIDE, _BORDER, _GAP, _TEXT = 148, 5, 6, 14
_COLOURS = {
    "easy": "#1a9850",
    "positive": "#1a9850",
    "hard": "#e0a100",
    "junk": "#8c8c8c",
    "negative": "#d73027",
    "query": "#2166ac",
    "unlabelled": "#bdbdbd",
}


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
    cell, line = _SIDE + 2 * _BORDER + _GAP, _SIDE + 2 * _BORDER + _TEXT + _GAP
    sheet = Image.new("RGB", (cell * (ranks + 1) + _GAP, line * len(shown) * len(stages) + 2 * _TEXT + _GAP), "white")
    _legend(sheet, dataset)
    y = 2 * _TEXT
    for query in shown:
        for stage, (scores, ids) in stages.items():
            _cell(sheet, _GAP, y, _query_picture(dataset.queries[query]), "query", stage)
            for rank in range(ranks):
                image = int(ids[query, rank])
                relevance = _relevance(dataset, query, image)
                picture = Image.fromarray(read_image(database[image].path, max_side=_SIDE))
                caption = f"{rank + 1}  {scores[query, rank]:.3f}"
                _cell(sheet, _GAP + cell * (rank + 1), y, picture, relevance, caption)
            y += line
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _relevance(dataset: EvaluationSet, query: int, image: int) -> str:
    if dataset.gnd is None:
        return "unlabelled"
    entry: dict[str, Any] = dataset.gnd[query]
    return next((name for name in ("easy", "hard", "positive", "junk") if image in entry.get(name, ())), "negative")


def _query_picture(item: ImageItem) -> Image.Image:
    """The whole photo with the query's box drawn into it."""
    picture = Image.fromarray(read_image(item.path))
    if item.box is not None:
        width = max(2, round(max(picture.size) / _SIDE * 2))
        ImageDraw.Draw(picture).rectangle(item.box, outline="#ffe600", width=width)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _cell(sheet: Image.Image, x: int, y: int, picture: Image.Image, relevance: str, caption: str) -> None:
    frame = _SIDE + 2 * _BORDER
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x, y, x + frame - 1, y + frame - 1), fill=_COLOURS[relevance])
    draw.rectangle((x + _BORDER, y + _BORDER, x + frame - 1 - _BORDER, y + frame - 1 - _BORDER), fill="#f4f4f4")
    sheet.paste(picture, (x + (frame - picture.width) // 2, y + (frame - picture.height) // 2))
    draw.text((x + 2, y + frame), caption, fill="black", font=ImageFont.load_default(11))


def _legend(sheet: Image.Image, dataset: EvaluationSet) -> None:
    names = {"revisited": ("easy", "hard", "junk", "negative"), "labels": ("positive", "junk", "negative")}
    names["landmarks"] = ("positive", "negative")
    draw, x = ImageDraw.Draw(sheet), _GAP
    for name in ("query", *names.get(dataset.protocols, ())):
        draw.rectangle((x, 6, x + 12, 18), fill=_COLOURS[name])
        draw.text((x + 16, 4), name, fill="black", font=ImageFont.load_default(12))
        x += 90


def draw_query(item: ImageItem) -> Image.Image:
    """A query's photo, small, its box drawn."""
    return _query_picture(item)


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
    cell = _SIDE + 2 * _BORDER + _GAP
    strip = Image.new("RGB", (cell * max(1, len(ids)), _SIDE + 2 * _BORDER + _TEXT), "white")
    for rank, (score, image) in enumerate(zip(scores, ids.tolist(), strict=True)):
        picture = Image.fromarray(read_image(database[image].path, max_side=_SIDE))
        _cell(strip, cell * rank, 0, picture, _relevance(dataset, query, image), f"{rank + 1}  {score:.3f}")
    return strip


def draw_thumbnail(item: ImageItem) -> Image.Image:
    """A photo, small."""
    return Image.fromarray(read_image(item.path, max_side=_SIDE))


def relevance_of(dataset: EvaluationSet, query: int, image: int) -> str:
    """What a database image is to a query: easy, hard, positive, junk, negative or unlabelled."""
    return _relevance(dataset, query, image)
