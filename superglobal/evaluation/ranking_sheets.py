"""Ranked sheets of a finished evaluation, and of two side by side, in an order that shows what matters first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from superglobal.data.evaluation_set import file_names
from superglobal.errors import InputError
from superglobal.evaluation.saved_run import FinishedRun
from superglobal.reporting.paired_comparison import PairedComparison, read_comparison, write_comparison
from superglobal.reporting.ranking_figures import Comparison, Ranking, draw_comparisons
from superglobal.reporting.results import main_protocol

ORDERS = ("worst", "improved", "worsened", "given")
PAGE = 8  # queries on a sheet


@dataclass(frozen=True)
class FigureOptions:
    """What is drawn.

    Args:
        order: which queries come first, of `ORDERS`; None for worst, then improved, as far as they apply.
        queries: how many; None for what suits the kind.
        ranks: results of each; None for what suits the kind.
        numbers: queries by their number (as in rankings.csv), in place of `order` and `queries`.
        images: of the map, at most.
        method: of the map, of `embedding.METHODS`.
        seed: of what is drawn by lot.
    """

    order: str | None = None
    queries: int | None = None
    ranks: int | None = None
    numbers: tuple[int, ...] = ()
    images: int = 1000
    method: str = "pca"
    seed: int = 0


def quality(run: FinishedRun) -> dict[str, np.ndarray]:
    """Stage -> (Q,) AP of the main protocol, or in recognition 1 and 0 for right and wrong; NaN where not counted."""
    if not run.summary["metrics"]:
        return {}
    protocol = main_protocol(run.summary)[1]
    found = {}
    for stage in run.stages:
        name = f"{stage} {protocol} AP" if f"{stage} {protocol} AP" in run.per_query else f"{stage} correct"
        if name not in run.per_query:
            raise InputError(f"{run.folder / 'per_query.csv'}: no column {name}; make it again: {run.command()}")
        found[stage] = np.array([float(value or "nan") for value in run.per_query[name]])
    return found


def ordered(scores: dict[str, np.ndarray], order: str, count: int) -> np.ndarray:
    """Numbers of queries in an order of `ORDERS`; of "improved" and "worsened" those alone that did, of others all.

    Args:
        scores: stage -> (Q,), NaN for queries that do not count, which come last.
        order: of `ORDERS`.
        count: of queries.

    Raises:
        InputError: no labels, or no reranking to improve by.
    """
    if order == "given":
        return np.arange(count)
    if not scores:
        raise InputError(f"order={order}: without labels no query is better than another; order=given")
    last = list(scores.values())[-1]
    if order == "worst":
        return np.argsort(last, kind="stable")
    if len(scores) < 2:
        raise InputError(f"order={order}: this result has no reranking; order=worst or given")
    gain = (last - scores["search"]) * (1 if order == "improved" else -1)
    found = np.argsort(-gain, kind="stable")
    return found[gain[found] > 0]


def chosen(run: FinishedRun, options: FigureOptions, count: int) -> dict[str, np.ndarray]:
    """Name of an order -> numbers of the queries that are shown in it, at most `count` where no number is given.

    Raises:
        InputError: the order does not apply, or no query is of that kind.
    """
    if options.numbers:
        return {"chosen": np.array(options.numbers)}
    scores, total = quality(run), run.summary["counts"]["queries"]
    orders = [options.order] if options.order else ["worst", "improved"][: len(scores)] or ["given"]
    found = {order: ordered(scores, order, total)[: options.queries or count] for order in orders}
    if options.order and not len(found[options.order]):
        raise InputError(f"order={options.order}: no query was {options.order} by reranking")
    return {order: numbers for order, numbers in found.items() if len(numbers)}


def percents(scores: Sequence[float]) -> str:
    """Before and after, in percent."""
    return " -> ".join("-" if np.isnan(value) else f"{100 * value:.1f}" for value in scores)


def check_training_images(run: FinishedRun, what: str) -> None:
    """
    Raises:
        InputError: the result has descriptors alone.
    """
    if run.dataset is None:
        raise InputError(f"{what}: the result was made from descriptors and knows no photos; map applies")


def draw_sheets(run: FinishedRun, target: Path, options: FigureOptions) -> list[Path]:
    check_training_images(run, "sheets")
    assert run.dataset is not None
    scores = quality(run)
    paths = []
    for order, queries in chosen(run, options, 3 * PAGE).items():
        comparisons = []
        for query in queries:
            lists = {stage: (values[query], ids[query]) for stage, (values, ids) in run.stages.items()}
            title = _title(run, int(query), {name: one[query] for name, one in scores.items()})
            comparisons.append(_comparison(int(query), title, lists, options.ranks or 10))
        paths += pages(run, target, f"sheets-{order}", comparisons)
    return paths


def _comparison(query: int, title: str, lists: dict[str, tuple[np.ndarray, np.ndarray]], ranks: int) -> Comparison:
    names = {"search": "search (before reranking)", "rerank": "after reranking"} if len(lists) > 1 else {}
    rankings = [Ranking(names.get(name, name), s[:ranks], ids[:ranks]) for name, (s, ids) in lists.items()]
    return Comparison(query, title, rankings, [ids for _, ids in lists.values()])


def _title(run: FinishedRun, query: int, scores: dict[str, float]) -> str:
    assert run.dataset is not None
    name = file_names(run.dataset.queries, run.dataset.root)[query]
    text = f"query {query}: {name}"
    if not scores:
        return text
    if "search correct" in run.per_query:
        return f"{text}   {' -> '.join('right' if value else 'wrong' for value in scores.values())}"
    return f"{text}   {main_protocol(run.summary)[1]} AP {percents(list(scores.values()))}"


def pages(run: FinishedRun, target: Path, name: str, comparisons: Sequence[Comparison]) -> list[Path]:
    """Write `name-01.png`, ...; pages of an earlier call are gone afterwards."""
    assert run.dataset is not None
    parts = [comparisons[i : i + PAGE] for i in range(0, len(comparisons), PAGE)]
    paths = [target / f"{name}-{number:02d}.png" for number in range(1, len(parts) + 1)]
    for path, part in zip(paths, parts, strict=True):
        with_photos(run, partial(draw_comparisons, path, run.dataset, run.images, part))
    for old in set(target.glob(f"{name}-[0-9]*.png")) - set(paths):
        old.unlink()
    return paths


def with_photos(run: FinishedRun, draw: Callable[[], object]) -> None:
    """Call `draw`; a photo that is gone is told with the way out.

    Raises:
        InputError: a photo cannot be read.
    """
    try:
        draw()
    except InputError as error:
        if not str(error).startswith("image "):
            raise
        where = "" if Path(run.config.dataset.root).is_absolute() else f", and run this from where {run.command()} ran"
        raise InputError(f"{error}; put the photo back{where}; curves, similarities and map need no photos") from error


log = logging.getLogger(__name__)
_NAME = 90  # characters of a folder's path over its ranking


def compare_runs(folder: Path, other: Path, queries: int = PAGE, ranks: int = 10) -> list[Path]:
    """Compare a result with another query by query, into `comparison/` of its folder and on the console.

    `queries.csv` and `queries.md` have every query, most won first; `won-01.png` and `lost-01.png` show the rankings of
    the most won and the most lost ones side by side. Without photos the tables alone are written, and it is said.

    Args:
        folder, other: each of one result.
        queries: of either kind that are shown at most.
        ranks: results of each.

    Returns:
        The pictures.

    Raises:
        InputError: results that cannot be compared.
    """
    mine, theirs = FinishedRun(folder), FinishedRun(other)
    if mine.folder.resolve() == theirs.folder.resolve():
        raise InputError(f"{mine.folder}: the same result twice; give another one to compare it with")
    found = read_comparison(mine.folder, mine.summary, theirs.folder, theirs.summary)
    # Jobs of two sweeps have the same names: with that of the sweep they are told apart.
    place = mine.folder / "comparison" / "-".join(theirs.folder.resolve().parts[-2:])
    write_comparison(place, found, mine.folder, theirs.folder)
    for run in (mine, theirs):
        run.config, run.stages  # noqa: B018  what is damaged in a result is no lack of photos
    try:
        return _sheets(mine, theirs, found, place, queries, ranks)
    except InputError as error:
        log.warning("without figures: %s", error)
        return []


def _sheets(
    mine: FinishedRun, theirs: FinishedRun, found: PairedComparison, place: Path, queries: int, ranks: int
) -> list[Path]:
    for run in (mine, theirs):
        check_training_images(run, "sheets")
    names = {run.config.distractors.name for run in (mine, theirs)} - {None}
    if len(names) > 1:
        raise InputError(f"the two searched other distractors ({', '.join(sorted(map(str, names)))})")
    # Distractors come after the database, so the larger one has the images of both.
    larger = max((mine, theirs), key=lambda run: len(run.images))
    ends = {"won": found.most_won(queries), "lost": found.most_lost(queries)}
    paths = []
    for kind, numbers in ends.items():
        paths += pages(larger, place, kind, [_comparison_pages(query, mine, theirs, found, ranks) for query in numbers])
    return paths


def _comparison_pages(
    query: int, mine: FinishedRun, theirs: FinishedRun, found: PairedComparison, ranks: int
) -> Comparison:
    rankings, full = [], []
    for run in (theirs, mine):
        scores, ids = (one[query] for one in list(run.stages.values())[-1])
        rankings.append(Ranking(str(run.folder)[-_NAME:], scores[:ranks], ids[:ranks]))
        full.append(ids)
    scores = np.array([one[found.main][query] for one in (found.baseline_scores, found.scores)])
    title = f"query {query}: {found.queries[query]}   {found.main} {found.measure} {percents(list(scores))}"
    return Comparison(query, title, rankings, full)
