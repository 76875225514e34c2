"""Define the record of results that an evaluation passes to its loggers."""

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
    """Results of an evaluation, together with the data for tables and figures."""

    summary: Mapping[str, Any]  # content of results.json
    results: Mapping[str, Result]  # metrics by stage ("search", "rerank"); empty if there are no labels
    stages: Stages  # scores (Q, k) and database ids (Q, k) by stage
    names: Names  # names of the queries and database images, and landmarks of the queries
    queries: np.ndarray  # (Q, D) descriptors of unit norm
    database: Rows  # (N, D) descriptors of unit norm
    dataset: EvaluationSet | None  # None if only descriptors were evaluated, without images and labels
    images: Sequence[ImageItem]  # database images by id, including distractors

    def numbers(self) -> dict[str, float]:
        """Return the scalar results of the evaluation by name.

        These are the metrics in percent, such as "search/map/medium", the duration of each stage, such as
        "seconds/search", and the milliseconds per query, "ms_per_query".
        """
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
        """Return a table of the scores of each query, as column names and rows.

        A row contains the number, name and landmark of a query, and its scores after each stage. With reranking, the
        last column is the change in AP. AP is in percent. A score is None if the metric does not count the query.

        Args:
            limit: maximum number of rows. If there are more queries, evenly spaced ones are chosen.
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
        """Return the landmark of a query, or "" if it is unknown."""
        return "" if self.names.clusters is None else str(self.names.clusters[query])

    @property
    def has_images(self) -> bool:
        """Return whether the image files can be shown.

        False if the user has provided descriptors, because the image files may be missing.
        """
        return self.dataset is not None and self.summary["config"]["descriptors"]["query"] is None

    def query_image(self, query: int) -> Image.Image:
        """Return the image of a query with its box drawn; requires `has_images`."""
        assert self.dataset is not None
        return query_thumbnail(self.dataset.queries[query])

    def result_images(self, query: int, stage: str, ranks: int) -> Image.Image:
        """Return one image that shows the first results of a query side by side; requires `has_images`.

        Args:
            query: number of the query.
            stage: "search" or "rerank".
            ranks: number of results to show.
        """
        assert self.dataset is not None
        scores, ids = self.stages[stage]
        texts = [f"{score:.3f}" for score in scores[query, :ranks]]
        return result_strip(self.dataset, self.images, query, texts, ids[query, :ranks])

    def database_image(self, image: int) -> Image.Image:
        """Return a thumbnail of a database image; requires `has_images`."""
        return thumbnail(self.images[image])

    def relevance(self, query: int, image: int) -> str:
        """Return the relevance of a database image to a query, such as "positive", "junk" or "unlabeled"."""
        return "unlabeled" if self.dataset is None else relevance(self.dataset, query, image)


def _percent(name: str, value: Any) -> Any:
    """Convert a value of a table for display.

    Args:
        name: name of the value's column. If it ends with " AP", the value is converted to percent.
        value: value of the table. NaN is converted to None. A value that is not a float is returned unchanged.
    """
    if not isinstance(value, float):
        return value
    if value != value:
        return None
    return 100 * value if name.endswith(" AP") else value
