"""Lay out the page in Gradio and answer its events."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from superglobal.config.search_page import ServeConfig
from superglobal.data.images import Box
from superglobal.errors import InputError
from superglobal.search_page import html
from superglobal.search_page.image_search import Query, QueryImage, SearchDatabase

_HERE = Path(__file__).parent
_KEEP_SECONDS = 3600  # of an upload and its descriptor
_MAX_VALUES = {"M": 2000, "K": 50, "beta": 1.0}  # of the sliders, unless the database has fewer or the settings more

Answer = Callable[..., tuple[Any, ...]]


def with_message(answer: Answer) -> Answer:
    """Put the message of an InputError, or an empty one, before the outputs (query, viewer, results, times)."""

    @wraps(answer)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            return "", *answer(*args, **kwargs)
        except InputError as error:
            return html.render_error(str(error)), *[gr.skip()] * 4

    return wrapped


@dataclass(frozen=True)
class PageCallbacks:
    """Answer the events of the page; the state of a user is passed with each event."""

    config: ServeConfig
    database: SearchDatabase
    uploads: Path  # folder of uploaded files
    url: str  # prefix of the URLs of thumbnails

    @with_message
    def photo(self, rerank: bool, M: float, K: float, beta: float, event: gr.EventData) -> tuple[Any, ...]:
        """Search for an uploaded file."""
        path, name = Path(str(event._data.get("path", ""))), str(event._data.get("name", "photo"))
        # The browser sends the path of its upload, and could send any other.
        if not path.resolve().is_relative_to(self.uploads.resolve()) or not path.is_file():
            raise InputError(f"{name} was not uploaded here; choose it again")
        return self._search_image(QueryImage(Path(name).name or "photo", path), None, rerank, M, K, beta)

    @with_message
    def pick(self, rerank: bool, M: float, K: float, beta: float, event: gr.EventData) -> tuple[Any, ...]:
        """Search for an image of the data set, "database/12" or "queries/3"; a query has its box."""
        title, _, text = str(event._data.get("pick", "")).partition("/")
        number = int(text) if text.isascii() and text.isdigit() else -1
        if title != "queries":
            return self._search_image(self.database.search.database_image(number), None, rerank, M, K, beta)
        if not 0 <= number < len(self.database.queries):
            raise InputError(f"there is no query {text}")
        item = self.database.queries[number]
        image = QueryImage(self.database.query_names[number], item.path)
        return self._search_image(image, item.box, rerank, M, K, beta)

    @with_message
    def box(
        self, query: Query | None, rerank: bool, M: float, K: float, beta: float, event: gr.EventData
    ) -> tuple[Any, ...]:
        """Search for a box of the image, (x1, y1, x2, y2) in 0..1 of its sides."""
        box = event._data.get("box")
        is_box = isinstance(box, list) and len(box) == 4
        if query is None or not is_box or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
            raise InputError("choose a photo first, then draw a box on it")
        width, height = query.size
        x1, y1, x2, y2 = (min(1.0, max(0.0, v)) * side for v, side in zip(box, (width, height) * 2, strict=True))
        # Extend the box to whole pixels, at least one.
        pixels = float(math.floor(x1)), float(math.floor(y1)), float(math.ceil(x2)), float(math.ceil(y2))
        return self._search_image(query.image, pixels, rerank, M, K, beta)

    @with_message
    def whole(self, query: Query | None, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        """Search for the whole image instead of the box."""
        if query is None:
            raise InputError("choose a photo first")
        return self._search_image(query.image, None, rerank, M, K, beta)

    @with_message
    def settings(self, query: Query | None, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        """Search again with other settings and the same descriptor."""
        if query is None:
            return (gr.skip(),) * 4
        return gr.skip(), gr.skip(), *self._search(query, rerank, M, K, beta)

    def problem(self, event: gr.EventData) -> str:
        """Report an upload that failed in the browser."""
        name, limit = str(event._data.get("name", "the file")), self.config.page.max_upload
        size = event._data.get("bytes")
        if isinstance(size, int | float) and size > limit * 10**6:
            return html.render_error(
                f"{name} has {size / 1e6:,.1f} MB, more than the {limit} MB allowed: make it smaller"
            )
        return html.render_error(f"{name} could not be uploaded; try again")

    def examples(self, text: str, turn: int) -> str:
        """Show images whose names contain `text`, or without one a random sample: of queries if there are any."""
        lists = {"queries": self.database.query_names, "database": self.database.search.names}
        count, text = self.config.page.samples, text.strip()
        if text:
            matching = (
                (title, number, name)
                for title, names in lists.items()
                for number, name in enumerate(names)
                if text.casefold() in name.casefold()
            )
            shown = [match for match, _ in zip(matching, range(count), strict=False)]
        else:
            title = "queries" if len(lists["queries"]) else "database"
            total = len(lists[title])
            sample = np.random.default_rng(turn).choice(total, min(count, total), replace=False)
            shown = [(title, int(number), lists[title][number]) for number in np.sort(sample)]
        return html.render_examples(
            [(f"{title}/{n}", f"{self.url}/{title}/small/{n}.jpg", name) for title, n, name in shown], text
        )

    def _search_image(
        self, image: QueryImage, box: Box | None, rerank: bool, M: float, K: float, beta: float
    ) -> tuple[Any, ...]:
        query = self.database.search.extract(image, box)
        return query, html.render_query(query), *self._search(query, rerank, M, K, beta)

    def _search(self, query: Query, rerank: bool, M: float, K: float, beta: float) -> tuple[str, str]:
        search, count = self.database.search, self.config.page.results
        result = search.find_similar(query, M=int(M), K=int(K), beta=float(beta), rerank=bool(rerank), count=count)
        total = search.count_reachable(query.image)
        times = html.render_times({**query.seconds, **result.seconds})
        return html.render_results(result, search.names, self.url, total), times


def make_page(config: ServeConfig, database: SearchDatabase, uploads: Path) -> tuple[gr.Blocks, dict[str, Any]]:
    """Return the page and its theme and CSS as options of `gr.mount_gradio_app`; `uploads` is the folder of uploads."""
    url = f"photos/{database.search.database.fingerprint()[:16]}"
    with gr.Blocks(
        title=f"Search by photo: {database.name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(600, _KEEP_SECONDS),
    ) as page:
        _lay_out(config, database, PageCallbacks(config, database, uploads, url))
    # Fonts of the system, so that the page makes no request to other servers.
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    return page, {"theme": theme, "css": (_HERE / "page.css").read_text()}


def _lay_out(config: ServeConfig, database: SearchDatabase, callbacks: PageCallbacks) -> None:
    search = database.search
    script = (_HERE / "viewer.js").read_text()
    plain: dict[str, Any] = {"apply_default_css": False}
    query, turn = gr.State(None, time_to_live=_KEEP_SECONDS), gr.State(0)
    device = "GPU" if search.device != "cpu" else "CPU"
    descriptor = f"{search.network.backbone.name}, {search.database.dim} numbers a photo"
    gr.HTML(html.render_header(database.name, [f"{len(search):,} photos", descriptor, f"on the {device}"]), **plain)
    with gr.Row(elem_id="sg-columns"):
        with gr.Column(scale=1, min_width=300, elem_id="sg-left"):
            upload, max_bytes = html.render_upload(config.page.max_upload), config.page.max_upload * 10**6
            viewer = gr.HTML(upload, js_on_load=script, max_bytes=max_bytes, elem_id="sg-viewer", **plain)
            message = gr.HTML("", elem_id="sg-message", **plain)
            settings = _settings(config, search.count_reachable())
        with gr.Column(scale=3, min_width=300, elem_id="sg-right"):
            if config.page.samples:
                start = "a query of the data set" if len(database.queries) else "a photo of the data set"
                with gr.Row(elem_id="sg-choose"):
                    gr.HTML(f'<p class="sg-label">Or start from {start}</p>', **plain)
                    text = gr.Textbox(
                        placeholder="part of a file name", label="Part of a file name", max_length=200, container=False
                    )
                    others = gr.Button("Others", size="sm", scale=0, min_width=80)
                examples = gr.HTML(callbacks.examples("", 0), js_on_load=script, elem_id="sg-samples", **plain)
            times = gr.HTML("", elem_id="sg-times", **plain)
            results = gr.HTML(html.render_empty(len(search)), js_on_load=script, elem_id="sg-found", **plain)
    outputs = [message, query, viewer, results, times]
    # Without Gradio's queue: its event stream closes after an answer while the next request is under way, which then is
    # never answered (Gradio 6.31). `ImageSearch` limits what runs at the same time.
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    busy: dict[str, Any] = {**quiet, "show_progress": "minimal", "show_progress_on": [results]}
    viewer.photo(callbacks.photo, settings, outputs, **busy)
    viewer.box(callbacks.box, [query, *settings], outputs, **busy)
    viewer.whole(callbacks.whole, [query, *settings], outputs, **busy)
    viewer.problem(callbacks.problem, None, message, **quiet)
    results.pick(callbacks.pick, settings, outputs, **busy)
    # While a slider moves, only the last of its values is searched with.
    changes = [setting.change for setting in settings]
    gr.on(changes, callbacks.settings, [query, *settings], outputs, trigger_mode="always_last", **quiet)
    if config.page.samples:
        examples.pick(callbacks.pick, settings, outputs, **busy)
        others.click(lambda n: (n + 1, "", callbacks.examples("", n + 1)), turn, [turn, text, examples], **quiet)
        # The event `input` does not occur when a text is cleared.
        gr.on([text.change], callbacks.examples, [text, turn], examples, trigger_mode="always_last", **quiet)


def _settings(config: ServeConfig, reachable: int) -> list[Any]:
    """Return the controls of rerank, M, K and beta; no slider exceeds what the database has."""
    r = config.rerank
    M, K, beta = (value if value is not None else default for value, default in ((r.M, 400), (r.K, 9), (r.beta, 0.15)))
    with gr.Group(elem_id="sg-settings"):
        return [
            gr.Checkbox(r.enabled, label="Rerank", info="and show what moved", elem_id="sg-rerank"),
            _slider("M", "photos reranked", 1, min(reachable, max(_MAX_VALUES["M"], M)), M, 1),
            _slider("K", "neighbors that refine", 1, min(max(reachable - 1, 1), max(_MAX_VALUES["K"], K)), K, 1),
            _slider("beta", "their weight", min(0.0, beta), max(_MAX_VALUES["beta"], beta), beta, 0.01),
        ]


def _slider(name: str, info: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    # A slider needs two different ends, even for a database of one image.
    top = max(high, low + step)
    return gr.Slider(low, top, min(value, high), step=step, label=name, info=info, elem_id=f"sg-{name.lower()}")
