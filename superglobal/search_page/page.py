"""Build the search page in Gradio and handle its events."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from superglobal.config.evaluation import rerank_parameters
from superglobal.config.search_page import ServeConfig
from superglobal.data.images import Box
from superglobal.errors import InputError
from superglobal.reranking.registry import get_reranker
from superglobal.search_page import html
from superglobal.search_page.image_search import MAX_RESULTS, Query, QueryImage, SearchDatabase

_HERE = Path(__file__).parent
_KEEP_SECONDS = 3600  # seconds for which an uploaded file and the descriptor of the query are kept
# Maximum values of the sliders. M and K cannot exceed the number of database images. If the configured initial value of
# a slider is above the maximum, the initial value becomes the maximum.
_MAX_VALUES = {"M": 2000, "K": 50, "beta": 1.0}

Callback = Callable[..., tuple[Any, ...]]


def with_message(callback: Callback) -> Callback:
    """Wrap a callback so that it returns an error message, followed by the callback's own outputs.

    If the callback succeeds, the message is "". The outputs are the query, and the HTML of the viewer (which shows the
    query image), the results and the durations. If the callback raises an InputError, the message is the HTML of this
    error, and the page keeps its current query, viewer, results and durations.
    """

    @wraps(callback)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            return "", *callback(*args, **kwargs)
        except InputError as error:
            return html.render_error(str(error)), *[gr.skip()] * 4

    return wrapped


@dataclass(frozen=True)
class PageCallbacks:
    """Callbacks for the events of the page.

    This object stores nothing about a user. Instead, each callback receives the query and the values of the sliders.
    The callbacks that search return an error message, the query, and the HTML of the viewer (which shows the query
    image), the results and the durations.
    """

    config: ServeConfig
    database: SearchDatabase
    uploads: Path  # folder of uploaded files
    url: str  # first part of the URL of every thumbnail

    @with_message
    def photo(self, rerank: bool, M: float, K: float, beta: float, event: gr.EventData) -> tuple[Any, ...]:
        """Search for an uploaded image; the event contains the path of the uploaded file and its original name."""
        path, name = Path(str(event._data.get("path", ""))), str(event._data.get("name", "photo"))
        # The browser sends the path of the uploaded file, so a manipulated request could contain the path of any file.
        if not path.resolve().is_relative_to(self.uploads.resolve()) or not path.is_file():
            raise InputError(f"{name}: the upload was not found; choose the photo again")
        return self._search_image(QueryImage(Path(name).name or "photo", path), None, rerank, M, K, beta)

    @with_message
    def pick(self, rerank: bool, M: float, K: float, beta: float, event: gr.EventData) -> tuple[Any, ...]:
        """Search for an image of the data set that the user has picked.

        The event identifies the image by its list and index, such as "database/12" or "queries/3". If a query has a
        box, only the box is searched for.
        """
        title, _, text = str(event._data.get("pick", "")).partition("/")
        number = int(text) if text.isascii() and text.isdigit() else -1
        if title != "queries":
            return self._search_image(self.database.search.database_image(number), None, rerank, M, K, beta)
        if not 0 <= number < len(self.database.queries):
            raise InputError(f"there is no query {text}; choose one of the images on the page")
        item = self.database.queries[number]
        image = QueryImage(self.database.query_names[number], item.path)
        return self._search_image(image, item.box, rerank, M, K, beta)

    @with_message
    def box(
        self, query: Query | None, rerank: bool, M: float, K: float, beta: float, event: gr.EventData
    ) -> tuple[Any, ...]:
        """Search for a box in the query image; the event contains (x1, y1, x2, y2) as fractions of the image size."""
        box = event._data.get("box")
        is_box = isinstance(box, list) and len(box) == 4
        if query is None or not is_box or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
            raise InputError("no photo is chosen: choose a photo first, and then draw a box on it")
        width, height = query.size
        x1, y1, x2, y2 = (min(1.0, max(0.0, v)) * side for v, side in zip(box, (width, height) * 2, strict=True))
        # Extend the box to whole pixels, so that it is at least one pixel wide and high. Coordinates that were entered
        # in pixels differ from integers by rounding errors.
        x1, y1, x2, y2 = (round(value, 6) for value in (x1, y1, x2, y2))
        pixels = float(math.floor(x1)), float(math.floor(y1)), float(math.ceil(x2)), float(math.ceil(y2))
        return self._search_image(query.image, pixels, rerank, M, K, beta)

    @with_message
    def whole(self, query: Query | None, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        """Search for the whole query image instead of a box in it."""
        if query is None:
            raise InputError("no photo is chosen: choose a photo first")
        return self._search_image(query.image, None, rerank, M, K, beta)

    @with_message
    def settings(self, query: Query | None, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        """Search again for the same query with changed settings of reranking."""
        if query is None:
            return (gr.skip(),) * 4
        return gr.skip(), gr.skip(), *self._search(query, rerank, M, K, beta)

    @with_message
    def more(
        self, query: Query | None, rerank: bool, M: float, K: float, beta: float, event: gr.EventData
    ) -> tuple[Any, ...]:
        """Show more results for the same query; the event contains the number of results that are shown."""
        shown = event._data.get("shown")
        if query is None or not isinstance(shown, int):
            raise InputError("no photo is chosen: choose a photo first")
        count = min(max(shown, 0) + self.config.page.results, MAX_RESULTS)
        return gr.skip(), gr.skip(), *self._search(query, rerank, M, K, beta, count)

    def problem(self, event: gr.EventData) -> str:
        """Render the error message for an upload that failed in the browser.

        The event contains the name of the file and, if the file may be too large, its size in bytes.
        """
        name, limit = str(event._data.get("name", "the file")), self.config.page.max_upload
        size = event._data.get("bytes")
        if isinstance(size, int | float) and size > limit * 10**6:
            return html.render_error(
                f"{name}: the file has {size / 1e6:,.1f} MB; expected at most {limit} MB, so choose a smaller file"
            )
        return html.render_error(f"{name}: the upload failed; try again")

    def examples(self, text: str, turn: int) -> str:
        """Render example images of the data set.

        Args:
            text: text that the name of every shown image must contain, ignoring case. If it is "", a random sample of
                the queries is shown or, if there are no queries, a random sample of the database images.
            turn: number of times that the user has clicked "Show others"; used as the seed of the random sample.
        """
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
        """Search for an image or for a box in it.

        Args:
            image: image to search for.
            box: box in pixels of the upright image; None for the whole image.
            rerank: whether to rerank.
            M: number of images to rerank.
            K: number of neighbors in reranking.
            beta: weight of the neighbors in reranking.

        Returns:
            The query, and the HTML of the viewer (which shows the query image), the results and the durations.
        """
        query = self.database.search.extract(image, box)
        return query, html.render_query(query), *self._search(query, rerank, M, K, beta)

    def _search(
        self, query: Query, rerank: bool, M: float, K: float, beta: float, count: int | None = None
    ) -> tuple[str, str]:
        """Search for a query, and return the HTML of `count` results (by default, one page) and of the durations."""
        search, step = self.database.search, self.config.page.results
        settings: dict[str, Any] = {"M": int(M), "K": int(K), "beta": float(beta), "rerank": bool(rerank)}
        result = search.find_similar(query, **settings, count=count or step)
        total = search.count_reachable(query.image)
        times = html.render_times({**query.seconds, **result.seconds})
        return html.render_results(result, search.names, self.url, total, step), times


def make_page(config: ServeConfig, database: SearchDatabase, uploads: Path) -> tuple[gr.Blocks, dict[str, Any]]:
    """Build the search page.

    Args:
        config: settings of the page.
        database: database to search.
        uploads: folder of uploaded files.

    Returns:
        The page, and its theme and CSS as arguments of `gr.mount_gradio_app`.
    """
    url = f"photos/{database.search.database.fingerprint()[:16]}"
    with gr.Blocks(
        title=f"Search by photo: {database.name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(600, _KEEP_SECONDS),
    ) as page:
        _lay_out(config, database, PageCallbacks(config, database, uploads, url))
    # The theme uses system fonts, so that the browser sends no requests to other servers.
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    return page, {"theme": theme, "css": (_HERE / "page.css").read_text()}


def _lay_out(config: ServeConfig, database: SearchDatabase, callbacks: PageCallbacks) -> None:
    """Create the elements of the page, and connect their events with the callbacks."""
    search = database.search
    script = (_HERE / "viewer.js").read_text()
    plain: dict[str, Any] = {"apply_default_css": False}
    query, turn = gr.State(None, time_to_live=_KEEP_SECONDS), gr.State(0)
    device = "GPU" if search.device != "cpu" else "CPU"
    facts = [
        f"{len(search):,} photos",
        f"backbone {search.network.backbone.name}",
        f"{search.database.dim}-dimensional descriptors",
        f"searched on the {device}",
    ]
    gr.HTML(html.render_header(database.name, facts), **plain)
    with gr.Row(elem_id="sg-columns"):
        with gr.Column(scale=1, min_width=300, elem_id="sg-left"):
            upload, max_bytes = html.render_upload(config.page.max_upload), config.page.max_upload * 10**6
            viewer = gr.HTML(upload, js_on_load=script, max_bytes=max_bytes, elem_id="sg-viewer", **plain)
            message = gr.HTML("", elem_id="sg-message", **plain)
            gr.HTML(html.render_settings_toggle(), elem_id="sg-toggle", **plain)
            settings = _settings(config, search.count_reachable())
        with gr.Column(scale=3, min_width=300, elem_id="sg-right"):
            if config.page.samples:
                start = "a query of the data set" if len(database.queries) else "a photo of the data set"
                with gr.Row(elem_id="sg-choose"):
                    gr.HTML(f'<p class="sg-label">Or choose {start}</p>', **plain)
                    text = gr.Textbox(
                        placeholder="Filter by file name",
                        label="Filter by file name",
                        max_length=200,
                        max_lines=1,
                        container=False,
                    )
                    others = gr.Button("Show others", size="sm", scale=0, min_width=80)
                examples = gr.HTML(callbacks.examples("", 0), js_on_load=script, elem_id="sg-samples", **plain)
            times = gr.HTML("", elem_id="sg-times", **plain)
            results = gr.HTML(html.render_empty(len(search)), js_on_load=script, elem_id="sg-found", **plain)
    outputs = [message, query, viewer, results, times]
    # Gradio's queue is disabled because of a defect in Gradio 6.31. The queue closes the event stream after a response,
    # and a request that the browser sends at that moment never receives a response. Without the queue, `ImageSearch`
    # limits the number of concurrent computations.
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    busy: dict[str, Any] = {**quiet, "show_progress": "minimal", "show_progress_on": [results]}
    viewer.photo(callbacks.photo, settings, outputs, **busy)
    viewer.box(callbacks.box, [query, *settings], outputs, **busy)
    viewer.whole(callbacks.whole, [query, *settings], outputs, **busy)
    viewer.problem(callbacks.problem, None, message, **quiet)
    results.pick(callbacks.pick, settings, outputs, **busy)
    results.more(callbacks.more, [query, *settings], outputs, **busy)
    # With "always_last", moving a slider does not start a search for each intermediate value.
    changes = [setting.change for setting in settings]
    gr.on(changes, callbacks.settings, [query, *settings], outputs, trigger_mode="always_last", **quiet)
    if config.page.samples:
        examples.pick(callbacks.pick, settings, outputs, **busy)
        others.click(lambda n: (n + 1, "", callbacks.examples("", n + 1)), turn, [turn, text, examples], **quiet)
        # The event `change` is used, because the event `input` does not occur when the user clears the text.
        gr.on([text.change], callbacks.examples, [text, turn], examples, trigger_mode="always_last", **quiet)


def _settings(config: ServeConfig, reachable: int) -> list[Any]:
    """Create the controls for the settings of reranking.

    Args:
        config: settings of the page, with the initial values of the controls.
        reachable: number of database images that a search can return. M and K cannot be set higher.

    Returns:
        The checkbox that turns reranking on or off, and the sliders for M, K and beta.
    """
    r = config.rerank
    values = get_reranker(r.kind if r.enabled else "superglobal").complete(rerank_parameters(r) if r.enabled else {})
    # A reranker without K or beta ignores the slider, which is therefore hidden.
    M, K, beta = (values.get(name, low) for name, low in (("M", 1), ("K", 1), ("beta", 0.0)))
    visible = {name: name in values for name in ("K", "beta")}
    with gr.Group(elem_id="sg-settings"):
        return [
            gr.Checkbox(r.enabled, label="Rerank", info="and show changed ranks", elem_id="sg-rerank"),
            _slider("M", "number of photos to rerank", 1, min(reachable, max(_MAX_VALUES["M"], M)), M, 1),
            _slider(
                "K", "number of neighbors", 1, min(max(reachable - 1, 1), max(_MAX_VALUES["K"], K)), K, 1, visible["K"]
            ),
            _slider(
                "beta",
                "weight of the neighbors",
                min(0.0, beta),
                max(_MAX_VALUES["beta"], beta),
                beta,
                0.01,
                visible["beta"],
            ),
        ]


def _slider(
    name: str, info: str, low: float, high: float, value: float, step: float, visible: bool = True
) -> gr.Slider:
    """Create a slider for one setting of reranking.

    Args:
        name: name of the setting, "M", "K" or "beta".
        info: explanation of the setting, shown on the page.
        low: minimum value.
        high: maximum value.
        value: initial value.
        step: difference between two adjacent values.
        visible: whether the slider is shown.
    """
    # In a very small database, the maximum of M or K can be 1, like the minimum. A slider needs two different limits.
    top = max(high, low + step)
    id = f"sg-{name.lower()}"
    return gr.Slider(low, top, min(value, high), step=step, label=name, info=info, elem_id=id, visible=visible)
