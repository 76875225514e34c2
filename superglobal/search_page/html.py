"""What the page shows, as HTML; every name that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from superglobal.data.images import IMAGE_EXTENSIONS
from superglobal.search_page.image_search import Described, Found, Hit
from superglobal.search_page.thumbnails import as_address

_TALLEST = 320  # px of the photo that is searched for
STAGES = ("decode", "describe", "search", "rerank")
_CHOOSER = f'<input type="file" accept="image/*,{",".join(IMAGE_EXTENSIONS)}" aria-label="Photo to search for">'


def header(name: str, facts: Sequence[str]) -> str:
    """Title, data set and what describes it."""
    told = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return f'<header class="sg-header"><h1>Search by photo</h1><p><b>{escape(name)}</b>{told}</p></header>'


def chooser(most: int) -> str:
    """Before there is a photo; `most` MB of a file."""
    return (
        f'<label class="sg-drop">{_CHOOSER}<b>Choose a photo</b>'
        f"<span>or drop it here, or paste it</span><span>at most {most} MB</span></label>"
    )


def viewer(query: Described) -> str:
    """The whole photo with its box."""
    width, height = query.size
    name, box, part, whole = escape(query.photo.name), "hidden", "all of it", ""
    if query.box is not None:
        x1, y1, x2, y2 = query.box
        sides = {"left": x1 / width, "top": y1 / height, "width": (x2 - x1) / width, "height": (y2 - y1) / height}
        box = f'style="{"; ".join(f"{side}: {100 * value:.3f}%" for side, value in sides.items())}"'
        part = f"the box, {_size(x2 - x1, y2 - y1)}"
        whole = '<button type="button" data-whole>Whole photo</button>'
    frame = f"aspect-ratio: {width} / {height}; width: min(100%, {_TALLEST * width / height:.1f}px)"
    return (
        f'<div class="sg-photo" style="{frame}"><img src="{as_address(query.preview)}" alt="{name}" draggable="false">'
        f'<div class="sg-box" {box}></div></div>'
        f'<p class="sg-about"><b title="{name}">{name}</b><span>{_size(width, height)}; searched for: {part}</span></p>'
        '<p class="sg-hint">Draw a box on the photo to search for a part of it.</p>'
        f'<p class="sg-actions">{whole}<label class="sg-button">Another photo{_CHOOSER}</label></p>'
    )


def _size(width: float, height: float) -> str:
    return f"{width:.0f}&nbsp;&times;&nbsp;{height:.0f}&nbsp;px"


def problem(text: str) -> str:
    """What went wrong, for the user to mend."""
    return f'<p class="sg-problem" role="alert">{escape(text)}</p>'


def label(text: str) -> str:
    """Over what can be picked."""
    return f'<p class="sg-label">{escape(text)}</p>'


def samples(photos: Sequence[tuple[str, str, str]], text: str) -> str:
    """Photos to start from: (what to pick, address of a small picture, name) each; `text` was looked for."""
    if not photos:
        return f'<p class="sg-hint">No file name has “{escape(text)}” in it.</p>' if text else ""
    buttons = "".join(
        f'<button type="button" data-pick="{pick}" title="{escape(name)}" aria-label="Search for {escape(name)}">'
        f'<img src="{address}" alt="" loading="lazy"></button>'
        for pick, address, name in photos
    )
    return f'<div class="sg-samples">{buttons}</div>'


def empty(total: int) -> str:
    """In place of results, before there are any."""
    return f'<p class="sg-empty">Results appear here: the most similar of {total:,} photos, best first.</p>'


def results(found: Found, names: Sequence[str], photos: str, total: int) -> str:
    """The grid of results; `photos` is what the addresses of pictures begin with, `names` are by id."""
    cards = "".join(_card(hit, names[hit.id], photos, found.reranked) for hit in found.hits)
    return f'<p class="sg-summary">{summary(found, total)}</p><div class="sg-results">{cards}</div>'


def summary(found: Found, total: int) -> str:
    """In words: how many are shown, and what reranking has moved."""
    shown = len(found.hits)
    text = f"The first {shown:,} of {total:,} photos"
    if not found.reranked:
        return f"{text}, by similarity."
    moved = [hit for hit in found.hits if hit.rank != hit.before]
    if not moved:
        return f"{text}, reranked: none of them moved."
    text = f"{text}, reranked: {len(moved)} changed place"
    entered = sum(hit.before > shown for hit in moved)
    text += f", {entered} came from beyond the first {shown}" if entered else ""
    climber = max(moved, key=lambda hit: hit.before - hit.rank)
    climbed = climber.before > climber.rank
    return f"{text}; the highest climb is {climber.before} → {climber.rank}." if climbed else f"{text}."


def movement(hit: Hit) -> str:
    """How a photo moved by reranking."""
    if hit.before == hit.rank:
        return '<span class="sg-move sg-same" title="did not move">=</span>'
    up = hit.before > hit.rank
    arrow, kind = ("▲", "sg-up") if up else ("▼", "sg-down")
    told = f"rank {hit.before} before reranking, {hit.rank} after"
    return f'<span class="sg-move {kind}" title="{told}">{hit.before} → {hit.rank} {arrow}</span>'


def _card(hit: Hit, name: str, photos: str, reranked: bool) -> str:
    shown, pictures = escape(name), f"{photos}/database"
    score, kind = "&ndash;", "not among the M reranked"
    if hit.score is not None:
        score, kind = f"{hit.score:.3f}", "score of the reranking" if reranked else "cosine similarity"
    moved = movement(hit) if reranked else ""
    return (
        f'<figure class="sg-hit" data-id="{hit.id}" data-rank="{hit.rank}">'
        f'<a href="{pictures}/large/{hit.id}.jpg" target="_blank" rel="noopener" title="{shown}: open it larger">'
        f'<img src="{pictures}/small/{hit.id}.jpg" alt="{shown}" loading="lazy"></a>'
        f'<figcaption><p><span class="sg-rank">{hit.rank}</span>'
        f'<span class="sg-score" title="{kind}">{score}</span>{moved}</p>'
        f'<p class="sg-name" title="{shown}">{shown}</p>'
        f'<button type="button" data-pick="database/{hit.id}">Search with this</button></figcaption></figure>'
    )


def times(seconds: dict[str, float]) -> str:
    """How long each stage took that there was, and its share of the whole."""
    done, total = [stage for stage in STAGES if stage in seconds], sum(seconds.values())
    bar = "".join(f'<i class="sg-{stage}" style="flex-grow: {seconds[stage] / total:.4f}"></i>' for stage in done)
    told = "".join(
        f'<span><i class="sg-{stage}"></i>{stage} <b data-stage="{stage}">{_milliseconds(seconds[stage])}</b></span>'
        for stage in done
    )
    return f'<div class="sg-bar">{bar}</div><p class="sg-times">{told}<span>together {_milliseconds(total)}</span></p>'


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:,.0f} ms"
