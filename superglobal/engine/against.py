"""Two results query by query, with pictures of the rankings side by side."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from superglobal.engine.ranked_sheets import PAGE, pages, percents, require_photos
from superglobal.engine.reopening import FinishedRun
from superglobal.errors import InputError
from superglobal.reporting.against import Against, lost_first, read_against, write_against
from superglobal.reporting.pictures import Comparison, Ranking

log = logging.getLogger(__name__)

_NAME = 90  # characters of a folder's path over its ranking


def compare_runs(folder: Path, other: Path, queries: int = PAGE, ranks: int = 10) -> list[Path]:
    """Compare a result with another query by query, into `<folder>/against/<other's place>/` and on the console.

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
    found = read_against(mine.folder, mine.summary, theirs.folder, theirs.summary)
    # Jobs of two sweeps have the same names: with that of the sweep they are told apart.
    place = mine.folder / "against" / "-".join(theirs.folder.resolve().parts[-2:])
    write_against(place, found, mine.folder, theirs.folder)
    for run in (mine, theirs):
        run.config, run.stages  # noqa: B018  what is damaged in a result is no lack of photos
    try:
        return _sheets(mine, theirs, found, place, queries, ranks)
    except InputError as error:
        log.warning("without pictures: %s", error)
        return []


def _sheets(
    mine: FinishedRun, theirs: FinishedRun, found: Against, place: Path, queries: int, ranks: int
) -> list[Path]:
    for run in (mine, theirs):
        require_photos(run, "sheets")
    names = {run.config.distractors.name for run in (mine, theirs)} - {None}
    if len(names) > 1:
        raise InputError(f"the two searched other distractors ({', '.join(sorted(map(str, names)))})")
    # Distractors come after the database, so the larger one has the images of both.
    larger = max((mine, theirs), key=lambda run: len(run.images))
    order, counts = found.order().tolist(), found.counts()
    ends = {"won": order[: min(queries, counts["won"])]}
    ends["lost"] = lost_first(found, order)[: min(queries, counts["lost"])]
    paths = []
    for kind, numbers in ends.items():
        paths += pages(larger, place, kind, [_comparison(query, mine, theirs, found, ranks) for query in numbers])
    return paths


def _comparison(query: int, mine: FinishedRun, theirs: FinishedRun, found: Against, ranks: int) -> Comparison:
    rankings, full = [], []
    for run in (theirs, mine):
        scores, ids = (one[query] for one in list(run.stages.values())[-1])
        rankings.append(Ranking(str(run.folder)[-_NAME:], scores[:ranks], ids[:ranks]))
        full.append(ids)
    scores = np.array([one[found.main][query] for one in (found.theirs, found.ours)])
    title = f"query {query}: {found.queries[query]}   {found.main} {found.measure} {percents(list(scores))}"
    return Comparison(query, title, rankings, full)
