"""What the page answers: a photo, a box, a setting in, what is to be shown out; a fault becomes a message."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from superglobal.config.tuning import DemoConfig
from superglobal.errors import InputError
from superglobal.search_page import html as markup
from superglobal.search_page.image_search import Described, Photo

if TYPE_CHECKING:
    from superglobal.search_page.image_search import Opened


def told(answer: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """`answer` gives (query, viewer, results, times); in front of them comes the message, empty where all went well."""

    @wraps(answer)
    def safe(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            return "", *answer(*args, **kwargs)
        except InputError as error:
            return markup.problem(str(error)), *[gr.skip()] * 4

    return safe


@dataclass(frozen=True)
class Answers:
    """The answers of one page; nothing is kept between two of them, what a user has comes along.

    Args:
        uploads: folder that uploaded files lie under.
        photos: what the addresses of pictures begin with.
    """

    config: DemoConfig
    opened: Opened
    uploads: Path
    photos: str

    @told
    def photo(self, rerank: bool, M: float, K: float, beta: float, event: gr.EventData) -> tuple[Any, ...]:
        """A file was uploaded."""
        path, name = Path(str(event._data.get("path", ""))), str(event._data.get("name", "photo"))
        # A browser says where its upload lies, and might say anything.
        if not path.resolve().is_relative_to(self.uploads.resolve()) or not path.is_file():
            raise InputError(f"{name} was not uploaded here; choose it again")
        return self._searched(Photo(Path(name).name or "photo", path), None, rerank, M, K, beta)

    @told
    def pick(self, rerank: bool, M: float, K: float, beta: float, event: gr.EventData) -> tuple[Any, ...]:
        """A photo of the data set was picked, "database/12" or "queries/3"; a query comes with its box."""
        title, _, number = str(event._data.get("pick", "")).partition("/")
        place = int(number) if number.isascii() and number.isdigit() else -1
        if title != "queries":
            return self._searched(self.opened.search.photo(place), None, rerank, M, K, beta)
        if not 0 <= place < len(self.opened.queries):
            raise InputError(f"there is no query {number}")
        item = self.opened.queries[place]
        return self._searched(Photo(self.opened.query_names[place], item.path), item.box, rerank, M, K, beta)

    @told
    def box(
        self, query: Described | None, rerank: bool, M: float, K: float, beta: float, event: gr.EventData
    ) -> tuple[Any, ...]:
        """A box was drawn, (x1, y1, x2, y2) in 0..1 of the photo's sides."""
        drawn = event._data.get("box")
        sound = isinstance(drawn, list) and len(drawn) == 4
        if query is None or not sound or not all(isinstance(v, int | float) and math.isfinite(v) for v in drawn):
            raise InputError("choose a photo first, then draw a box on it")
        width, height = query.size
        x1, y1, x2, y2 = (min(1.0, max(0.0, v)) * side for v, side in zip(drawn, (width, height) * 2, strict=True))
        # As many whole pixels as were touched, one at least.
        pixels = float(math.floor(x1)), float(math.floor(y1)), float(math.ceil(x2)), float(math.ceil(y2))
        return self._searched(query.photo, pixels, rerank, M, K, beta)

    @told
    def whole(self, query: Described | None, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        """The box is to go."""
        if query is None:
            raise InputError("choose a photo first")
        return self._searched(query.photo, None, rerank, M, K, beta)

    @told
    def settings(self, query: Described | None, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        """A setting was changed: the descriptor stays."""
        if query is None:
            return (gr.skip(),) * 4
        return gr.skip(), gr.skip(), *self._found(query, rerank, M, K, beta)

    def problem(self, event: gr.EventData) -> str:
        """The browser could not upload a file."""
        name, most = str(event._data.get("name", "the file")), self.config.page.max_upload
        size = event._data.get("bytes")
        if isinstance(size, int | float) and size > most * 10**6:
            return markup.problem(f"{name} has {size / 1e6:,.1f} MB, more than the {most} MB allowed: make it smaller")
        return markup.problem(f"{name} could not be uploaded; try again")

    def samples(self, text: str, turn: int) -> str:
        """Photos to start from: with `text` in their names, or else drawn by `turn`, queries if there are any."""
        lists = {"queries": self.opened.query_names, "database": self.opened.search.names}
        count, wanted = self.config.page.samples, text.strip().casefold()
        if wanted:
            matching = (
                (title, number, name)
                for title, names in lists.items()
                for number, name in enumerate(names)
                if wanted in name.casefold()
            )
            chosen = [found for found, _ in zip(matching, range(count), strict=False)]
        else:
            title = "queries" if len(lists["queries"]) else "database"
            total = len(lists[title])
            drawn = np.random.default_rng(turn).choice(total, min(count, total), replace=False)
            chosen = [(title, int(number), lists[title][number]) for number in np.sort(drawn)]
        return markup.samples(
            [(f"{title}/{n}", f"{self.photos}/{title}/small/{n}.jpg", name) for title, n, name in chosen], text.strip()
        )

    def _searched(self, photo: Photo, box: Any, rerank: bool, M: float, K: float, beta: float) -> tuple[Any, ...]:
        query = self.opened.search.describe(photo, box)
        return query, markup.viewer(query), *self._found(query, rerank, M, K, beta)

    def _found(self, query: Described, rerank: bool, M: float, K: float, beta: float) -> tuple[str, str]:
        search = self.opened.search
        found = search.find(
            query, M=int(M), K=int(K), beta=float(beta), rerank=bool(rerank), count=self.config.page.results
        )
        shown = markup.results(found, search.names, self.photos, search.reachable(query.photo))
        return shown, markup.times({**query.seconds, **found.seconds})


if TYPE_CHECKING:
    from superglobal.search_page.image_search import Opened
_HERE = Path(__file__).parent
_KEPT = 3600  # seconds that an upload and its descriptor are kept
_MOST = {"M": 2000, "K": 50, "beta": 1.0}  # of the sliders, where neither the database nor the settings say otherwise


def make_page(config: DemoConfig, opened: Opened, uploads: Path) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page, and its looks, which Gradio takes where the page is mounted.

    Args:
        uploads: folder that uploaded files lie under.
    """
    photos = f"photos/{opened.search.database.fingerprint()[:16]}"
    answers = Answers(config, opened, uploads, photos)
    with gr.Blocks(
        title=f"Search by photo: {opened.name}", analytics_enabled=False, fill_width=True, delete_cache=(600, _KEPT)
    ) as page:
        _lay_out(config, opened, answers)
    # Fonts of the system: nothing is fetched from elsewhere.
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")
    return page, {"theme": theme, "css": (_HERE / "page.css").read_text()}


def _lay_out(config: DemoConfig, opened: Opened, answers: Answers) -> None:
    picks = (_HERE / "picks.js").read_text()
    search = opened.search
    plain: dict[str, Any] = {"apply_default_css": False}
    query, turn = gr.State(None, time_to_live=_KEPT), gr.State(0)
    gr.HTML(markup.header(opened.name, _facts(opened)), **plain)
    with gr.Row(elem_id="sg-columns"):
        with gr.Column(scale=1, min_width=300, elem_id="sg-left"):
            viewer = gr.HTML(
                markup.chooser(config.page.max_upload),
                js_on_load=(_HERE / "viewer.js").read_text(),
                most=config.page.max_upload * 10**6,
                elem_id="sg-viewer",
                **plain,
            )
            message = gr.HTML("", elem_id="sg-message", **plain)
            settings = _settings(config, search.reachable())
        with gr.Column(scale=3, min_width=300, elem_id="sg-right"):
            if config.page.samples:
                start = "a query of the data set" if len(opened.queries) else "a photo of the data set"
                with gr.Row(elem_id="sg-choose"):
                    gr.HTML(markup.label(f"Or start from {start}"), **plain)
                    text = gr.Textbox(
                        placeholder="part of a file name", label="Part of a file name", max_length=200, container=False
                    )
                    others = gr.Button("Others", size="sm", scale=0, min_width=80)
                samples = gr.HTML(answers.samples("", 0), js_on_load=picks, elem_id="sg-samples", **plain)
            times = gr.HTML("", elem_id="sg-times", **plain)
            results = gr.HTML(markup.empty(len(search)), js_on_load=picks, elem_id="sg-found", **plain)
    shown = [message, query, viewer, results, times]
    # Without Gradio's queue: its event stream closes behind one answer while the next request is under way, which then
    # is never answered (6.31). What must not happen at once is limited in `PhotoSearch`.
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    busy: dict[str, Any] = {**quiet, "show_progress": "minimal", "show_progress_on": [results]}
    viewer.photo(answers.photo, settings, shown, **busy)
    viewer.box(answers.box, [query, *settings], shown, **busy)
    viewer.whole(answers.whole, [query, *settings], shown, **busy)
    viewer.problem(answers.problem, None, message, **quiet)
    results.pick(answers.pick, settings, shown, **busy)
    # However often a slider moves meanwhile, only where it stops is searched again.
    changes = [one.change for one in settings]
    gr.on(changes, answers.settings, [query, *settings], shown, trigger_mode="always_last", **quiet)
    if config.page.samples:
        samples.pick(answers.pick, settings, shown, **busy)
        others.click(lambda n: (n + 1, "", answers.samples("", n + 1)), turn, [turn, text, samples], **quiet)
        # Not `input`, which says nothing of a text that was emptied.
        gr.on([text.change], answers.samples, [text, turn], samples, trigger_mode="always_last", **quiet)


def _facts(opened: Opened) -> list[str]:
    search = opened.search
    network = search.network
    device = "GPU" if search.device != "cpu" else "CPU"
    size = f"{len(search):,} photos"
    return [size, f"{network.backbone.name}, {search.database.dim} numbers a photo", f"on the {device}"]


def _settings(config: DemoConfig, most: int) -> list[Any]:
    """Whether it is reranked, M, K, beta; no slider goes beyond what the database has."""
    r = config.rerank
    M, K, beta = (value if value is not None else default for value, default in ((r.M, 400), (r.K, 9), (r.beta, 0.15)))
    with gr.Group(elem_id="sg-settings"):
        return [
            gr.Checkbox(r.enabled, label="Rerank", info="and show what moved", elem_id="sg-rerank"),
            _slider("M", "photos reranked", 1, min(most, max(_MOST["M"], M)), M, 1),
            _slider("K", "neighbours that refine", 1, min(max(most - 1, 1), max(_MOST["K"], K)), K, 1),
            _slider("beta", "their weight", min(0.0, beta), max(_MOST["beta"], beta), beta, 0.01),
        ]


def _slider(name: str, info: str, least: float, most: float, value: float, step: float) -> gr.Slider:
    # A slider needs two ends, and a database of one photo has but one.
    top = max(most, least + step)
    return gr.Slider(least, top, min(value, most), step=step, label=name, info=info, elem_id=f"sg-{name.lower()}")
