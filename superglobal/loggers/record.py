"""What an evaluation logs: its numbers, its scores per query, and images of its rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from superglobal.data.evaluation_set import EvaluationSet
from superglobal.data.images import ImageItem
from superglobal.metrics.revisited import Result
from superglobal.reporting.ranking_figures import query_thumbnail, relevance, result_strip, spread_evenly, thumbnail
from superglobal.reporting.results import Names, Stages, main_protocol, main_scores, metric_key
from superglobal.reporting.runs import milliseconds_per_query
from superglobal.retrieval.rows import Rows


@dataclass(frozen=True)
class EvaluationRecord:
    """The result of an evaluation, with what figures and tables are made from."""

    summary: Mapping[str, Any]  # the content of results.json
    results: Mapping[str, Result]  # per stage; empty without labels
    stages: Stages
    names: Names
    queries: np.ndarray  # (Q, D) of unit norm
    database: Rows  # N descriptors of unit norm
    dataset: EvaluationSet | None  # None for descriptors without a data set
    images: Sequence[ImageItem]  # of the database, including distractors

    def numbers(self) -> dict[str, float]:
        """Return `search/map/medium` and so on in percent, seconds per stage, and milliseconds per query."""
        numbers = {f"seconds/{stage}": value for stage, value in self.summary["seconds"].items()}
        if (time := milliseconds_per_query(self.summary)) is not None:
            numbers["ms_per_query"] = time
        for stage, metrics in self.summary["metrics"].items():
            for protocol, value in main_scores(metrics).items():
                if value is not None:
                    numbers[f"{stage}/{metric_key(metrics)}/{protocol}"] = 100 * value
            for protocol, precisions in metrics.get("mp", {}).items():
                numbers |= {f"{stage}/mp@{k}/{protocol}": 100 * v for k, v in precisions.items() if v is not None}
        return numbers

    def per_query(self, limit: int) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows of AP per query and stage in percent, and its change by reranking.

        Cells of queries that do not count are None. Of more than `limit` queries, a selection is spread evenly.
        """
        columns = {
            f"{stage} {name}": [_percent(name, value) for value in values]
            for stage, result in self.results.items()
            for name, values in result.per_query().items()
        }
        if len(self.results) > 1 and self.summary["metrics"]:
            protocol = main_protocol(self.summary)[1]
            before, after = (columns.get(f"{stage} {protocol} AP") for stage in self.results)
            if before is not None and after is not None:
                pairs = zip(before, after, strict=True)
                columns["change"] = [None if a is None or b is None else b - a for a, b in pairs]
        rows = [
            [query, self.names.queries[query], self.landmark(query), *(values[query] for values in columns.values())]
            for query in spread_evenly(len(self.names.queries), limit)
        ]
        return ["number", "query", "landmark", *columns], rows

    def landmark(self, query: int) -> str:
        """Return the landmark of a query, "" if unknown."""
        return "" if self.names.clusters is None else str(self.names.clusters[query])

    @property
    def has_images(self) -> bool:
        """Return whether images can be shown: own descriptors may come without images."""
        return self.dataset is not None and self.summary["config"]["descriptors"]["query"] is None

    def query_image(self, query: int) -> Image.Image:
        """Return a query's image with its box; requires `has_images`."""
        assert self.dataset is not None
        return query_thumbnail(self.dataset.queries[query])

    def result_images(self, query: int, stage: str, ranks: int) -> Image.Image:
        """Return the first results of a stage side by side; requires `has_images`."""
        assert self.dataset is not None
        scores, ids = self.stages[stage]
        return result_strip(self.dataset, self.images, query, scores[query, :ranks], ids[query, :ranks])

    def database_image(self, image: int) -> Image.Image:
        """Return a reduced database image; requires `has_images`."""
        return thumbnail(self.images[image])

    def relevance(self, query: int, image: int) -> str:
        """Return the relevance of a database image to a query."""
        return "unlabeled" if self.dataset is None else relevance(self.dataset, query, image)


def _percent(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if value != value:
        return None
    return 100 * value if name.endswith(" AP") else value
