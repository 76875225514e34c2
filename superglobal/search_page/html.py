"""Render the contents of the search page as HTML; all file names and messages are escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from superglobal.data.images import IMAGE_EXTENSIONS
from superglobal.search_page.image_search import MAX_RESULTS, Hit, Query, SearchResult

# Stages of a search, in the order in which the page shows their durations.
STAGES = ("decode", "extract", "search", "rerank")
_JPEG_QUALITY = 85
_ABSENT = (
    "<b>Probably no match in this collection.</b> More than nine of ten photos in it are more similar to their best "
    "match than this query is to its own. This is estimated from similarities alone."
)
_FILE_INPUT = f'<input type="file" accept="image/*,{",".join(IMAGE_EXTENSIONS)}" aria-label="Photo to search for">'


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Encode an image, (H, W, 3) uint8, as JPEG, and return the contents of the file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def render_header(name: str, facts: Sequence[str]) -> str:
    """Render the title of the page, the name of the data set, and facts such as the number of images."""
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return f'<header class="sg-header"><h1>Search by photo</h1><p><b>{escape(name)}</b>{spans}</p></header>'


def render_upload(max_megabytes: int) -> str:
    """Render the upload area that the page shows before the first search."""
    return (
        f'<label class="sg-drop">{_FILE_INPUT}<b>Choose a photo</b>'
        f"<span>or drop or paste one here</span><span>at most {max_megabytes} MB</span></label>"
    )


def render_query(query: Query) -> str:
    """Render the whole query image, the box that is searched for, and the buttons below the image."""
    width, height = query.size
    name, box, searched, button = escape(query.image.name), "hidden", "the whole photo", ""
    if query.box is not None:
        x1, y1, x2, y2 = query.box
        sides = {"left": x1 / width, "top": y1 / height, "width": (x2 - x1) / width, "height": (y2 - y1) / height}
        box = f'style="{"; ".join(f"{side}: {100 * value:.3f}%" for side, value in sides.items())}"'
        searched = f"the box, {_size(x2 - x1, y2 - y1)}"
        button = '<button type="button" data-whole>Search whole photo</button>'
    frame = f"aspect-ratio: {width} / {height}; width: min(100%, calc({width / height:.4f} * var(--sg-height)))"
    source = f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(query.preview)).decode()}"
    return (
        f'<div class="sg-photo" style="{frame}"><img src="{source}" alt="{name}" draggable="false">'
        f'<div class="sg-box" {box}></div></div>'
        f'<p class="sg-about"><b title="{name}">{name}</b>'
        f"<span>{_size(width, height)}; the query is {searched}</span></p>"
        '<p class="sg-hint">To search for a part of the photo, draw a box on it.</p>'
        f'<p class="sg-actions">{button}<label class="sg-button">Choose another photo{_FILE_INPUT}</label></p>'
        + _box_fields(query)
    )


def _box_fields(query: Query) -> str:
    """Render a form for the box of a query in pixels, for users who cannot draw it."""
    width, height = query.size
    x1, y1, x2, y2 = query.box or (0, 0, width, height)
    left, top = math.floor(x1), math.floor(y1)
    fields = {
        "left": (0, width - 1, left),
        "top": (0, height - 1, top),
        "width": (1, width, math.ceil(x2) - left),
        "height": (1, height, math.ceil(y2) - top),
    }
    inputs = "".join(
        f'<label>{name}<input type="number" name="{name}" min="{low}" max="{high}" value="{value}" required></label>'
        for name, (low, high, value) in fields.items()
    )
    return (
        f'<details class="sg-numbers"><summary>Enter the box in pixels</summary><form data-width="{width}" '
        f'data-height="{height}">{inputs}<button class="sg-button">Search box</button></form></details>'
    )


def render_settings_toggle() -> str:
    """Render the element that shows and hides the settings of reranking on a narrow screen."""
    return '<details class="sg-toggle"><summary>Settings of reranking</summary></details>'


def _size(width: float, height: float) -> str:
    """Format a width and height in pixels as HTML, such as "640 × 480 px"."""
    return f"{width:.0f}&nbsp;&times;&nbsp;{height:.0f}&nbsp;px"


def render_error(text: str) -> str:
    """Render an error message."""
    return f'<p class="sg-problem" role="alert">{escape(text)}</p>'


def render_examples(examples: Sequence[tuple[str, str, str]], text: str) -> str:
    """Render buttons with example images.

    Args:
        examples: for each example, its key such as "queries/3", the URL of its thumbnail, and its name.
        text: text that the user entered to filter the images by name; "" if the user entered none. If `examples` is
            empty, a message states that no name contains this text.
    """
    if not examples:
        return f'<p class="sg-hint">No file name contains “{escape(text)}”.</p>' if text else ""
    buttons = "".join(
        f'<button type="button" data-pick="{pick}" title="{escape(name)}" aria-label="Search for {escape(name)}">'
        f'<img src="{url}" alt="" loading="lazy"></button>'
        for pick, url, name in examples
    )
    return f'<div class="sg-samples">{buttons}</div>'


def render_empty(total: int) -> str:
    """Render the text that the page shows in place of results before the first search."""
    return f'<p class="sg-empty">The most similar of {total:,} photos will appear here, best first.</p>'


def render_results(result: SearchResult, names: Sequence[str], url: str, total: int, step: int) -> str:
    """Render the grid of results, and a button that shows more of them.

    Args:
        result: results of a search.
        names: names of the database images, indexed by database id.
        url: first part of the URL of every thumbnail.
        total: number of images that the search could return.
        step: number of results that the button adds.
    """
    cards = "".join(_card(hit, names[hit.id], url, result.reranked) for hit in result.hits)
    note = f'<p class="sg-note">{_ABSENT}</p>' if result.is_absent else ""
    shown, more = len(result.hits), ""
    if (added := min(step, min(total, MAX_RESULTS) - shown)) > 0:
        more = f'<button type="button" class="sg-button sg-more" data-shown="{shown}">Show {added:,} more</button>'
    text = f'<p class="sg-summary" role="status">{summary(result, total)}</p>'
    return f'{note}{text}<div class="sg-results">{cards}</div>{more}'


def summary(result: SearchResult, total: int) -> str:
    """Return text that states how many results are shown, and how many of them changed their rank in reranking.

    Args:
        result: results of a search.
        total: number of images that the search could return.
    """
    shown = len(result.hits)
    text = f"Showing the first {shown:,} of {total:,} photos"
    if not result.reranked:
        return f"{text}, sorted by similarity."
    moved = [hit for hit in result.hits if hit.rank != hit.rank_before]
    if not moved:
        return f"{text}. Reranking did not change their ranks."
    text = f"{text}. Reranking changed the rank of {len(moved)} of them"
    entered = sum(hit.rank_before > shown for hit in moved)
    text += f"; {entered} had a rank beyond {shown}" if entered else ""
    top = max(moved, key=lambda hit: hit.rank_before - hit.rank)
    return f"{text}; the largest gain is {top.rank_before} → {top.rank}." if top.rank_before > top.rank else f"{text}."


def movement(hit: Hit) -> str:
    """Render the ranks of an image before and after reranking, with an arrow; "=" if they are equal."""
    if hit.rank_before == hit.rank:
        return '<span class="sg-move sg-same" title="same rank before and after reranking">=</span>'
    arrow, kind = ("▲", "sg-up") if hit.rank_before > hit.rank else ("▼", "sg-down")
    title = f"rank {hit.rank_before} before reranking, {hit.rank} after"
    return f'<span class="sg-move {kind}" title="{title}">{hit.rank_before} → {hit.rank} {arrow}</span>'


def _card(hit: Hit, name: str, url: str, reranked: bool) -> str:
    """Render one result: its thumbnail, rank, score and name, and a button that searches for this image.

    Args:
        hit: result to render.
        name: name of the image.
        url: first part of the URL of every thumbnail.
        reranked: whether the results were reranked. If so, the rank before reranking is shown, too.
    """
    shown, images = escape(name), f"{url}/database"
    score, kind = "&ndash;", "no score, because the photo is not among the M reranked photos"
    if hit.score is not None:
        score, kind = f"{hit.score:.3f}", "score after reranking" if reranked else "cosine similarity"
    moved = movement(hit) if reranked else ""
    return (
        f'<figure class="sg-hit" data-id="{hit.id}" data-rank="{hit.rank}">'
        f'<a href="{images}/large/{hit.id}.jpg" target="_blank" rel="noopener" title="Open {shown} in a larger size">'
        f'<img src="{images}/small/{hit.id}.jpg" alt="{shown}" loading="lazy"></a>'
        f'<figcaption><p><span class="sg-rank">{hit.rank}</span>'
        f'<span class="sg-score" title="{kind}">{score}</span>{moved}</p>'
        f'<p class="sg-name" title="{shown}">{shown}</p>'
        f'<button type="button" data-pick="database/{hit.id}">Search for this photo</button></figcaption></figure>'
    )


def render_times(seconds: dict[str, float]) -> str:
    """Render the duration of each stage, as text and as a bar that shows each stage's fraction of the total.

    Args:
        seconds: duration in seconds by stage, with keys from `STAGES`.
    """
    stages, total = [stage for stage in STAGES if stage in seconds], sum(seconds.values())
    bar = "".join(f'<i class="sg-{stage}" style="flex-grow: {seconds[stage] / total:.4f}"></i>' for stage in stages)
    texts = "".join(
        f'<span><i class="sg-{stage}"></i>{stage} <b data-stage="{stage}">{_milliseconds(seconds[stage])}</b></span>'
        for stage in stages
    )
    return f'<div class="sg-bar">{bar}</div><p class="sg-times">{texts}<span>total {_milliseconds(total)}</span></p>'


def _milliseconds(seconds: float) -> str:
    """Format a duration in seconds as milliseconds, with one decimal place below 10 ms and none above."""
    return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:,.0f} ms"
