"""What trackers are told of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from superglobal.data.evaluation_set import EvaluationSet
from superglobal.data.images import ImageItem
from superglobal.metrics.revisited import Result
from superglobal.reporting.ranking_figures import draw_query, draw_results, draw_thumbnail, relevance
from superglobal.reporting.results import Names, Stages, main_protocol, main_scores, metric_key
from superglobal.reporting.runs import milliseconds
from superglobal.retrieval.rows import Rows


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation with all that pictures and tables are made of.

    Args:
        summary: what results.json holds.
        results: scores per stage; empty without labels.
        stages: ranked lists per stage.
        names: of queries and database images.
        queries, database: (Q, D) and N descriptors of unit norm.
        dataset, images: the photos, database images with distractors; None and empty for descriptors alone.
    """

    summary: Mapping[str, Any]
    results: Mapping[str, Result]
    stages: Stages
    names: Names
    queries: np.ndarray
    database: Rows
    dataset: EvaluationSet | None
    images: Sequence[ImageItem]

    def numbers(self) -> dict[str, float]:
        """`search/map/medium` and so on, in percent; seconds of each stage and milliseconds a query."""
        seconds = self.summary["seconds"]
        numbers = {f"seconds/{stage}": value for stage, value in seconds.items()}
        if (time := milliseconds(self.summary)) is not None:
            numbers["ms_per_query"] = time
        for stage, result in self.summary["metrics"].items():
            for protocol, value in main_scores(result).items():
                if value is not None:
                    numbers[f"{stage}/{metric_key(result)}/{protocol}"] = 100 * value
            for protocol, row in result.get("mp", {}).items():
                numbers |= {f"{stage}/mp@{k}/{protocol}": 100 * v for k, v in row.items() if v is not None}
        return numbers

    def per_query(self, most: int) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows: AP of each query and stage in percent, and what reranking changes of the main one; None
        where a query does not count. Of more than `most` queries a part, spread evenly.
        """
        values = {
            f"{stage} {name}": column for stage, r in self.results.items() for name, column in r.per_query().items()
        }
        columns = {name: [_percent(name, value) for value in column] for name, column in values.items()}
        if len(self.results) > 1 and self.summary["metrics"]:
            _, protocol = main_protocol(self.summary)
            pair = [columns.get(f"{stage} {protocol} AP") for stage in self.results]
            if pair[0] is not None and pair[-1] is not None:
                columns["change"] = [
                    None if a is None or b is None else b - a for a, b in zip(pair[0], pair[-1], strict=True)
                ]
        shown = spread(len(self.names.queries), most)
        rows = [
            [q, self.names.queries[q], self.landmark(q), *(column[q] for column in columns.values())] for q in shown
        ]
        return ["number", "query", "landmark", *columns], rows

    def landmark(self, query: int) -> str:
        return "" if self.names.clusters is None else str(self.names.clusters[query])

    @property
    def has_photos(self) -> bool:
        """Own descriptors need none, so there may be none to show."""
        return self.dataset is not None and self.summary["config"]["descriptors"]["query"] is None

    def picture(self, query: int) -> Image.Image:
        """The query's photo, its box drawn; only where `has_photos`."""
        assert self.dataset is not None
        return draw_query(self.dataset.queries[query])

    def ranked(self, query: int, stage: str, ranks: int) -> Image.Image:
        """The first results of a stage in a row, borders by relevance; only where `has_photos`."""
        assert self.dataset is not None
        scores, ids = self.stages[stage]
        return draw_results(self.dataset, self.images, query, scores[query, :ranks], ids[query, :ranks])

    def thumbnail(self, image: int) -> Image.Image:
        """A database photo, small; only where `has_photos`."""
        return draw_thumbnail(self.images[image])

    def relevance(self, query: int, image: int) -> str:
        """What a database image is to a query."""
        return "unlabelled" if self.dataset is None else relevance(self.dataset, query, image)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist() if count and most else []


def _percent(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if value != value:
        return None
    return 100 * value if name.endswith(" AP") else value
