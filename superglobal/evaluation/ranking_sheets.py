"""Draw figures of ranked results ("sheets") for one finished evaluation, or for two evaluations side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from superglobal.data.lazy_sequence import file_names
from superglobal.errors import InputError
from superglobal.evaluation.saved_run import FinishedRun
from superglobal.reporting.paired_comparison import PairedComparison, read_comparison, write_comparison
from superglobal.reporting.ranking_figures import Comparison, Ranking, draw_comparisons
from superglobal.reporting.results import main_protocol

log = logging.getLogger(__name__)
QUERIES_PER_SHEET = 8
# Maximum number of characters in the label of a ranking. The label is the path of the result folder; the beginning of a
# longer path is cut off.
_MAX_NAME = 90


@dataclass(frozen=True)
class FigureOptions:
    """Options of the figures. If an option is None, each kind of figure uses its own default."""

    order: str | None = None  # "worst", "improved", "worsened" or "given"; None for the worst and the improved queries
    queries: int | None = None  # maximum number of queries per order
    ranks: int | None = None  # number of results per query
    numbers: tuple[int, ...] = ()  # query numbers as in rankings.csv; they override `order` and `queries`
    images: int = 1000  # maximum number of database images on the map
    method: str = "pca"  # projection of the map, a key of `reporting.figures.PROJECTIONS`
    seed: int = 0  # seed for random samples

    def validate(self, count: int) -> None:
        """Raise InputError if an option is out of range for a result with `count` queries."""
        for number in self.numbers:
            if not 0 <= number < count:
                raise InputError(f"query {number}: expected a number from 0 to {count - 1}, as in rankings.csv")
        for name, value in (("queries", self.queries), ("ranks", self.ranks), ("images", self.images)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: expected at least 1")


def scores_by_stage(run: FinishedRun) -> dict[str, np.ndarray]:
    """Return the scores of all queries after each stage, "search" and "rerank".

    The score of a query is its AP under the main protocol. In a recognition task, it is 1 for a correct prediction and
    0 for a wrong one. The score is NaN for queries that the metric does not count.

    Returns:
        Scores (Q,) by stage; an empty dict if the result has no labels.

    Raises:
        InputError: `per_query.csv` lacks a column.
    """
    if not run.summary["metrics"]:
        return {}
    protocol = main_protocol(run.summary)[1]
    scores = {}
    for stage in run.stages:
        name = f"{stage} {protocol} AP" if f"{stage} {protocol} AP" in run.per_query else f"{stage} correct"
        if name not in run.per_query:
            raise InputError(f"{run.folder / 'per_query.csv'}: no column {name}; run again: {run.command()}")
        scores[stage] = np.array([float(value or "nan") for value in run.per_query[name]])
    return scores


def order_queries(scores: dict[str, np.ndarray], order: str, count: int) -> np.ndarray:
    """Return query numbers (n,), sorted by score or by the change in score.

    Args:
        scores: scores (Q,) by stage, as returned by `scores_by_stage`.
        order: "worst" returns all queries by ascending score after the last stage, and those whose score is NaN last.
            "improved" returns only the queries whose score reranking raised, and "worsened" only those whose score it
            lowered; the query with the largest change is first. "given" returns all queries in their original order.
        count: number of queries Q.

    Raises:
        InputError: the order requires labels or reranking, but the result has none.
    """
    if order == "given":
        return np.arange(count)
    if not scores:
        raise InputError(f"order={order}: the result has no labels to order queries by; use order=given")
    last = list(scores.values())[-1]
    if order == "worst":
        return np.argsort(last, kind="stable")
    if len(scores) < 2:
        raise InputError(f"order={order}: this result has no reranking; use order=worst or order=given")
    gain = (last - scores["search"]) * (1 if order == "improved" else -1)
    ordered = np.argsort(-gain, kind="stable")
    return ordered[gain[ordered] > 0]


def select_queries(run: FinishedRun, options: FigureOptions, count: int) -> dict[str, np.ndarray]:
    """Select the queries to show.

    Args:
        run: finished evaluation.
        options: options that give either the order and the maximum number of queries, or a list of query numbers.
        count: maximum number of queries per order, unless `options.queries` is set.

    Returns:
        Query numbers (n,) by order, such as "worst". If `options.numbers` is not empty, these numbers are returned
        under the key "chosen" instead.

    Raises:
        InputError: no query can be selected by the requested order, for example because reranking improved no query.
    """
    if options.numbers:
        return {"chosen": np.array(options.numbers)}
    scores, total = scores_by_stage(run), run.summary["counts"]["queries"]
    orders = [options.order] if options.order else ["worst", "improved"][: len(scores)] or ["given"]
    selected = {order: order_queries(scores, order, total)[: options.queries or count] for order in orders}
    if options.order and not len(selected[options.order]):
        raise InputError(f"order={options.order}: no query was {options.order} by reranking; use order=worst")
    return {order: numbers for order, numbers in selected.items() if len(numbers)}


def require_images(run: FinishedRun, kind: str) -> None:
    """Raise InputError if the evaluation used descriptors without images; `kind` names a figure that needs images."""
    if run.dataset is None:
        raise InputError(f"{kind}: the result has descriptors without images; only the figure map can be drawn")


@contextmanager
def with_image_hint(run: FinishedRun) -> Iterator[None]:
    """Add a hint to an InputError about an unreadable image that is raised inside the `with` block."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("image "):
            raise
        folder = "dataset.database" if run.config.dataset.kind == "folder" else "paths.data"
        hint = f"restore the image, or give the new folder by {folder}=FOLDER"
        raise InputError(f"{error}; {hint}; curves, similarities and map need no images") from error


def draw_sheets(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    """Draw the first results of the selected queries, before and after reranking.

    Args:
        run: finished evaluation.
        target: folder to write to.
        options: options that select the queries and set the number of results per query.

    Returns:
        The paths of the sheets.
    """
    require_images(run, "sheets")
    assert run.dataset is not None
    scores, names = scores_by_stage(run), file_names(run.dataset.queries, run.dataset.root)
    titles = {"search": "search (before reranking)", "rerank": "after reranking"} if len(run.stages) > 1 else {}
    ranks = options.ranks or 10
    paths = []
    for order, queries in select_queries(run, options, 3 * QUERIES_PER_SHEET).items():
        comparisons = []
        for query in map(int, queries):
            rankings = [
                Ranking(titles.get(stage, stage), values[query][:ranks], ids[query][:ranks])
                for stage, (values, ids) in run.stages.items()
            ]
            title = f"query {query}: {names[query]}{_score_text(run, [row[query] for row in scores.values()])}"
            full = [ids[query] for _, ids in run.stages.values()]
            comparisons.append(Comparison(query, title, rankings, full))
        paths += _draw_pages(run, target, f"sheets-{order}", comparisons)
    return paths


def _score_text(run: FinishedRun, scores: Sequence[float]) -> str:
    """Format the scores of one query as text for the title of its figure.

    Args:
        run: finished evaluation.
        scores: score of the query after each stage; empty if the result has no labels.

    Returns:
        Text such as "   medium AP 41.2 -> 55.0"; "" if `scores` is empty.
    """
    if not scores:
        return ""
    if "search correct" in run.per_query:
        return f"   {' -> '.join('right' if value else 'wrong' for value in scores)}"
    return f"   {main_protocol(run.summary)[1]} AP {_percents(scores)}"


def _percents(scores: Sequence[float]) -> str:
    """Format scores in 0..1 as percentages joined by arrows, such as "41.2 -> 55.0"; "-" stands for NaN."""
    return " -> ".join("-" if np.isnan(value) else f"{100 * value:.1f}" for value in scores)


def _draw_pages(run: FinishedRun, target: Path, name: str, comparisons: Sequence[Comparison]) -> list[Path]:
    """Draw comparisons of rankings on pages `<name>-01.png`, `<name>-02.png` and so on.

    If an earlier call wrote more pages with this `name`, the remaining old pages are removed.

    Args:
        run: finished evaluation that provides the images.
        target: folder to write to.
        name: first part of the file names.
        comparisons: the rankings to draw, one `Comparison` per query.

    Returns:
        The paths of the pages.
    """
    assert run.dataset is not None
    pages = [comparisons[i : i + QUERIES_PER_SHEET] for i in range(0, len(comparisons), QUERIES_PER_SHEET)]
    paths = [target / f"{name}-{number:02d}.png" for number in range(1, len(pages) + 1)]
    for path, page in zip(paths, pages, strict=True):
        with with_image_hint(run):
            draw_comparisons(path, run.dataset, run.images, page)
    for old in set(target.glob(f"{name}-[0-9]*.png")) - set(paths):
        old.unlink()
    return paths


def compare_runs(
    folder: Path,
    baseline: Path,
    queries: int = QUERIES_PER_SHEET,
    ranks: int = 10,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Compare a result with a baseline query by query; print a table, and write tables and figures.

    The files are written into a subfolder of `<folder>/comparison/`. `queries.csv` and `queries.md` list all queries,
    the largest gain first. `won-01.png` shows both rankings of the queries with the largest gains side by side, and
    `lost-01.png` those of the queries with the largest losses. Without images, only the tables are written.

    Args:
        folder: folder of one result.
        baseline: folder of the result to compare with.
        queries: maximum number of queries with gains to draw, and also of queries with losses.
        ranks: number of results shown per query.
        overrides: paths of moved files of both results, see `FinishedRun`.

    Returns:
        The paths of the sheets.

    Raises:
        InputError: the results cannot be compared.
    """
    run, baseline_run = FinishedRun(folder, overrides), FinishedRun(baseline, overrides)
    if run.folder.resolve() == baseline_run.folder.resolve():
        raise InputError(f"{run.folder}: the baseline is the same result; give another result to compare with")
    comparison = read_comparison(run.folder, run.summary, baseline_run.folder, baseline_run.summary)
    # Jobs of two sweeps can have equal names, so the folder name contains the name of the sweep, too.
    target = run.folder / "comparison" / "-".join(baseline_run.folder.resolve().parts[-2:])
    write_comparison(target, comparison, run.folder, baseline_run.folder)
    # Both rankings are read before `try`, because a damaged file must raise an error. If only images are missing, the
    # tables are written without figures.
    stages = [list(finished.stages.values())[-1] for finished in (baseline_run, run)]
    try:
        return _draw_paired_sheets(run, baseline_run, stages, comparison, target, queries, ranks)
    except InputError as error:
        log.warning("wrote the tables, but drew no figures: %s", error)
        return []


def _draw_paired_sheets(
    run: FinishedRun,
    baseline: FinishedRun,
    stages: Sequence[tuple[np.ndarray, np.ndarray]],
    comparison: PairedComparison,
    target: Path,
    queries: int,
    ranks: int,
) -> list[Path]:
    """Draw the rankings of the queries with the largest gains and losses, and return the paths of the sheets.

    Args:
        run: finished evaluation.
        baseline: finished evaluation to compare with.
        stages: two pairs of scores (Q, k) and database ids (Q, k) after the last stage: those of the baseline, then
            those of the run.
        comparison: comparison of the two evaluations.
        target: folder to write to.
        queries: maximum number of queries with gains to draw, and also of queries with losses.
        ranks: number of results shown per query.

    Raises:
        InputError: images are missing, or the distractors differ.
    """
    runs = (baseline, run)
    for finished in runs:
        require_images(finished, "sheets")
    distractors = {finished.config.distractors.name for finished in runs} - {None}
    if len(distractors) > 1:
        raise InputError(
            f"the results have different distractors ({', '.join(sorted(map(str, distractors)))}); use equal ones"
        )
    # Distractors follow the other database images, so the larger database contains the images of both runs.
    larger = max((run, baseline), key=lambda finished: len(finished.images))
    selected = {"won": comparison.most_won(queries), "lost": comparison.most_lost(queries)}
    paths = []
    for kind, numbers in selected.items():
        comparisons = []
        for query in numbers:
            rankings = [
                Ranking(str(finished.folder)[-_MAX_NAME:], scores[query][:ranks], ids[query][:ranks])
                for finished, (scores, ids) in zip(runs, stages, strict=True)
            ]
            percents = _percents(
                [scores[comparison.main][query] for scores in (comparison.baseline_scores, comparison.scores)]
            )
            title = f"query {query}: {comparison.queries[query]}   {comparison.main} {comparison.measure} {percents}"
            comparisons.append(Comparison(query, title, rankings, [ids[query] for _, ids in stages]))
        paths += _draw_pages(larger, target, kind, comparisons)
    return paths
