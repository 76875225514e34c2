"""The page: what stands where, and which answer belongs to what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from superglobal.config import DemoConfig
from superglobal.page import markup
from superglobal.page.answers import Answers

if TYPE_CHECKING:
    from superglobal.page.photo_search import Opened

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
