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

from superglobal.config import DemoConfig
from superglobal.errors import InputError
from superglobal.page import markup
from superglobal.page.photo_search import Described, Photo

if TYPE_CHECKING:
    from superglobal.page.photo_search import Opened


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
